"""Whether a pass can be what it was asked to be, told before it begins: its modes, budget, data and score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from comp_edge.errors import InputError
from comp_edge.families.base import Family
from comp_edge.proposals import Proposer
from comp_edge.state import State
from comp_edge.strategy import strategy_modes
from comp_edge.tasks.pairs import PairTask
from comp_edge.tasks.vqa import VQATask

STOCK_LACKS = "language_tokens"  # a stock runtime prefills the image on its own, before it knows the question
MEANINGLESS = ("synthetic",)  # tasks that are there to measure time and memory, whatever they score


def usable_modes(
    family: Family, model: Any, *, strategy: str, wanted: Sequence[str] | None, deploy: str
) -> tuple[list[str], list[str]]:
    """The modes that may run, and all that could for this deployment.

    Args:
        wanted: what the user allows; None for all.

    Raises:
        InputError: the model lacks a mode that is wanted, or none is left.
    """
    known = list(family.modes(model))
    for mode in wanted or ():
        if mode not in known:
            raise InputError(f"mode {mode!r} is not one of the model's: {', '.join(known)}{_why(family, model, mode)}.")
    possible = [mode for mode in known if not (deploy == "stock" and mode == STOCK_LACKS)]
    modes = strategy_modes(strategy, [mode for mode in possible if wanted is None or mode in wanted])
    if not modes:
        stock = f", without {STOCK_LACKS} as 'stock' is to be deployed" if deploy == "stock" else ""
        raise InputError(
            f"strategy {strategy!r} finds no mode to use; the model has {', '.join(known)}, of which "
            f"{', '.join(wanted or ['all'])} may run{stock}."
        )
    return modes, possible


def _why(family: Family, model: Any, mode: str) -> str:
    """Why a stream that the model has cannot drop tokens."""
    name, _, what = mode.rpartition("_")
    stream = family.streams(model).get(name)
    if stream is None or what != "tokens" or stream.follows:
        return ""
    layers = len(stream.layers)
    return f" (tokens are dropped between layers, and stream {name!r} has one)" if layers == 1 else ""


def check_reachable(
    proposer: Proposer, state: State, modes: Sequence[str], possible: Sequence[str], *, target: float
) -> None:
    """Whether the modes can reach a cost together.

    Args:
        possible: those that could run if they were allowed to (see `usable_modes`).
        target: as a fraction of the dense cost.

    Raises:
        InputError: they cannot; says how far they can go, how far all modes can, and which mode could reach it alone.
    """
    lowest = proposer.lowest(state, modes)
    if target >= lowest:
        return
    more = ""
    if set(possible) > set(modes):
        more = f"; all modes together can reach {proposer.lowest(state, possible):.4f}"
        alone = [(mode, cost) for mode in possible if (cost := proposer.lowest(state, [mode])) <= target]
        if alone:
            more += ", " + " and ".join(f"{mode} alone {cost:.4f}" for mode, cost in alone)
    raise InputError(
        f"the budget asks for {target:.4f} of the dense cost; the lowest that {', '.join(modes)} can reach is "
        f"{lowest:.4f}{more}{_narrow(proposer)}."
    )


def _narrow(proposer: Proposer) -> str:
    """What a small model's streams cannot give up."""
    notes = []
    for name, stream in proposer.streams.items():
        if len(stream.layers) == 1 and not stream.follows:
            notes.append(f"stream {name!r} has one layer, so that no tokens are dropped in it")
        if stream.layers[0].attn is not None and stream.layers[0].attn.heads == 1:
            notes.append(f"the first layer of stream {name!r} keeps its only head")
    return f" ({'; '.join(notes)})" if notes else ""


def check_splits(task: Any) -> None:
    """Whether there is anything to train on and to steer by.

    Raises:
        InputError: the training or the validation split of a built-in kind of task is empty. (Of other tasks their
            batches tell.)
    """
    if isinstance(task, VQATask | PairTask):
        for split, needed in (("val", NO_VALIDATION), ("train", NO_TRAINING)):
            if not task.split(split).questions:
                raise InputError(needed)


NO_VALIDATION = "the task has no validation batches; they are what steers the pruning."
NO_TRAINING = "the task has no training batches; they are what units and tokens are ranked by."


def check_score(
    task: Any, *, dense: float, ruined: Callable[[], float], losses: Callable[[], tuple[float, float]]
) -> None:
    """Whether the task's score can tell a good model from a bad one.

    A score that is the same whatever the model says cannot steer MPS, and no result that is reported with it means
    anything. One pass over the validation split finds out: it is scored once more with every unit masked that could be
    pruned, which no model survives. An equal score is a constant one, or that of a model that has nothing to lose; either
    way pruning has nothing to go by. Two cases are let pass: tasks that say of themselves that their scores mean nothing,
    and a score of 0 by a model whose loss is hardly better than that of its ruin, which is a model with random weights,
    pruned to see what it costs.

    Args:
        dense: validation score of the model as it is.
        ruined: computes it with all units masked.
        losses: computes the losses of the two on a training batch, model first.

    Raises:
        InputError: the score is constant.
    """
    name = getattr(task, "name", type(task).__name__)
    if name in MEANINGLESS or ruined() != dense:
        return
    if dense == 0:
        whole, ruin = losses()
        if not whole < ruin / 2:
            return
    raise InputError(
        f"the validation score of task {name!r} is {dense:.4f} for the model and also without any of its heads and "
        "channels: such a score cannot steer the pruning; give a task whose score depends on the model's answers."
    )
