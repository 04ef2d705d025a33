"""The error of this package."""


class DeviceError(ValueError):
    """A device or a program cannot be used; one sentence that names it and what would be accepted."""
