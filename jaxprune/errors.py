"""The one error that speaks to the user: what was wrong, where, and what to do."""


class InputError(ValueError):
    """A flag, a text or a number that cannot be used; the command line prints it without a traceback."""
