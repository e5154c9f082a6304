"""The error for mistakes that the user can correct."""


class UserError(Exception):
    """Raised for a mistake that the user can correct.

    The message is one line: the file, line or flag concerned, what was expected there, what to do about it.
    """
