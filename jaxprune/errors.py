"""Errors that a user can fix: in values here, in files in `convert.errors`. They carry fields and
name no flags."""

from convert.errors import Change as Change
from convert.errors import CheckpointError as CheckpointError
from convert.errors import InputError as InputError
from convert.errors import UserError as UserError
