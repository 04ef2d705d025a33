"""`comp-edge bench method`: what a command line means, and what is made of numbers. Nothing is pruned here."""

from __future__ import annotations

import itertools
import json
import math
import statistics as standard
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from comp_edge import strategy
from comp_edge.bench.method.attribution import Pricing, changed_modes, removed_by_mode, shapley
from comp_edge.bench.method.cell import CountingTask, Ledger, UnequalBudget
from comp_edge.bench.method.grid import (
    DEFAULT_TASKS,
    Cell,
    Target,
    default_models,
    grid,
    parse_target,
    seed_pairs,
    slug,
)
from comp_edge.bench.method.pictures import pictures
from comp_edge.bench.method.results import KEYS, load_cells, write_pictures, write_results
from comp_edge.bench.method.statistics import differences, paired_difference, spread, summary
from comp_edge.bench.method.table import table
from comp_edge.cost import MacsCost
from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.options import flat, parse_method
from comp_edge.proposals import Limits, Proposer
from comp_edge.settings import PruneConfig
from comp_edge.state import State
from comp_edge.tasks.vqa import VQATask
from tests.families import case_named

BASE = PruneConfig(total_steps=100)

# ---- the grid


def test_what_a_cell_depends_on_is_json_in_one_level() -> None:
    values = flat(BASE)
    assert values["steps"] == 100 and values["explore"] == BASE.mps.explore and "mps" not in values
    assert json.loads(json.dumps(values)) == values
    cells = [Cell(Target("m", "m", "t"), parse_method(label, base=BASE), 0.5, 0, 0) for label in ("params", "comp")]
    assert [cell.options(None)["cip"] for cell in cells] == [False, True]  # resolved, not as it was left open


def test_models_and_their_tasks(tmp_path: Path) -> None:
    own = parse_target("llava-digits", dense=None)
    assert (
        own == parse_target("llava-digits@digit_vqa", dense=None) == Target("llava-digits", "llava-digits", "digit_vqa")
    )
    other = parse_target("llava-digits@easy_vqa", dense=None)
    assert other.label == "llava-digits@easy_vqa" and other.task == "easy_vqa"
    assert set(default_models()) <= set(DEFAULT_TASKS) and "llava-digits" in default_models()
    with pytest.raises(
        InputError, match="unknown model 'lava': give one of .*llava-digits.*, or with --dense a folder"
    ):
        parse_target("lava", dense=None)
    with pytest.raises(InputError, match="unknown task 'vqa'"):
        parse_target("llava-digits@vqa", dense=None)
    (tmp_path / "mine-0").mkdir()
    (tmp_path / "mine-0" / "config.json").touch()
    with pytest.raises(InputError, match="model 'mine' has no task of its own; give mine@TASK"):
        parse_target("mine", dense=tmp_path)


def test_seeds_pair_up_or_cross() -> None:
    assert seed_pairs([0, 1, 2], None, cross=False) == [(0, 0), (1, 1), (2, 2)]
    assert seed_pairs([0, 1], [5, 7], cross=False) == [(0, 5), (1, 7)]
    crossed = seed_pairs([0, 1, 2], None, cross=True)
    assert sorted(crossed) == list(itertools.product(range(3), repeat=2))
    for k in (1, 2, 3):  # every beginning of k * k is complete in k seeds
        assert set(crossed[: k * k]) == set(itertools.product(range(k), repeat=2))
    assert len(seed_pairs([4], [0, 1, 2], cross=True)) == 3
    with pytest.raises(InputError, match="2 dense seeds and 1 pruning seeds make no pairs"):
        seed_pairs([0, 1], [0], cross=False)


def test_cells_come_seed_by_seed_and_have_names_of_their_own() -> None:
    targets = [Target("a", "a", "t"), Target("a@u", "a", "u")]
    methods = [parse_method(label, base=BASE) for label in ("params", "comp", "comp:cip=no")]
    cells = grid(targets, methods, [0.5, 0.7], [(0, 0), (1, 1)], test_examples=None)
    assert len({cell.key for cell in cells}) == len(cells) == 2 * 3 * 2 * 2
    assert [cell.dense_seed for cell in cells] == [0] * 12 + [1] * 12
    assert len({(cell.target, cell.reduction, cell.method.label) for cell in cells[:12]}) == 12


