"""The one error that a user can cause."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is a single sentence that names the offending value and what would be accepted. Command lines print
    it and exit with code 2; Python callers catch it like any `ValueError`.
    """
