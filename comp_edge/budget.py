"""What the pruned model may cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comp_edge.cost import Cost, MacsCost
from comp_edge.errors import InputError


@dataclass(frozen=True)
class Budget:
    """A target for the cost of one request. Give exactly one of `macs`, `latency_ms` and `speedup`.

    Attributes:
        macs: fraction of the dense model's multiply-accumulates to keep, between 0 and 1.
        latency_ms: predicted milliseconds; needs `cost`.
        speedup: dense cost over pruned cost, above 1; of MACs, or of `cost` when given.
        cost: what predicts the cost of a plan (a fitted latency model); MACs by default.
        decode_tokens: tokens generated after the first that the default cost counts in.
    """

    macs: float | None = None
    latency_ms: float | None = None
    speedup: float | None = None
    cost: Cost | None = None
    decode_tokens: int = 0

    def __post_init__(self) -> None:
        given = [name for name in ("macs", "latency_ms", "speedup") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(f"a budget needs exactly one of macs, latency_ms and speedup, got {given or 'none'}.")
        if self.macs is not None and not 0 < self.macs < 1:
            raise InputError(f"the fraction of MACs to keep must be between 0 and 1, got {self.macs}.")
        if self.macs is not None and self.cost is not None:
            raise InputError("a budget in macs takes no cost model; give latency_ms or speedup with it.")
        if self.speedup is not None and not self.speedup > 1:
            raise InputError(f"speedup must be above 1, got {self.speedup}.")
        if self.latency_ms is not None and (self.cost is None or not self.latency_ms > 0):
            raise InputError(f"latency_ms must be positive and needs a cost model, got {self.latency_ms}.")
        if self.decode_tokens < 0:
            raise InputError(f"decode_tokens must not be negative, got {self.decode_tokens}.")
        if self.cost is not None and not isinstance(self.cost, Cost):
            raise InputError(f"cost must have a name and predict(plan), got {type(self.cost).__name__}.")

    def cost_model(self, model: Any) -> Cost:
        """What predicts the cost of plans for this model."""
        return self.cost or MacsCost(model, decode_tokens=self.decode_tokens)

    def target(self, dense: float) -> float:
        """The cost to reach, when the dense model costs `dense`.

        Raises:
            InputError: the dense model costs no more than that.
        """
        if self.macs is not None:
            return dense * self.macs
        if self.speedup is not None:
            return dense / self.speedup
        if self.latency_ms >= dense:
            raise InputError(
                f"latency_ms {self.latency_ms:g} asks for nothing: the model as it is takes {dense:.2f} ms by prediction."
            )
        return float(self.latency_ms)

    def to_json(self) -> dict[str, Any]:
        """What the plan records."""
        fields = {"macs": self.macs, "latency_ms": self.latency_ms, "speedup": self.speedup}
        return {k: v for k, v in fields.items() if v is not None} | {"decode_tokens": self.decode_tokens}
