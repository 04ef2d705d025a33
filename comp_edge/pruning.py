"""The CoMP pass: prune parameters and tokens together, stage by stage, until the model meets its budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comp_edge.budget import Budget
from comp_edge.importance import Norm
from comp_edge.plan import Plan
from comp_edge.strategy import MPSConfig
from comp_edge.tasks import Task


@dataclass(frozen=True)
class PruneConfig:
    """How a pass is run. The defaults are for models that train in minutes on a CPU.

    Attributes:
        stages: how many stages the way to the budget is divided into.
        stage_steps: optimizer steps of a stage; masks fade over the first two thirds.
        final_steps: optimizer steps after the plan is frozen, on the shrunk model.
        lr, matrix_lr: peak learning rates of AdamW and Muon.
        val_examples: validation examples that score a stage.
        calibration_batches: training batches for importance, and as many others for looking ahead.
        modes: which modes may run; None for all of the family.
        cip, cit: token-weighted parameter importance, mask-corrected token importance.
        token_norm: Norm of S^t.
        distill: weight of the dense model's logits in the objective; 0 trains on the task's loss alone.
        round_to: widths are multiples of this where the layer is wide enough.
        stage_share: at most this fraction of a sub-layer or of a layer's tokens goes in one stage.
        mps: constants of MPS.
    """

    stages: int = 16
    stage_steps: int = 20
    final_steps: int = 400
    lr: float = 5e-4
    matrix_lr: float = 1.5e-3
    val_examples: int = 500
    calibration_batches: int = 2
    modes: tuple[str, ...] | None = None
    cip: bool = True
    cit: bool = True
    token_norm: Norm = "mean"
    distill: float = 0.7
    round_to: int = 32
    stage_share: float = 0.25
    mps: MPSConfig = field(default_factory=MPSConfig)


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
    """What a pass tells while it runs: done and total are optimizer steps (total is an estimate)."""

    phase: str
    done: int
    total: int
    message: str = ""


def prune(
    model: Any,
    task: Task,
    *,
    budget: Budget,
    strategy: str = "comp",
    out: str | Path | None = None,
    seed: int = 0,
    config: PruneConfig | None = None,
    processor: Any = None,
    base: str = "",
    deploy: str = "any",
    resume: bool = False,
    evaluate: bool = True,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> PruneResult:
    """Prune a model until it meets its budget; see DESIGN section 5 for the method.

    Args:
        model: a dense transformers model of a supported family; it becomes the pruned model.
        task: data, loss and score (see `comp_edge.tasks.Task`). Only its training and validation batches steer.
        strategy: "comp", the paper's MPS with CIM, or "probe", which looks one step ahead.
        out: the pruned model folder to write; while the pass runs, its checkpoint lies in a folder of that name with
            `.work` appended.
        processor: saved with the model; by default the task's.
        base: what the plan records as the dense model's name.
        deploy: "stock" confines token dropping to the vision encoder, for runtimes that prefill the image on its own.
        resume: go on from the checkpoint of a run that was interrupted.
        evaluate: score dense and pruned model on the test batches at the end.

    Raises:
        InputError: unknown strategy, unreachable budget (says the lowest cost that can be reached), a checkpoint of
            another run, an output that cannot be written.
        FloatingPointError: loss or gradient became non-finite; the checkpoint of the stage before is intact.
    """
    from comp_edge.session import Session  # it needs the classes above

    session = Session(
        model,
        task,
        budget=budget,
        strategy=strategy,
        out=out,
        seed=seed,
        config=config or PruneConfig(),
        base=base,
        deploy=deploy,
        on_progress=on_progress,
    )
    if resume:
        session.resume()
    else:
        session.start()
    session.advance()
    session.finish()
    processor = processor if processor is not None else getattr(task, "processor", None)
    return session.save(processor, evaluate=evaluate)
