"""The plan: everything that a pruning decided, as versioned JSON (schema 1)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from comp_edge.errors import InputError
from comp_edge.files import read_json, write_text

PLAN_FILE = "plan.json"
PLAN_ATTRIBUTE = "comp_edge_plan"  # where a pruned model carries its plan
Index = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class LayerPlan(BaseModel):
    """Which dense units of one layer are kept, as ascending indices. An empty list drops the sub-layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    heads: tuple[Index, ...]
    ffn: tuple[Index, ...]

    @model_validator(mode="after")
    def _ascending(self) -> LayerPlan:
        for name in ("heads", "ffn"):
            kept = getattr(self, name)
            if any(a >= b for a, b in zip(kept, kept[1:], strict=False)):
                raise ValueError(f"{name} must be ascending without repeats, got {list(kept)}")
        return self


class StreamPlan(BaseModel):
    """Layers of one stream, and how many tokens each of them computes on (protected tokens included)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    layers: tuple[LayerPlan, ...]
    tokens: tuple[Positive, ...]
    delivered: Positive | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="tokens handed on after the last layer, where the connector needs all of them and drops behind itself",
    )

    @model_validator(mode="after")
    def _schedule(self) -> StreamPlan:
        if len(self.tokens) != len(self.layers):
            raise ValueError(f"tokens has {len(self.tokens)} entries for {len(self.layers)} layers")
        for layer, (before, after) in enumerate(zip(self.tokens, self.tokens[1:], strict=False)):
            if after > before:
                raise ValueError(f"tokens must not rise: {before} in layer {layer}, {after} in layer {layer + 1}")
        if self.delivered is not None and self.tokens and self.delivered > self.tokens[-1]:
            raise ValueError(
                f"delivered must not exceed the last layer's tokens {self.tokens[-1]}, got {self.delivered}"
            )
        return self

    @property
    def schedule(self) -> tuple[int, ...]:
        """Token counts of the layers, and what is handed on behind them where that is decided apart."""
        return self.tokens if self.delivered is None else (*self.tokens, self.delivered)


class CostRecord(BaseModel):
    """The cost that steered the pruning, of the dense and of the pruned model (in MACs or milliseconds)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    dense: float
    pruned: float


class Plan(BaseModel):
    """What to keep of a dense model. Round-trips through `plan.json`; see DESIGN for the schema."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_: Literal[1] = Field(default=1, alias="schema")
    model_type: str
    base: str
    streams: dict[str, StreamPlan]
    images: Positive = Field(
        default=1, exclude_if=lambda value: value == 1, description="images (or tiles) of the request that it is for"
    )
    budget: dict[str, Any] = Field(default_factory=dict)
    cost: CostRecord | None = None
    strategy: str = "none"
    seed: int = 0

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a file, or from the `plan.json` of a folder.

        Raises:
            InputError: missing, not JSON, of an unknown schema or inconsistent; says where.
        """
        path = Path(path)
        if path.is_dir():
            path = path / PLAN_FILE
        return cls.parse(read_json(path, what="plan"), where=str(path))

    @classmethod
    def parse(cls, value: Any, *, where: str = "plan") -> Plan:
        """A plan from decoded JSON; `where` names it in errors."""
        if not isinstance(value, dict):
            raise InputError(f"{where} must hold a JSON object, got {type(value).__name__}.")
        if value.get("schema") != 1 or value["schema"] is True:
            raise InputError(f"{where} has schema {value.get('schema')!r}; this version reads schema 1.")
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "plan"
            message = first["msg"].removeprefix("Value error, ")
            raise InputError(f"{where}: {place}: {message}.") from None

    def to_json(self) -> dict[str, Any]:
        """The JSON object of schema 1."""
        return self.model_dump(mode="json", by_alias=True)

    def save(self, path: str | Path) -> Path:
        """Write the plan to a file, or to `plan.json` in an existing folder. Returns the file."""
        path = Path(path)
        if path.is_dir():
            path = path / PLAN_FILE
        # A line a list of indices keeps the file readable and diffs small.
        text = re.sub(r"\[[\s\d,]*\]", lambda found: " ".join(found[0].split()), json.dumps(self.to_json(), indent=1))
        write_text(path, text + "\n")
        return path

    @property
    def schedules(self) -> dict[str, tuple[int, ...]]:
        """The token schedule of every stream."""
        return {name: stream.schedule for name, stream in self.streams.items()}

    def with_tokens(self, stream: str, tokens: list[int] | tuple[int, ...]) -> Plan:
        """The same plan with another token schedule in one stream (validated)."""
        streams = dict(self.streams)
        streams[stream] = stream_plan(streams[stream].layers, tokens)
        return self.model_copy(update={"streams": streams})


def plan_of(model: Any) -> Plan | None:
    """The plan that a model was pruned to; None for a dense one."""
    return getattr(model, PLAN_ATTRIBUTE, None)


def stream_plan(layers: Sequence[LayerPlan], schedule: Sequence[int]) -> StreamPlan:
    """A stream's plan from its layers and its token schedule (see `StreamPlan.schedule`), validated."""
    count = len(layers)
    delivered = schedule[count] if len(schedule) == count + 1 else None
    tokens = schedule if delivered is None else schedule[:count]
    return StreamPlan(layers=tuple(layers), tokens=tuple(tokens), delivered=delivered)
