"""The error of values: options, text, numbers, machines. Errors of files are `convert.CheckpointError`."""

from convert.errors import Change as Change
from convert.errors import UserError


class InputError(UserError):
    """An option, a text or a number that cannot be used."""
