"""Reaching devices, measuring pruned models on them, and predicting what a plan costs there.

device = devices.connect("ssh://pi@board")
profile = devices.profile(device, "llava-digits", out="board.json")     # measures; goes on where it was stopped
cost = devices.LatencyModel.fit(profile)                                # cost.predict(plan) in ms, cost.report()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from devices.device import Device, connect
    from devices.errors import DeviceError, DeviceGone, DeviceTimeout
    from devices.imports import import_results
    from devices.latency import LatencyModel
    from devices.loop import DeviceCost
    from devices.profiles import Profile
    from devices.profiling import profile
    from devices.timing import Timing, interleave

# Where each name is: runtime_tests needs little of this, and must not bring the pruner along.
_HOMES = {
    "Device": "device",
    "DeviceCost": "loop",
    "DeviceError": "errors",
    "DeviceGone": "errors",
    "DeviceTimeout": "errors",
    "LatencyModel": "latency",
    "Profile": "profiles",
    "Timing": "timing",
    "connect": "device",
    "import_results": "imports",
    "interleave": "timing",
    "profile": "profiling",
}
__all__ = [
    "Device",
    "DeviceCost",
    "DeviceError",
    "DeviceGone",
    "DeviceTimeout",
    "LatencyModel",
    "Profile",
    "Timing",
    "connect",
    "import_results",
    "interleave",
    "profile",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'devices' has no attribute {name!r}")
    return getattr(importlib.import_module(f"devices.{_HOMES[name]}"), name)
