"""`comp-edge bench ranking` measures what it says: removals are removals, and correlations are those of ranks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from comp_edge.bench.parts import dense_model
from comp_edge.bench.ranking import Course, Extent, evaluation_batches, run_course
from comp_edge.bench.ranking_statistics import agreement, fidelity, spearman
from comp_edge.bench.ranking_tokens import BASE, CIT, forks, measured_layers, rankings, take_tokens
from comp_edge.bench.ranking_units import (
    CHANNELS,
    GROUP,
    GROUPS,
    HEADS,
    Removal,
    importances,
    list_removals,
    mean_loss,
    question_losses,
    removal_changes,
    scores_of,
)
from comp_edge.budget import Budget
from comp_edge.cli import bench_ranking, common
from comp_edge.errors import InputError
from comp_edge.session import Session
from comp_edge.settings import PruneConfig
from comp_edge.surgery import apply_plan
from comp_edge.tasks.packing import take_rows
from comp_edge.units import Site
from tests import tiny
from tests.comp_edge.small_blip import make_blip, save_blip

CONFIG = PruneConfig(stages=3, stage_steps=1, val_examples=30, calibration_batches=1, round_to=8, stage_share=0.5)
EXTENT = Extent(questions=12, groups=2, channels=1, image_questions=12, tokens=3)
TASK = f"{tiny.__file__}:TinyVQA"


def session_of(model: Any, task: Any) -> Session:
    return Session(
        model, task, budget=Budget(macs=0.5), strategy="comp", out=None, seed=0, config=CONFIG, base="tiny", deploy="any",
        on_progress=lambda progress: None,
    )  # fmt: skip


@pytest.fixture
def session(tiny_model: Any, tiny_task: Any) -> Session:
    return session_of(tiny_model, tiny_task)


@pytest.fixture(scope="module")
def blip() -> tuple[Any, Any]:
    model, processor = make_blip()
    return model, tiny.TinyVQA(processor)


@pytest.fixture
def blip_session(blip: tuple[Any, Any]) -> Session:
    return session_of(copy.deepcopy(blip[0]), blip[1])


# ---- correlations


def test_a_perfect_importance_has_rho_one() -> None:
    rng = np.random.default_rng(0)
    change, layers = rng.normal(size=40), np.repeat(np.arange(4), 10)
    assert fidelity(np.exp(change), change, layers) == pytest.approx({"within": 1, "across": 1} | sizes(change, layers))
    assert spearman(-change, change) == pytest.approx(-1)
    assert agreement(np.stack([change, 2 * change], 1), layers) == pytest.approx(
        {"within": 1, "across": 1, "within_size": 1, "across_size": 1}
    )


def sizes(change: np.ndarray, layers: np.ndarray) -> dict[str, float]:
    size = np.abs(change)
    within = [spearman(change[layers == i], size[layers == i]) for i in range(4)]
    return {"within_size": float(np.mean(within)), "across_size": spearman(change, size)}


def test_layers_of_different_scale_agree_within_but_not_across() -> None:
    change = np.array([1.0, 2, 3, 10, 20, 30])
    importance = np.array([10.0, 20, 30, 1, 2, 3])
    found = fidelity(importance, change, np.array([0, 0, 0, 1, 1, 1]))
    assert found["within"] == pytest.approx(1) and found["across"] < 0


def test_what_has_no_ranks_has_no_rho() -> None:
    flat = np.ones(5)
    assert spearman(flat, np.arange(5)) is None and spearman(np.arange(2), np.arange(2)) is None
    # A layer without a rho does not count in the mean.
    found = fidelity(np.arange(8), np.array([1.0, 2, 3, 4, 5, 5, 5, 5]), np.repeat([0, 1], 4))
    assert found["within"] == pytest.approx(1)


# ---- units


def test_every_live_head_is_removed_and_channels_are_sampled(session: Session) -> None:
    state = session.state.copy()
    state.alive[Site("vision", 1, "heads")][2] = False
    state.alive[Site("vision", 0, "heads")][1:] = False  # the last head that ranks tokens stays
    state.alive[Site("vision", 2, "ffn")][:60] = False
    found = list_removals(state, session.streams, groups=3, channels=5, rng=np.random.default_rng(0))
    heads = [(r.site.stream, r.site.layer, r.units) for r in found if r.kind == HEADS]
    vision = [(layer, *units) for stream, layer, units in heads if stream == "vision"]
    assert vision == [(1, 0), (1, 1), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)]
    for site in [s for s in state.alive if s.kind == "ffn"]:
        groups = [r.units for r in found if (r.kind, r.site) == (GROUPS, site)]
        singles = [r.units for r in found if (r.kind, r.site) == (CHANNELS, site)]
        few = site == Site("vision", 2, "ffn")
        assert len(groups) == (0 if few else 3) and len(set(singles)) == (4 if few else 5)
        assert all(len(units) == GROUP and len(set(units)) == GROUP for units in groups)
        assert all(state.alive[site][list(units)].all() for units in [*groups, *singles])


def test_units_without_output_change_nothing_and_have_no_importance(session: Session) -> None:
    head, group = (
        Removal(HEADS, Site("vision", 1, "heads"), (2,)),
        Removal(GROUPS, Site("language", 0, "ffn"), tuple(range(8))),
    )
    others = [Removal(HEADS, head.site, (1,)), Removal(GROUPS, group.site, tuple(range(8, 16)))]
    with torch.no_grad():
        session.masks.sink(head.site).weight[:, 2 * 8 : 3 * 8] = 0
        session.masks.sink(group.site).weight[:, :8] = 0
    batches = evaluation_batches(session.task, 24)
    removals = [head, group, *others]
    changes = removal_changes(session.setting, session.state, removals, batches, lambda: None)
    # Other sums in another order: only rounding is left.
    assert np.abs(changes[:2]).max() < 1e-6 and np.abs(changes[2:]).min() > 1e-4
    for name, importance in importances(session.setting, session.state, np.random.default_rng(0)).items():
        scores = scores_of(removals, importance)
        assert name == "random" or (scores[:2].max() < 1e-6 and scores[2:].min() > 1e-6), name


def test_a_removal_is_what_surgery_does(blip_session: Session) -> None:
    session = blip_session
    batches = evaluation_batches(session.task, 24)
    removals = [
        Removal(HEADS, Site("cross", 1, "heads"), (3,)),
        Removal(HEADS, Site("vision", 0, "heads"), (0,)),
        Removal(CHANNELS, Site("language", 2, "ffn"), (5,)),
    ]
    changes = removal_changes(session.setting, session.state, removals, batches, lambda: None)
    before = mean_loss(session.setting, session.state, batches)
    assert before == pytest.approx(task_loss(session.model, session.task, batches), rel=1e-6)
    for removal, (change, even, odd) in zip(removals, changes, strict=True):
        state = session.state.copy()
        state.alive[removal.site][list(removal.units)] = False
        shrunk, _ = make_blip()
        apply_plan(shrunk, state.plan())
        assert task_loss(shrunk, session.task, batches) - before == pytest.approx(change, abs=1e-5)
        assert even != odd and even + odd == pytest.approx(2 * change, rel=0.3, abs=1e-2)


def task_loss(model: Any, task: Any, batches: list[Any]) -> float:
    with torch.no_grad():
        return float(np.mean([float(task.loss(model, batch)) for batch in batches]))


# ---- tokens


def test_one_token_is_dropped_of_each_image_and_no_other(blip_session: Session) -> None:
    session, layer = blip_session, 1
    batches = evaluation_batches(session.task, 12)
    seen: list[torch.Tensor] = []
    session.streams["vision"].root.register_forward_hook(lambda *_: seen.append(session.schedule.reached("vision")))
    options = {"count": 5, "lift": False, "rng": np.random.default_rng(0)}
    taken = take_tokens(session.setting, session.state, batches, layer, **options)
    assert taken.changes.shape == (4, 5, 3) and not forks(session.state, layer)
    gone = [(~reached).nonzero() for reached in seen[2:]]  # after those that look
    assert all(g[:, 0].tolist() == [0, 1, 2, 3] for g in gone)  # one of each image
    columns = torch.stack([g[:, 1] for g in gone], 1)
    assert (columns > 0).all() and all(len(row.unique()) == 5 for row in columns)  # never CLS, each time another
    # The dense model without that token, by hand.
    plain, task = make_blip()[0], session.task
    part = take_rows(batches[0], batches[0]["image_ids"] == batches[0]["image_ids"].unique()[0])
    image = int((batches[0]["image_ids"] == part["image_ids"][0]).int().argmax()) // 3
    dense = loss_of(plain, task, part)
    for place, column in enumerate(columns[image].tolist()):
        keep = [i for i in range(17) if i != column]
        block = plain.vision_model.encoder.layers[layer]
        handle = block.register_forward_pre_hook(lambda m, args, keep=keep: (args[0][:, keep],))
        assert loss_of(plain, task, part) - dense == pytest.approx(taken.changes[image, place, 0], abs=1e-5)
        handle.remove()


def loss_of(model: Any, task: Any, batch: Any) -> float:
    losses, counts = question_losses(model, task, batch)
    return float(losses.sum() / counts.sum())


def test_tokens_are_taken_from_those_that_a_schedule_leaves(blip_session: Session) -> None:
    session = blip_session
    state = session.proposer.with_tokens(session.state, "vision", [17, 12, 8])
    batches = evaluation_batches(session.task, 12)
    seen: list[torch.Tensor] = []
    session.streams["vision"].root.register_forward_hook(lambda *_: seen.append(session.schedule.reached("vision")))
    rng = np.random.default_rng(0)
    assert measured_layers(session.schedule) == (1, 2) and forks(state, 1) and forks(state, 2)
    for layer, lift, most, left in ((1, False, 11, 8), (1, True, 16, 16), (2, False, 7, 7), (2, True, 11, 11)):
        seen.clear()
        taken = take_tokens(session.setting, state, batches, layer, count=99, lift=lift, rng=rng)
        assert taken.changes.shape[1] == most  # all that may go
        assert {int(n) for reached in seen[2:] for n in reached.sum(1)} == {left}
        foreseen, changes, rows = rankings([taken, taken])
        assert len(changes) == 2 * 4 * most == len(rows) and len(np.unique(rows)) == 8
        assert np.array_equal(foreseen[CIT], foreseen[BASE])  # every head is there
    assert session.schedule.decide is None and session.schedule.observe is None
    assert session.schedule.tokens["vision"] == (17, 12, 8)


def test_base_importance_counts_removed_heads_and_cit_does_not(blip_session: Session) -> None:
    session = blip_session
    state = session.state.copy()
    state.alive[Site("vision", 0, "heads")][1:] = False
    batches, options = evaluation_batches(session.task, 12), {"count": 4, "lift": False}
    whole = take_tokens(session.setting, session.state, batches, 1, rng=np.random.default_rng(0), **options)
    taken = take_tokens(session.setting, state, batches, 1, rng=np.random.default_rng(0), **options)
    # The first layer's attention is what it was; a removed head changes what is made of it.
    assert np.allclose(taken.importances[BASE], whole.importances[BASE], atol=1e-6)
    assert not np.allclose(taken.importances[CIT], taken.importances[BASE], atol=1e-3)
    assert session.schedule.head_masks[("vision", 0)].tolist() == [1, 0, 0, 0]


# ---- a whole run


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_blip(tmp_path_factory.mktemp("dense") / "blip-0", vision_layers=2, language_layers=2)


def course(dense: Path, out: Path) -> Course:
    return Course(
        out=out, model="blip", dense=str(dense), task=TASK, seed=0, reductions=(0.0, 0.2, 0.4), config=CONFIG, extent=EXTENT
    )  # fmt: skip


def numbers(out: Path) -> dict[str, Any]:
    """What a run's parts hold, without times."""
    found = {}
    for path in sorted((out / "parts").glob("*.json")):
        found[path.name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}
    return found