@given(st.sets(st.text(st.characters(codec="utf-8"), max_size=12), min_size=2))
def test_file_names_differ_where_labels_do(texts: set[str]) -> None:
    slugs = [slug(text) for text in texts]
    assert len(set(slugs)) == len(slugs)
    assert not any(set(name) & set('/\\:*?"<>| ') for name in slugs)


# ---- statistics

SCORES = st.lists(st.floats(0, 1, width=32), min_size=2, max_size=9)


@given(SCORES)
def test_mean_and_deviation(values: list[float]) -> None:
    found = spread(values)
    assert found.mean == pytest.approx(standard.fmean(values)) and found.n == len(values)
    assert found.std == pytest.approx(standard.stdev(values), abs=1e-9)
    single = spread(values[:1])
    assert single.mean == values[0] and math.isnan(single.std)


@given(SCORES, SCORES, st.floats(-1, 1, width=32))
def test_paired_differences(first: list[float], second: list[float], shift: float) -> None:
    n = min(len(first), len(second))
    ours, theirs = ({i: v for i, v in enumerate(values[:n])} for values in (first, second))
    found = paired_difference(ours | {"alone": 0.3}, theirs | {"other": 0.9})
    gaps = np.subtract(first[:n], second[:n])
    assert found.n == n and found.mean == pytest.approx(gaps.mean(), abs=1e-9)
    assert found.error == pytest.approx(scipy.stats.sem(gaps), abs=1e-9)
    reverse = paired_difference(theirs, ours)
    assert reverse.mean == pytest.approx(-found.mean) and reverse.error == pytest.approx(found.error)
    # What a seed does to both of a pair alike does not count.
    moved = paired_difference({k: v + shift for k, v in ours.items()}, {k: v + shift for k, v in theirs.items()})
    assert moved.mean == pytest.approx(found.mean, abs=1e-7) and moved.error == pytest.approx(found.error, abs=1e-7)
    if found.error > 1e-6:
        assert found.errors == pytest.approx(scipy.stats.ttest_rel(first[:n], second[:n]).statistic, rel=1e-4)


def test_pairs_that_are_none() -> None:
    assert paired_difference({0: 0.5}, {1: 0.4}) is None
    one = paired_difference({0: 0.5}, {0: 0.4})
    assert one.mean == pytest.approx(0.1) and math.isnan(one.error) and math.isnan(one.errors)
    assert math.isnan(paired_difference({0: 1.0, 1: 1.0}, {0: 0.5, 1: 0.5}).errors)


def cell(
    method: str, seed: int, score: float, *, model: str = "m", reduction: float = 0.5, **more: Any
) -> dict[str, Any]:
    """A finished cell."""
    return {
        "model": model, "task": "t", "strategy": method, "reduction": reduction, "score": score, "dense_score": 0.99,
        "val_score": score, "dense_seed": seed, "prune_seed": seed, "steps": 100, "samples": 9600,
        "selection_seconds": 3.0, "training_seconds": 10.0, "scoring_seconds": 1.0, "peak_memory_bytes": 5 << 20,
        "macs": 50, "dense_macs": 100, "stages": 7, "modes": {"vision_params": 0.2, "vision_tokens": 0.31},
        "options": {"steps": 100}, **more,
    }  # fmt: skip


CELLS = [
    cell("comp", 0, 0.80), cell("comp", 1, 0.84), cell("comp", 2, 0.7), cell("probe", 0, 0.90), cell("probe", 1, 0.96),
    cell("comp:cip=no", 0, 0.81), cell("comp", 0, 0.3, reduction=0.85), cell("probe", 0, 0.5, reduction=0.85),
    cell("comp", 0, 0.1, model="n"),
]  # fmt: skip


def test_cells_are_summed_up_by_model_method_and_reduction() -> None:
    rows = summary(CELLS)
    assert rows["m", "comp", 0.5].n == 3 and rows["m", "comp", 0.5].mean == pytest.approx(0.78)
    assert [key[1] for key in rows if key[0] == "m" and key[2] == 0.5] == ["comp", "comp:cip=no", "probe"]
    found = differences(CELLS, ours="probe")
    assert set(found) == {("m", "comp", 0.5), ("m", "comp:cip=no", 0.5), ("m", "comp", 0.85)}
    pair = found["m", "comp", 0.5]
    assert pair.n == 2 and pair.mean == pytest.approx(0.11) and pair.error == pytest.approx(0.01)
    assert pair.errors == pytest.approx(11)
    assert differences(CELLS, ours="joint") == {}


