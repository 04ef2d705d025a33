"""Does a pruned model run as much faster in eager PyTorch as its multiply-accumulates promise?"""

from __future__ import annotations

import copy
import inspect
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from comp_edge.cost import MacsCost
from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.plan import Plan
from comp_edge.proposals import Limits, Proposer
from comp_edge.state import State
from comp_edge.surgery import apply_plan
from comp_edge.tasks.packing import model_inputs
from comp_edge.units import sites

STEP = 0.02  # share of the dense cost that one mode saves before the next one has its turn


def spread_plan(model: Any, *, keep: float, state: State, seed: int = 0) -> Plan:
    """A plan at a share of the MACs that takes from all modes in turn, units at random: for time, it is all the same.

    Widths are rounded as by default, and a stage's bounds hold for each step.

    Raises:
        InputError: the modes together cannot reach the share.
    """
    family = family_of(model)
    streams = family.streams(model)
    cost = MacsCost(model)
    dense = cost.predict(state.plan())
    proposer = Proposer(family, model, streams, cost=cost, dense=dense, limits=Limits())
    modes = family.modes(model)
    if keep < (lowest := proposer.lowest(state, modes)):
        raise InputError(f"keeping {keep} of the MACs was asked for; the lowest that can be reached is {lowest:.4f}.")
    generator = torch.Generator().manual_seed(seed)
    scores = {site: torch.rand(len(state.alive[site]), generator=generator) for site in sites(streams)}
    points = {name: itertools.cycle(stream.drop_points) for name, stream in streams.items() if stream.drop_points}
    while (now := proposer.price(state)) > keep:
        before = now
        for mode in modes:
            stream, what = mode.rsplit("_", 1)
            goal = min(STEP, proposer.price(state) - keep)
            if goal <= 0:
                break
            if what == "params":
                options = {"streams": [stream], "goal": goal, "per_cost": False}
                proposal = proposer.parameters(state, scores, **options)
            else:
                proposal = proposer.tokens_from_layer(state, stream=stream, layer=next(points[stream]), goal=goal)
            state = state if proposal is None else proposal.state
        if proposer.price(state) >= before:
            raise InputError(f"the modes stop at {before:.4f} of the MACs; keeping {keep} was asked for.")
    return Plan.parse(state.plan().to_json())


@torch.no_grad()
def measure(
    dense: Any, inputs: dict[str, torch.Tensor], *, keep: float, rounds: int, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Forward latency of a model before and after `spread_plan`, in turns, one thread.

    Args:
        dense: as transformers loads it.
        inputs: of one request.

    Returns:
        milliseconds (medians), `speedup` (the median of the rounds' ratios), `ideal` (the ratio of MACs) and their ratio.
    """
    family = family_of(dense)
    state = State.of(dense, base="", request=family.request(dense, inputs))
    pruned, plan = copy.deepcopy(dense), spread_plan(dense, keep=keep, state=state)
    apply_plan(pruned, plan)
    cost = MacsCost(dense)
    macs = cost.predict(state.plan()), cost.predict(plan)
    given = model_inputs(dense, inputs)
    if "logits_to_keep" in inspect.signature(dense.forward).parameters:
        given["logits_to_keep"] = 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: list[tuple[float, float]] = []
    try:
        for round_ in range(-1, rounds):  # the first warms up
            pair = _milliseconds(dense, given), _milliseconds(pruned, given)
            if round_ >= 0:
                times.append(pair)
                progress(round_ + 1, rounds)
    finally:
        torch.set_num_threads(threads)
    speedup, ideal = statistics.median(a / b for a, b in times), macs[0] / macs[1]
    return {
        "macs": {"dense": macs[0], "pruned": macs[1]},
        "dense_ms": statistics.median(a for a, _ in times),
        "pruned_ms": statistics.median(b for _, b in times),
        "speedup": speedup,
        "ideal": ideal,
        "efficiency": speedup / ideal,
        "spread": [min(a / b for a, b in times), max(a / b for a, b in times)],
        "rounds": rounds,
        "tokens": plan.schedules,
    }


def _milliseconds(model: Any, given: dict[str, Any]) -> float:
    started = time.perf_counter()
    model(**given)
    return (time.perf_counter() - started) * 1e3
