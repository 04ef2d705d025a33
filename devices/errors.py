"""The errors of this package: what a user can do something about, one sentence each."""


class DeviceError(ValueError):
    """A device, a program or a file cannot be used; one sentence that names it and what would be accepted."""


class DeviceGone(DeviceError):
    """The device cannot be reached any more: unplugged, switched off, or its connection broke."""


class DeviceAbsent(DeviceGone):
    """The device could not be reached in the first place."""


class DeviceTimeout(DeviceError):
    """A command on the device did not end in time; it was ended there."""