@pytest.fixture(scope="module")
def whole(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A course that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    run_course(course(dense, out), lambda done, text: None)
    return out


def test_parts_are_of_the_stages_in_which_reductions_are_reached(whole: Path) -> None:
    parts = [json.loads(path.read_text()) for path in sorted((whole / "parts").glob("*.json"))]
    assert [part["reduction"] for part in parts] == [0.0, 0.2, 0.4]
    assert parts[0]["stage"] == 0 and parts[0]["cost"] == 1
    for before, part in zip(parts, parts[1:], strict=False):
        assert part["stage"] > before["stage"] and part["cost"] <= 1 - part["reduction"]
    for part in parts:
        assert set(part["rho"]) == {"heads", "ffn groups", "ffn channels", "tokens", "tokens (lifted)"}
        for kind, rho in part["rho"].items():
            names = {"base", "CIT", "random"} if kind.startswith("tokens") else {
                "wanda", "wanda + CIP", "taylor", "fisher", "magnitude", "random"
            }  # fmt: skip
            assert set(rho["importances"]) == names
            assert all(v is None or -1 <= v <= 1 for found in rho["importances"].values() for v in found.values())
        assert part["rho"]["heads"]["n"] == sum(unit["kind"] == "heads" for unit in part["units"])
    assert parts[0]["rho"]["heads"]["n"] == 3 * 2 * 4  # vision, language, cross
    assert not (whole / "work").exists()


class Stop(Exception):
    """Instead of a kill."""


@pytest.mark.parametrize("moment", ["measure reduction 0.2", pytest.param("stage 3", marks=pytest.mark.slow)])
def test_an_interrupted_course_goes_on_to_the_same_numbers(
    dense: Path, whole: Path, tmp_path: Path, moment: str
) -> None:
    def stop(done: int, text: str) -> None:
        if text.startswith(moment):
            raise Stop

    with pytest.raises(Stop):
        run_course(course(dense, tmp_path), stop)
    begun = len(numbers(tmp_path))
    assert 1 <= begun < 3 and (tmp_path / "work" / "seed-0.work").is_dir()
    run_course(course(dense, tmp_path), lambda done, text: None)
    assert numbers(tmp_path) == numbers(whole)
    # A part that is missing is measured again, though the checkpoint is past it.
    next((tmp_path / "parts").glob("reduction-0.2-*")).unlink()
    run_course(course(dense, tmp_path), lambda done, text: None)
    assert numbers(tmp_path) == numbers(whole)


def command(*words: Any) -> int:
    parser = common.Parser(prog="comp-edge bench")
    bench_ranking.add(parser.add_subparsers(parser_class=common.Parser))
    arguments = parser.parse_args(["ranking", *map(str, words)])
    return common.run(lambda: arguments.run(arguments), name="comp-edge bench")


@pytest.fixture
def quick(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    # The batches of the tiny task are small: of the usual number of questions there would be many.
    monkeypatch.setattr(bench_ranking, "QUICK_EXTENT", asdict(EXTENT))
    more = [
        "--options",
        "round_to=8,val_examples=30,stage_share=0.5",
        "--jobs",
        1,
        "--task",
        TASK,
        "-o",
        tmp_path / "out",
    ]
    return lambda *words: [dense, "--quick", *more, *words]


def test_quick_run_from_the_command_line(quick: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert command(*quick("--json")) == 0
    results = json.loads(capsys.readouterr().out)
    assert [part["reduction"] for part in results["parts"]] == [0.0, 0.4]
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert "units" not in results["parts"][0]
    assert (tmp_path / "out" / "ranking.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "out" / "table.md").read_text()
    assert (
        "## heads" in table and "`wanda + CIP` minus `wanda`, heads" in table and "`CIT` minus `base`, tokens" in table
    )
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "parts").iterdir()}
    assert command(*quick()) == 0  # nothing is left to do
    assert written == {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "parts").iterdir()}
    assert command("--redo", "-o", tmp_path / "out") == 0
    assert (tmp_path / "out" / "table.md").read_text() == table
    capsys.readouterr()
    assert command(*quick("--options", "round_to=8,val_examples=30,stage_share=0.5,stages=5")) == 2
    assert "was measured with stages 4, this run has 5" in capsys.readouterr().err


def test_what_cannot_be_measured(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def refused(*words: Any) -> str:
        assert command(*words) == 2
        return capsys.readouterr().err

    out = ["-o", tmp_path / "out"]
    assert "give a MODEL" in refused(*out)
    assert "--reductions 0 asks for the dense model alone" in refused(dense, "--reductions", 0, *out)
    assert "unknown model 'no-such-model'" in refused("no-such-model", *out)
    assert "holds no finished parts" in refused("--redo", *out)
    assert "has unknown option 'depth'" in refused(dense, "--options", "depth=3", *out)
    with pytest.raises(SystemExit) as stopped:
        command(dense, "--reductions", 1.5)
    assert stopped.value.code == 2 and "'1.5' is not a number of at least 0 and below 1" in capsys.readouterr().err
    assert command(dense, "--task", "digit_pairs", "--seeds", 0, "--jobs", 1, *out) == 1
    assert "refused: seed 0: task 'digit_pairs' asks no questions about images" in capsys.readouterr().err


def test_each_seed_may_have_a_dense_model_of_its_own(dense: Path) -> None:
    given = dense.parent
    assert dense_model("blip", 0, given) == str(dense)
    assert dense_model("llava-digits", 0, given) == "llava-digits" == dense_model("llava-digits", 2, None)
    with pytest.raises(InputError, match="blip-1' does not exist; --dense must hold every seed's"):
        dense_model("blip", 1, given)
