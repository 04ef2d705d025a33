"""The plan: everything that a pruning decided, as versioned JSON (schema 1)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from comp_edge.errors import InputError
from comp_edge.files import read_json, write_text

PLAN_FILE = "plan.json"
Index = Annotated[int, Field(ge=0)]


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
    tokens: tuple[Annotated[int, Field(ge=1)], ...]

    @model_validator(mode="after")
    def _schedule(self) -> StreamPlan:
        if len(self.tokens) != len(self.layers):
            raise ValueError(f"tokens has {len(self.tokens)} entries for {len(self.layers)} layers")
        for layer, (before, after) in enumerate(zip(self.tokens, self.tokens[1:], strict=False)):
            if after > before:
                raise ValueError(f"tokens must not rise: {before} in layer {layer}, {after} in layer {layer + 1}")
        return self


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
        # One line a stream and layer list keeps the file readable and diffs small.
        write_text(path, json.dumps(self.to_json(), indent=1) + "\n")
        return path

    def with_tokens(self, stream: str, tokens: list[int] | tuple[int, ...]) -> Plan:
        """The same plan with another token schedule in one stream (validated)."""
        streams = dict(self.streams)
        streams[stream] = StreamPlan(layers=streams[stream].layers, tokens=tuple(tokens))
        return self.model_copy(update={"streams": streams})