def test_the_table_says_what_was_found() -> None:
    failure = {
        **{k: CELLS[0][k] for k in ("model", "dense_seed", "prune_seed")},
        "strategy": "tokens",
        "reduction": 0.85,
    }
    failure |= {"kind": "refused", "reason": "the lowest | is 0.2."}
    text = table(CELLS, failures=[failure], ours="probe", command="comp-edge bench method m n")
    lines = text.splitlines()
    assert "comp-edge bench method m n" in lines and "## m" in lines and "## n" in lines
    assert "| `comp` | 0.780 \u00b1 0.072 (3) | 0.300 \u00b1 \u2013 (1) |" in lines
    assert "| 50 % | `comp` | +0.1100 | 0.0100 | +11.0 | 2 |" in lines
    assert "| 85 % | `comp` | +0.2000 | \u2013 | \u2013 | 1 |" in lines
    assert "| m | `tokens` | 85 % | 0/0 | refused | the lowest \\| is 0.2. |" in lines
    assert any(line.startswith("| `probe` | 10.0 s | 3.0 s | 1.0 s | 0.30 | 0.10 | 7.0 |") for line in lines)
    assert "100 optimizer steps, 9,600 samples" in text


def test_results_are_made_of_the_cells_alone(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    for i, value in enumerate(CELLS):
        (tmp_path / "cells" / f"{i}.json").write_text(json.dumps({**value, "trace": [1]}))
    failure = {
        **{k: CELLS[0][k] for k in ("model", "dense_seed", "prune_seed")},
        "strategy": "tokens",
        "reduction": 0.5,
    }
    gone = {**CELLS[0], "kind": "failed", "reason": "?"}  # it is finished by now
    first = write_results(
        tmp_path, ours="probe", command="c", failures=[failure | {"kind": "refused", "reason": "."}, gone]
    )
    assert [f["strategy"] for f in first["failures"]] == ["tokens"]
    assert len(first["cells"]) == len(CELLS) and all(set(KEYS) <= set(c) and "trace" not in c for c in first["cells"])
    assert write_results(tmp_path, ours="probe") == first == json.loads((tmp_path / "results.json").read_text())
    for command, lines in (("d", "c\nd"), ("c", "c\nd")):
        more = write_results(tmp_path, ours="probe", command=command, failures=[])
        assert more["command"] == lines and more["failures"] == first["failures"], "of the runs before"
    assert len(load_cells(tmp_path)) == len(CELLS)
    drawn = write_pictures(tmp_path, ours="probe")
    assert [path.name for path in drawn] == ["accuracy.png", "modes.png", "selection.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    (tmp_path / "cells" / "0.json").write_text("{}")
    with pytest.raises(InputError, match=r"0.json' lacks 'model'; delete it to have it run again"):
        load_cells(tmp_path)


def test_pictures_of_many_methods_and_of_one_cell() -> None:
    assert pictures([], ours="probe") == {}
    assert len(pictures(CELLS[:1], ours="probe")) == 3
    many = [cell(f"comp:stages={i}", 0, 0.5) for i in range(14)]
    assert len(pictures(many, ours="probe")) == 3


# ---- which mode removed what


def pruned(model: Any, inputs: Any, moves: list[tuple[str, str]]) -> tuple[State, list[State], Proposer]:
    """The states after each move: (stream, "params"), or (stream, "tokens"); one after the other."""
    family = family_of(model)
    streams = family.streams(model)
    start = State.of(model, base="", request=family.request(model, inputs))
    cost = MacsCost(model)
    proposer = Proposer(family, model, streams, cost=cost, dense=cost.predict(start.plan()), limits=Limits(round_to=8))
    states = [start]
    for stream, what in moves:
        state = states[-1]
        if what == "params":
            scores = {site: torch.rand(len(mask)) for site, mask in state.alive.items()}
            found = proposer.parameters(state, scores, streams=[stream], goal=0.05, per_cost=False)
        else:
            layer = streams[stream].drop_points[0]
            found = proposer.tokens_from_layer(state, stream=stream, layer=layer, goal=0.05)
        states.append(found.state)
    return start, states, proposer


CASES = {
    "llava": [("vision", "tokens"), ("language", "params"), ("language", "tokens"), ("vision", "params")],
    "blip-vqa": [("vision", "tokens"), ("cross", "params"), ("vision", "params"), ("language", "params")],
    "clip": [("vision", "params"), ("vision", "tokens"), ("language", "params")],
}


@pytest.mark.parametrize("name", CASES)
def test_shares_add_up_to_what_was_saved(name: str) -> None:
    case = case_named(name)
    model = case.model()
    start, states, proposer = pruned(model, case.inputs([0], prompt_lengths=14), CASES[name])
    price, records = Pricing(model, start), [state.to_json() for state in states]
    for state, record in zip(states, records, strict=True):
        assert price(record) == pytest.approx(proposer.price(state))
    follows = start.follows
    # One move a stage: each is the doing of its mode alone, also where fewer image tokens shorten the language stream.
    for move, before, after in zip(CASES[name], records, records[1:], strict=False):
        assert changed_modes(before, after, follows=follows) == ["_".join(move)]
    single = removed_by_mode(records[0], [{"plan": r} for r in records[1:]], price=price, follows=follows)
    steps = {"_".join(m): price(a) - price(b) for m, a, b in zip(CASES[name], records, records[1:], strict=False)}
    assert single == pytest.approx(steps)
    # All moves in one stage: shares between what a change saves first and what it saves last, and the same sum.
    together = shapley(records[0], records[-1], price=price, follows=follows)
    assert set(together) == set(steps) and all(share > 0 for share in together.values())
    assert sum(together.values()) == pytest.approx(1 - price(records[-1])) == pytest.approx(sum(steps.values()))


def test_two_modes_share_what_they_save_together() -> None:
    """With a price that is a product, each gets what it saves alone, averaged over coming first and coming second."""
    layers = [{"heads": [0, 1], "ffn": [0, 1, 2, 3]}]
    before = {"vision": {"layers": layers, "tokens": [10]}, "language": {"layers": layers, "tokens": [20]}}
    after = {"vision": {"layers": layers, "tokens": [5]},
             "language": {"layers": [{"heads": [0], "ffn": [0, 1, 2, 3]}], "tokens": [15]}}  # fmt: skip

    def price(record: Any) -> float:
        return len(record["language"]["layers"][0]["heads"]) * record["language"]["tokens"][0] / 40

    shares = shapley(before, after, price=price, follows={})
    assert shares == pytest.approx({"language_params": (0.5 + 0.375) / 2, "vision_tokens": (0.25 + 0.125) / 2})


# ---- what was taken


def test_only_rows_that_gradients_are_computed_on_count(tiny_model: Any, tiny_task: Any) -> None:
    counting = CountingTask(tiny_task)
    assert isinstance(counting, VQATask) and counting.name == tiny_task.name and hasattr(counting, "targets")
    assert not hasattr(counting, "no_such_thing")
    first, second = itertools.islice(counting.train_batches(0), 2)
    tiny_model.train()
    counting.loss(tiny_model, first)
    counting.logits(tiny_model, first)  # an objective may look twice
    assert counting.taken() == len(first["image_ids"]) == 12
    counting.loss(tiny_model, first)
    counting.logits(tiny_model, second)
    assert counting.taken() == 24 and counting.taken() == 0
    with torch.no_grad():
        counting.logits(tiny_model, first)
    tiny_model.eval()
    counting.loss(tiny_model, second)
    counting.score(tiny_model, [first])
    assert counting.taken() == 0


def test_the_ledger_counts_repeated_steps_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "rows", limit=4)
    for step, rows in ((1, 6), (2, 6), (3, 5), (3, 6), (4, 6)):
        ledger.book(step, rows)
    assert ledger.total() == (4, 24)
    (tmp_path / "rows").write_text((tmp_path / "rows").read_text() + "[4, ")  # killed while writing
    assert ledger.total() == (4, 24)
    with pytest.raises(UnequalBudget, match="step 5 was taken; every cell of this run takes 4"):
        ledger.book(5, 6)
    with pytest.raises(UnequalBudget, match="0 optimizer steps were counted; every cell of this run takes 4"):
        Ledger(tmp_path / "none", limit=4).total()


def test_all_strategies_are_known_to_the_order() -> None:
    cells = [cell(name, 0, 0.5) for name in reversed(strategy.STRATEGIES)]
    assert [key[1] for key in summary(cells)] == list(strategy.STRATEGIES)
