"""Exported programs, run: right, self-contained, and never written when they are wrong."""

import dataclasses
import json

import pytest
import torch

from comp_edge.errors import InputError
from export.bundle import Bundle, BundleError
from export.executorch import build
from export.executorch.__main__ import main
from export.executorch.lower import Lowered
from export.executorch.runner import ScheduledRunner, SegmentRunner, StockRunner, open_runner
from export.reference import reference, synthetic_requests
from export.source import load_source, without_language_drops

pytestmark = pytest.mark.slow


def test_json_of_the_command(bundles):
    result = bundles.result
    assert set(result) == {"stock", "scheduled"}
    for profile, entry in result.items():
        assert entry["tokens_equal"] is True and entry["matched"] == entry["questions"] == 6
        assert entry["max_abs_error"] <= 1e-4
        assert (bundles.folder / profile / "model.pte").stat().st_size == entry["bytes"]
    assert result["stock"]["lifted_language_drops"] == [32, 20]
    assert result["scheduled"]["lifted_language_drops"] is None


def test_bundles_are_whole(bundles):
    for profile in ("stock", "scheduled"):
        bundle = Bundle.open(bundles.folder / profile)
        assert bundle.hash_errors() == []
        assert {"model.pte", "golden.safetensors", "tokenizer.json"} <= set(bundle.manifest.files)
        assert bundle.manifest.prompt.image_tokens == 8
        assert bundle.manifest.image.resample == "bicubic"
    stock = Bundle.open(bundles.folder / "stock").manifest
    assert stock.tokens["language"] == (32, 32) and stock.lifted_language_drops == (32, 20)
    assert stock.constants["get_max_seq_len"] == 40


def test_one_delegate_more_than_drops(bundles):
    report = Bundle.open(bundles.folder / "scheduled").manifest.delegation
    assert (report["vision_encoder"].delegates, report["prefill"].delegates, report["decode"].delegates) == (2, 2, 1)
    assert Bundle.open(bundles.folder / "scheduled").manifest.warnings == ()


@pytest.mark.parametrize("kind", [ScheduledRunner, SegmentRunner])
def test_runners_answer_as_generate_does(bundles, folders, kind):
    source = load_source(folders["pruned"], new_tokens=8)
    if kind is SegmentRunner:
        source = without_language_drops(source)
    requests = synthetic_requests(source, count=4, seed=7)
    golden = reference(source, requests)
    runner = kind(bundles.folder / kind.profile)
    # Each request twice and out of order: nothing of one may stay for the next.
    for index in (0, 3, 1, 2, 2, 0):
        answer = runner.generate(requests.pixel_values[index], requests.questions[index])
        assert answer.tokens == golden.tokens[index]
        assert (torch.cat(answer.logits) - golden.logits[index]).abs().max() <= 1e-4


def test_the_stock_runner(bundles):
    bundle = Bundle.open(bundles.folder / "stock")
    golden, runner, stock = bundle.golden(), SegmentRunner(bundle), StockRunner(bundle)
    seen = [
        stock.matches(golden.pixel_values[i], question, golden.tokens[i], runner.tokenizer)
        for i, question in enumerate(golden.questions)
    ]
    assert False not in seen
    # A token that the tokenizer does not know has no text to compare.
    assert stock.matches(golden.pixel_values[0], golden.questions[0], [10**6], runner.tokenizer) is None


def test_runners_refuse_what_they_cannot_run(bundles):
    runner = ScheduledRunner(bundles.folder / "scheduled")
    with pytest.raises(BundleError, match="room for 24"):
        runner.generate(torch.zeros(3, 64, 64), "xyz " * 20)
    with pytest.raises(BundleError, match="'stock'"):
        ScheduledRunner(bundles.folder / "stock")
    with pytest.raises(BundleError, match="'scheduled'"):
        StockRunner(bundles.folder / "scheduled")
    with pytest.raises(BundleError, match="no method 'forward'"):
        runner.engine.call("forward")


def test_a_wrong_program_is_not_written(monkeypatch, tmp_path, folders, bundles, capsys):
    delegation = Bundle.open(bundles.folder / "scheduled").manifest.delegation
    program = (bundles.folder / "scheduled" / "model.pte").read_bytes()
    # What lowering this folder gives, without the half minute that it takes.
    monkeypatch.setattr(build, "lower", lambda methods, constants: Lowered(program=program, delegation=delegation))
    honest = build.reference

    def other_logits(source, requests, **options):
        golden = honest(source, requests, **options)
        return dataclasses.replace(golden, logits=tuple(row + 1.0 for row in golden.logits))

    monkeypatch.setattr(build, "reference", other_logits)
    out = tmp_path / "bundle"
    assert main([str(folders["pruned"]), "-o", str(out), "--profile", "scheduled", "--verify", "2"]) == 1
    err = capsys.readouterr().err
    assert "logits differ by 1.00e+00" in err and "Nothing was written" in err
    assert list(tmp_path.iterdir()) == []
    nan = lambda source, requests, **options: dataclasses.replace(  # noqa: E731
        golden := honest(source, requests, **options), logits=tuple(row * torch.nan for row in golden.logits)
    )
    monkeypatch.setattr(build, "reference", nan)
    assert main([str(folders["pruned"]), "-o", str(out), "--profile", "scheduled", "--verify", "2"]) == 1
    assert "nan" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    program = program[:2000]
    assert main([str(folders["pruned"]), "-o", str(out), "--profile", "scheduled", "--verify", "2"]) == 1
    assert "does not run" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_bad_prompt_is_refused_by_the_source(folders):
    with pytest.raises(InputError, match="room for"):
        load_source(folders["pruned"]).prompt_ids("xyz " * 20)


def test_open_runner_by_profile(bundles, tmp_path):
    assert isinstance(open_runner(bundles.folder / "stock"), SegmentRunner)
    bundle = Bundle.open(bundles.folder / "stock")
    other = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"profile": "odd"}))
    with pytest.raises(BundleError, match="'odd'"):
        open_runner(other)


def test_manifest_is_json(bundles):
    value = json.loads((bundles.folder / "stock" / "manifest.json").read_text())
    assert value["verification"]["tokens_equal"] is True
