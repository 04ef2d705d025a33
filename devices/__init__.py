"""Reaching the machine that a program is to run on, and timing it there.

device = devices.connect("host")
device.info()
timings = devices.interleave({"a": run_a, "b": run_b})
"""

from devices.errors import DeviceError
from devices.host import HostDevice, connect
from devices.timing import Timing, interleave

__all__ = ["DeviceError", "HostDevice", "Timing", "connect", "interleave"]
