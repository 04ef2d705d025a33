"""The state that a device is in while it is measured: read, compared, and held still.

before = read_conditions(transport, "jetson")
...
doubts = changed(before, read_conditions(transport, "jetson"))
"""

from devices.conditions.changes import changed
from devices.conditions.clocks import fixed_clocks
from devices.conditions.energy import Energy, beside_tegrastats
from devices.conditions.model import Conditions, Kind
from devices.conditions.read import read_conditions

__all__ = ["Conditions", "Energy", "Kind", "beside_tegrastats", "changed", "fixed_clocks", "read_conditions"]
