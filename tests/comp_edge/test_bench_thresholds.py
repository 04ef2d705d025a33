"""Per-image thresholds are exact: padding is seen by nobody, means are those of the static schedule, costs are the images'."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from comp_edge.bench.thresholds import Thresholds, calibration_pixels, mean_macs, threshold_for, train_scheduled
from comp_edge.bench.thresholds_run import ARMS, DYNAMIC, SCHEDULE, STATIC
from comp_edge.cli import bench_thresholds, common
from comp_edge.cost import MacsCost
from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.recovery import Distillation
from comp_edge.schedule import active_schedule, attach
from comp_edge.settings import PruneConfig
from comp_edge.state import State
from comp_edge.tasks.packing import take_rows
from tests import families, tiny
from tests.comp_edge.small_blip import make_blip, save_blip

TOKENS = [17, 11, 7]  # of the vision layers
TASK = f"{tiny.__file__}:TinyVQA"


@pytest.fixture(scope="module")
def blip() -> tuple[Any, Any]:
    model, processor = make_blip()
    return model, tiny.TinyVQA(processor)


@pytest.fixture
def scheduled(blip: tuple[Any, Any]) -> tuple[Any, Any]:
    """The model with a static schedule, and the task."""
    model, task = copy.deepcopy(blip[0]), blip[1]
    schedule_vision(model, task, TOKENS)
    return model, task


def schedule_vision(model: Any, task: Any, tokens: list[int]) -> None:
    request = family_of(model).request(model, task.example_inputs())
    attach(model, {**family_of(model).dense_tokens(model, request), "vision": tokens, "cross": tokens})


def pixels_of(task: Any, images: int = 40) -> torch.Tensor:
    return calibration_pixels(task.train_batches(5), images)


@torch.no_grad()
def answers(model: Any, task: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return task.logits(model, batch)


def test_thresholds_have_the_wanted_mean() -> None:
    importance = torch.rand(1000)
    for stay in (0, 1, 3.3, 9.99):
        value = threshold_for(importance, stay=stay, images=100)
        assert int((importance >= value).sum()) == round(stay * 100)
    assert threshold_for(importance, stay=10, images=100) == 0 == threshold_for(importance, stay=11, images=100)


def test_images_keep_what_the_static_schedule_says_on_average(scheduled: Any) -> None:
    model, task = scheduled
    thresholds, pixels = Thresholds(model), pixels_of(task)
    assert len(pixels) == 40
    thresholds.calibrate(pixels)
    with thresholds.noting() as counts, torch.no_grad():
        for part in pixels.split(7):  # in other batches than they were set on
            model.vision_model(pixel_values=part)
    every = torch.cat(counts)
    assert every.shape == (40, 3) and every.double().mean(0).tolist() == pytest.approx(TOKENS, abs=1 / 40 + 1e-9)
    assert (every[:, 1:] < every[:, :-1]).any() and (every[:, 1:] <= every[:, :-1]).all()
    assert every[:, 1].unique().numel() > 2 and (every >= 1).all()  # they differ
    assert list(thresholds.values) == [1, 2] and not thresholds.model.training


def test_a_threshold_of_nothing_is_the_dense_model(blip: Any, scheduled: Any) -> None:
    (dense, task), (model, _) = blip, scheduled
    batch = task.batch("val", list(range(12)))
    assert not torch.allclose(answers(model, task, batch), answers(dense, task, batch), atol=1e-3)
    thresholds = Thresholds(model, {1: 0.0, 2: 0.0})
    with thresholds.noting() as counts:
        assert torch.allclose(answers(model, task, batch), answers(dense, task, batch), atol=1e-5)
    assert torch.cat(counts).tolist() == [[17, 17, 17]] * 4


def test_an_image_computes_what_a_schedule_of_its_own_would(blip: Any, scheduled: Any) -> None:
    """In a batch with others that keep more: the padding of keys, of importance and of cross-attention is exact."""
    (dense, task), (model, _) = blip, scheduled
    thresholds = Thresholds(model)
    thresholds.calibrate(pixels_of(task))
    batch = task.batch("val", list(range(24)))
    with thresholds.noting() as counts:
        together = answers(model, task, batch)
        alone = torch.cat([answers(model, task, take_rows(batch, slice(i, i + 3))) for i in range(0, 24, 3)])
    counts = torch.cat(counts)
    assert torch.equal(counts[:8], counts[8:]) and len(counts[:8].unique(dim=0)) > 4
    assert torch.allclose(together, alone, atol=1e-5)
    for image, own in enumerate(counts[:8].tolist()):
        plain = copy.deepcopy(dense)
        schedule_vision(plain, task, own)
        rows = slice(3 * image, 3 * image + 3)
        assert torch.allclose(answers(plain, task, take_rows(batch, rows)), together[rows], atol=1e-5), own
    assert task.generate(model, batch) == [
        answer for i in range(0, 24, 3) for answer in task.generate(model, take_rows(batch, slice(i, i + 3)))
    ]
    thresholds.detach()
    static = copy.deepcopy(dense)
    schedule_vision(static, task, TOKENS)
    assert torch.equal(answers(model, task, batch), answers(static, task, batch))
    assert active_schedule(model).decide is None


@torch.no_grad()
def test_attention_with_a_mask_is_masked_too() -> None:
    """CLIP's vision tower takes a mask, where BLIP's takes none."""
    case = families.case_named("clip")
    model, inputs = case.model(), case.inputs(6)
    family = family_of(model)
    request = family.request(model, {name: value[:1] for name, value in inputs.items()})
    attach(model, {**family.dense_tokens(model, request), "vision": TOKENS})
    thresholds = Thresholds(model)
    thresholds.calibrate(inputs["pixel_values"])
    with thresholds.noting() as counts:
        together = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        for i, row in enumerate(together):
            alone = model.get_image_features(pixel_values=inputs["pixel_values"][i : i + 1]).pooler_output
            assert torch.allclose(alone[0], row, atol=1e-5)
    counts = torch.cat(counts)
    assert torch.equal(counts[:6], counts[6:]) and len(counts[:6].unique(dim=0)) > 2


def test_the_cost_is_the_mean_of_the_images(blip: Any) -> None:
    model, task = blip
    cost = MacsCost(model)
    plan = State.of(model, request=family_of(model).request(model, task.example_inputs()), base="").plan()
    counts = [torch.tensor([[17, 17, 17], [17, 5, 1]]), torch.tensor([[17, 5, 1]])]
    few = cost.predict(plan.with_tokens("vision", [17, 5, 1]))
    assert few < cost.predict(plan)
    assert mean_macs(cost, plan, counts) == pytest.approx((cost.predict(plan) + 2 * few) / 3)


def test_training_keeps_the_mean_and_moves_the_weights(scheduled: Any) -> None:
    model, task = scheduled
    distillation = Distillation(model, task, weight=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    thresholds, pixels = Thresholds(model), pixels_of(task)
    set_, seen = [], []

    def recalibrate() -> None:
        thresholds.calibrate(pixels)
        set_.append(dict(thresholds.values))

    config = PruneConfig(lr=1e-2, matrix_lr=1e-2)
    options = {"steps": 3, "seed": 1, "config": config, "recalibrate": recalibrate, "tell": seen.append}
    assert train_scheduled(model, task, distillation, **options) == 3 * 12
    assert seen == [1, 2, 3] and len(set_) == 2 and set_[0] != set_[1]  # before the first step, and after the last
    assert not model.training and any(not torch.equal(before[n], v) for n, v in model.state_dict().items())
    with thresholds.noting() as counts, torch.no_grad():
        model.vision_model(pixel_values=pixels)
    assert counts[0].double().mean(0).tolist() == pytest.approx(TOKENS, abs=1 / 40 + 1e-9)


def test_models_whose_prompt_holds_the_image_are_refused(tiny_model: Any) -> None:
    with pytest.raises(InputError, match="LlavaForConditionalGeneration reads image tokens among those of its prompt"):
        Thresholds(tiny_model)
    with pytest.raises(InputError, match="SiglipModel has no vision stream with a CLS token"):
        Thresholds(families.case_named("siglip").model())


# ---- a whole run


def command(*words: Any) -> int:
    parser = common.Parser(prog="comp-edge bench")
    bench_thresholds.add(parser.add_subparsers(parser_class=common.Parser))
    arguments = parser.parse_args(["thresholds", *map(str, words)])
    return common.run(lambda: arguments.run(arguments), name="comp-edge bench")


def test_quick_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dense, out = save_blip(tmp_path / "blip", vision_layers=3), tmp_path / "out"
    words = [
        dense,
        "--quick",
        "--reductions",
        0.15,
        "--task",
        TASK,
        "--jobs",
        1,
        "-o",
        out,
        "--options",
        "val_examples=30",
    ]
    assert command(*words, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    schedule, static, dynamic = results["parts"]
    assert [part["arm"] for part in results["parts"]] == [SCHEDULE, *ARMS] == [SCHEDULE, STATIC, DYNAMIC]
    assert static["macs"] == static["static_macs"] == dynamic["static_macs"] <= 0.85 * static["dense_macs"]
    assert static["counts"] == schedule["tokens"]["vision"] and static["deviations"] == [0, 0, 0]
    # Set on the forty training images, counted on the twenty of the test split.
    assert dynamic["macs"] == pytest.approx(static["macs"], rel=0.1) and max(dynamic["deviations"]) > 0
    assert static["steps"] == dynamic["steps"] == 6 and static["samples"] == dynamic["samples"] == 6 * 12
    assert 0 <= static["score"] <= 1 and 0 <= dynamic["score"] <= 1 and static["thresholds"] is None
    table = (out / "table.md").read_text()
    assert "| reduction | static | dynamic |" in table and "## Tokens of the vision layers at 15 %" in table
    written = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    (out / "parts" / "dynamic-reduction-0.15-seed-0.json").unlink()
    assert command(*words) == 0  # only what is missing is done again, to the same numbers
    again = json.loads((out / "results.json").read_text())["parts"][2]
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in dynamic.items() if k != "seconds"}
    assert sum(path.stat().st_mtime_ns == time for path, time in written.items()) == 2
    assert command("--redo", "-o", out) == 0 and (out / "table.md").read_text().count("\n") > 10
    capsys.readouterr()
    assert command(*words, "--steps", 7) == 2
    assert "was measured with steps 6, this run has 7" in capsys.readouterr().err


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = ["-o", tmp_path / "out"]
    assert command(*out) == 2 and "give a MODEL" in capsys.readouterr().err
    assert command("--redo", *out) == 2 and "holds no finished parts" in capsys.readouterr().err
    assert command("llava-digits", "--seeds", 0, "--reductions", 0.5, "--jobs", 1, *out) == 1
    assert "refused: reduction 0.5 seed 0: LlavaForConditionalGeneration reads image tokens" in capsys.readouterr().err
