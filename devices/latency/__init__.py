"""What a plan costs on a device, in milliseconds.

cost = LatencyModel.fit("pixel.json").with_decode_tokens(16)
cost.predict(plan)  # ms of a request
cost.report()["warnings"]
"""

from devices.latency.accuracy import accuracy
from devices.latency.model import LatencyModel, LayerCost

__all__ = ["LatencyModel", "LayerCost", "accuracy"]
