"""The CoMP pass: prune parameters and tokens together, stage by stage, until the model meets its budget."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from comp_edge.budget import Budget
from comp_edge.precision import fast_products
from comp_edge.session import Session
from comp_edge.settings import Progress, PruneConfig, PruneResult
from comp_edge.tasks import Task


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
        model: a transformers model of a supported family, dense or pruned before; it becomes the pruned model. The budget
            is a share of what this model costs.
        task: data, loss and score (see `comp_edge.tasks.Task`). Only its training and validation batches steer.
        strategy: "comp", the paper's MPS with CIM, or "probe", which walks short ways to the budget first.
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
    processor = processor if processor is not None else getattr(task, "processor", None)
    with nullcontext() if session.config.trains else fast_products(model):
        if resume:
            session.resume(evaluate=evaluate)
        else:
            session.start(evaluate=evaluate)
        session.advance()
        session.finish()
        return session.save(processor, evaluate=evaluate)
