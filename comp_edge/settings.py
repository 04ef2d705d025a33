"""What a pruning pass is given and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from comp_edge.errors import InputError
from comp_edge.importance import Norm
from comp_edge.plan import Plan
from comp_edge.strategy import BASELINES, MPSConfig

Importance = Literal["taylor", "fisher", "wanda", "blend"]

# The least that an option takes.
AT_LEAST = {
    "stages": 1, "stage_steps": 0, "final_steps": 0, "total_steps": 0, "val_examples": 1, "calibration_batches": 1,
    "distill": 0, "distill_hidden": 0, "accumulate": 1, "round_to": 1,
}  # fmt: skip


@dataclass(frozen=True)
class PruneConfig:
    """How a pass is run. The defaults are for models that train in minutes on a CPU.

    Attributes:
        stages: how many stages the way to the budget is divided into.
        stage_steps: optimizer steps of a stage; masks fade over the first two thirds.
        final_steps: optimizer steps after the plan is frozen, on the shrunk model. With neither, nothing is trained: no
            teacher is kept, no gradient is computed, and memory stays close to the model's own.
        total_steps: optimizer steps in all, instead of `final_steps`: what the stages, however many, leave of them is spent
            after the plan is frozen.
        importance: what ranks units: first-order Taylor or Fisher, which need gradients, structured Wanda, or a blend of
            Fisher and Wanda. By default Wanda, as in the paper, but the blend for `probe` where something is trained.
        lr, matrix_lr: peak learning rates of AdamW (by default 2e-3 beside Muon, and 5e-4 alone) and of Muon.
        muon: whether matrices are trained by Muon; by default in models of up to 50 million parameters.
        val_examples: validation examples that score a stage.
        calibration_batches: training batches for importance, and as many others that judge ways walked for trial.
        modes: which modes may run; None for all of the family.
        cip, cit: token-weighted parameter importance (of Wanda), mask-corrected token importance. By default both for
            `comp`, and the second for `probe`.
        token_norm: Norm of S^t.
        distill: weight of the dense model's logits in the objective; 0 trains on the task's loss alone.
        distill_hidden: weight of its hidden states, where tokens survive (see `recovery.Distillation`).
        accumulate: micro-batches that a training batch is cut into, for less memory; the result is the same to rounding.
        checkpointing: layers keep no activations for the backward pass, which runs them a second time.
        round_to: widths are multiples of this where the layer is wide enough.
        stage_share: at most this fraction of a sub-layer or of a layer's tokens goes in one stage.
        mps: constants of MPS.

    Raises:
        InputError: a number that makes no sense; says which numbers do.
    """

    stages: int = 16
    stage_steps: int = 3
    final_steps: int = 252
    total_steps: int | None = None
    importance: Importance | None = None
    lr: float | None = None
    matrix_lr: float = 3e-3
    muon: bool | None = None
    val_examples: int = 500
    calibration_batches: int = 2
    modes: tuple[str, ...] | None = None
    cip: bool | None = None
    cit: bool | None = None
    token_norm: Norm = "mean"
    distill: float = 0.7
    distill_hidden: float = 0.0
    accumulate: int = 1
    checkpointing: bool = False
    round_to: int = 32
    stage_share: float = 0.25
    mps: MPSConfig = field(default_factory=MPSConfig)

    def __post_init__(self) -> None:
        for name, least in AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise InputError(f"{name} {value}: give {least} or more.")
        for name in ("lr", "matrix_lr", "stage_share"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} {value}: give a number above 0.")
        if self.stage_share > 1:
            raise InputError(f"stage_share {self.stage_share}: give at most 1, all of a sub-layer.")

    @property
    def trains(self) -> bool:
        """Whether any weight changes but by removal."""
        return self.stage_steps + (self.final_steps if self.total_steps is None else self.total_steps) > 0

    @property
    def planned_steps(self) -> int:
        """Optimizer steps in all, if it takes as many stages as planned."""
        return self.stages * self.stage_steps + self.final_steps if self.total_steps is None else self.total_steps

    def sharing(self, steps: int) -> PruneConfig:
        """The same with so many optimizer steps in all: a sixth in the planned stages, the others after them.

        On `blip-digits` at 20 % of the MACs, half in the stages was worse for every strategy that was tried.
        """
        each = max(steps // 6 // self.stages, min(1, steps // self.stages))
        return replace(self, stage_steps=each, total_steps=steps)

    def steps_in(self, stage: int) -> int:
        """Optimizer steps of a stage (the first is 0): fewer where they are used up."""
        if self.total_steps is None:
            return self.stage_steps
        return min(self.stage_steps, max(0, self.total_steps - stage * self.stage_steps))

    def steps_after(self, stages: int) -> int:
        """Optimizer steps that are left for fine-tuning after so many stages."""
        if self.total_steps is None:
            return self.final_steps
        return max(0, self.total_steps - stages * self.stage_steps)

    def of(self, strategy: str) -> PruneConfig:
        """The same with what a strategy decides where nothing was given."""
        blends = strategy == "probe" and self.trains
        return replace(
            self,
            importance=self.importance or ("blend" if blends else "wanda"),
            cip=strategy == "comp" if self.cip is None else self.cip,
            cit=strategy not in BASELINES if self.cit is None else self.cit,
        )


@dataclass(frozen=True)
class PruneResult:
    """What a pass reports.

    Attributes:
        metrics: what `metrics.json` holds.
        trace: what `trace.jsonl` holds, one entry a stage.
        folder: the pruned model folder, None when none was asked for.
    """

    model: Any
    plan: Plan
    metrics: dict[str, Any]
    trace: list[dict[str, Any]]
    folder: Path | None


@dataclass(frozen=True)
class Progress:
    """What a pass tells while it runs.

    Attributes:
        done, total: optimizer steps, those of ways that are walked for trial included; the total is an estimate.
        step: optimizer steps that the result has taken.
    """

    phase: str
    done: int
    total: int
    message: str = ""
    step: int = 0
