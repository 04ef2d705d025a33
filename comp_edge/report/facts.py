"""What a pruned model folder tells about itself, read and checked."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from comp_edge.checkpoint import WEIGHTS_FILE, load_pretrained
from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.files import read_json
from comp_edge.plan import PLAN_FILE, Plan
from comp_edge.report.latency import Measured, OnDevice
from comp_edge.session import METRICS_FILE, TRACE_FILE
from comp_edge.structure import empty_model
from comp_edge.units import dense_plan, request_of

Share = Annotated[FiniteFloat, Field(ge=0)]
Kind = TypeVar("Kind", bound=BaseModel)


class Way(BaseModel):
    """A short way to the budget that was walked for trial: tokens' share of what it saved, and the loss at its end."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    tokens: Annotated[FiniteFloat, Field(ge=0, le=1)]
    loss: FiniteFloat | None  # None where it diverged, or did not get there


class Stage(BaseModel):
    """One line of `trace.jsonl`: what one stage did, and why. Prices may be infinite (a candidate that diverged)."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    stage: Annotated[int, Field(ge=1)]
    mode: str
    also: tuple[str, ...] = ()
    why: str
    costs: dict[str, float] = {}
    walks: tuple[Way, ...] = ()
    token_share: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    score: FiniteFloat
    loss: float | None  # None where nothing was trained
    cost_fraction: Share
    macs: Share
    predicted_ms: Share | None = None  # None where the cost is not in milliseconds
    saved: float
    seconds: Share


class Side(BaseModel):
    """Numbers of the dense or of the pruned model in `metrics.json`."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    val_score: FiniteFloat
    test_score: FiniteFloat | None = None
    macs: Annotated[FiniteFloat, Field(gt=0)]
    macs_by_part: dict[str, Share]


class Metrics(BaseModel):
    """`metrics.json`.

    Attributes:
        measured: plans that met the budget by prediction, where the cost could be measured.
        device: what the cost tells about itself, where it does.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    strategy: str
    seed: int
    steps: Annotated[int, Field(ge=0)]
    dense: Side
    pruned: Side
    measured: tuple[Measured, ...] = ()
    device: OnDevice | None = None
    seconds: dict[str, Share] = Field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """Everything that the report says of a folder, apart from sample images and verification.

    Attributes:
        dense: the plan that keeps everything, of the same model and reference prompt.
        parameters, weights_bytes: dense and pruned.
        model: the pruned model, ready to run.
    """

    folder: Path
    plan: Plan
    dense: Plan
    metrics: Metrics
    trace: tuple[Stage, ...]
    parameters: tuple[int, int]
    weights_bytes: tuple[int, int]
    model: Any

    @property
    def title(self) -> str:
        """What to call the model."""
        return Path(self.plan.base).name or self.plan.model_type

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that ran or were priced, in the family's order."""
        named = {name for stage in self.trace for name in (stage.mode, *stage.costs)}
        return tuple(mode for mode in known_modes(self.model) if mode in named)


def read_facts(folder: str | Path) -> Facts:
    """Read a pruned model folder.

    Raises:
        InputError: no pruned model folder, or one whose plan, trace, metrics or weights are missing or malformed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is not a folder; give the folder that `comp-edge prune` wrote.")
    for name in (PLAN_FILE, TRACE_FILE, METRICS_FILE):
        if not (folder / name).is_file():
            raise InputError(f"{str(folder)!r} has no {name}; give the folder that `comp-edge prune` wrote.")
    # The small files first: they are quick to refuse.
    plan = Plan.load(folder)
    metrics = _validated(
        Metrics, read_json(folder / METRICS_FILE, what="metrics"), f"metrics {str(folder / METRICS_FILE)!r}"
    )
    trace = read_trace(folder / TRACE_FILE)
    model = load_pretrained(folder)
    _check_modes(trace, known_modes(model), folder / TRACE_FILE)
    whole = empty_model(copy.deepcopy(model.config))
    pruned = list(model.parameters())
    counts = sum(p.numel() for p in whole.parameters()), sum(p.numel() for p in pruned)
    return Facts(
        folder=folder,
        plan=plan,
        dense=dense_plan(whole, request=request_of(model, plan), base=plan.base),
        metrics=metrics,
        trace=trace,
        parameters=counts,
        weights_bytes=(counts[0] * pruned[0].element_size(), (folder / WEIGHTS_FILE).stat().st_size),
        model=model,
    )


def read_trace(path: Path) -> tuple[Stage, ...]:
    """The stages of a trace.

    Raises:
        InputError: unreadable, empty, or a line that is not a stage; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"trace {str(path)!r} cannot be read: {error}.") from None
    stages = []
    for number, line in enumerate(lines, 1):
        where = f"trace {str(path)!r} line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not valid JSON ({error}).") from None
        stages.append(_validated(Stage, value, where))
    if not stages:
        raise InputError(f"trace {str(path)!r} is empty; it must have one line a stage.")
    return tuple(stages)


def read_verification(path: str | Path) -> Mapping[str, Any]:
    """The JSON object that `comp-edge demo --json` printed.

    Raises:
        InputError: missing, not JSON, or not an object.
    """
    value = read_json(path, what="verification")
    if not isinstance(value, dict):
        raise InputError(f"verification {str(path)!r} must hold a JSON object, got {type(value).__name__}.")
    return value


def _validated(kind: type[Kind], value: Any, where: str) -> Kind:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{where}: {place + ': ' if place else ''}{first['msg']}.") from None


def known_modes(model: Any) -> tuple[str, ...]:
    """The modes of a model, and those that the baselines have of all its streams together."""
    return (*family_of(model).modes(model), "params", "tokens")


def _check_modes(trace: tuple[Stage, ...], modes: tuple[str, ...], path: Path) -> None:
    for number, stage in enumerate(trace, 1):
        for name in (stage.mode, *stage.costs):
            if name not in modes:
                raise InputError(
                    f"trace {str(path)!r} line {number} speaks of mode {name!r}; the model has {', '.join(modes)}."
                )
