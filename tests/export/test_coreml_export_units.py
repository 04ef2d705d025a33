"""Parts of the Core ML exporter that need no conversion: specs, kept sets, comparisons, and what a user can get wrong."""

import errno
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from comp_edge.errors import InputError
from export.bundle import Golden, MethodSpec, TensorSpec
from export.coreml import build, convert
from export.coreml.__main__ import main
from export.coreml.convert import ExportError, export_programs, write_packages
from export.coreml.engine import Cut, EagerEngine, kept_tokens, survivors
from export.coreml.functions import Modules, build_modules, check_precision, example_inputs, method_specs
from export.coreml.swift import swift_example
from export.coreml.verify import Comparison, KeptSets, _failures, _too_large
from export.executorch.runner import Generation
from export.mil import OpRecord, Trace
from export.reference import prompt_spec
from export.source import load_source


@pytest.fixture(scope="module")
def source(folders):
    return load_source(folders["pruned"], new_tokens=8)


@pytest.fixture(scope="module")
def modules(source):
    return build_modules(source, selection="topk")


# ---- what the manifest says


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", "float16"), ("fp32", "float32")])
def test_specs(source, modules, precision, dtype):
    specs = method_specs(source, modules, precision)
    assert list(specs) == ["vision_encoder", "token_embedding", "prefill", "decode"]
    assert specs["vision_encoder"].file == f"vision_{precision}.mlpackage"
    assert {specs[name].file for name in ("token_embedding", "prefill", "decode")} == {
        f"language_{precision}.mlpackage"
    }
    assert specs["vision_encoder"].inputs[0].dtype == dtype
    assert specs["prefill"].inputs[0].shape == (1, 32, 64)
    assert [port.shape for port in specs["decode"].inputs] == [(1, 1), (1,), (1,)]
    # Caches are as long as their layer has tokens, and fp16 at either precision.
    shapes = {port.name: port.shape for port in specs["decode"].states}
    assert shapes["language_keys_0"] == (2, 16, 40) and shapes["language_values_1"] == (2, 28, 16)
    assert {port.dtype for port in specs["decode"].states} == {"float16"}
    assert specs["prefill"].states == specs["decode"].states and not specs["token_embedding"].states
    for spec in specs.values():
        assert [value.shape for value in example_inputs(spec)] == [port.shape for port in spec.inputs]


def test_fp16_refuses_positions_that_it_cannot_tell_apart(modules):
    long = SimpleNamespace(language=SimpleNamespace(capacity=2049))
    check_precision(modules, "fp16")
    check_precision(long, "fp32")
    with pytest.raises(InputError, match="2049.*--precision fp32"):
        check_precision(long, "fp16")


def test_swift_example(source, modules):
    for precision, scalar in (("fp16", "Float16"), ("fp32", "Float")):
        text = swift_example(method_specs(source, modules, precision), prompt_spec(source), precision)
        assert "NOT compiled" in text and "$" not in text.replace("$0", "").replace("$1", "")
        assert f"typealias Scalar = {scalar}\n" in text and f'"language_{precision}.mlpackage"' in text
        assert text.count("{") == text.count("}") and text.count("(") == text.count(")")
        assert '"USER: <image>' in text and "imageTokens = 8 " in text and "promptLength = 32 " in text


# ---- kept sets


def test_survivors_are_original_tokens_without_padding():
    assert survivors([], tokens=5) == []
    kept = [(0, 1, 2, 4, 5), (1, 3, 4)]
    assert survivors(kept, tokens=6) == [{0, 1, 2, 4, 5}, {1, 4, 5}]
    assert survivors(kept, tokens=6, start=2) == [{2, 4, 5}, {4, 5}]


def test_kept_tokens_of_a_trace():
    scores, order = torch.tensor([[0.1, 3.0, 2.0]]), torch.tensor([[1, 2]], dtype=torch.int32)
    trace = Trace(ops={"topk"})
    trace.records += [
        OpRecord("topk", {"x": scores}, {"values": torch.tensor([[3.0, 2.0]]), "indices": order.flip(1)}),
        OpRecord("topk", {"x": order}, {"values": order, "indices": order}),
    ]
    assert kept_tokens(trace, "topk") == [(1, 2)]
    ranks = Trace(ops={"less"})
    ranks.records.append(OpRecord("less", {}, {"kept": torch.tensor([[False], [True], [True]])}))
    assert kept_tokens(ranks, "rank") == [(1, 2)]


def test_kept_sets_count_drops_and_note_the_margin_that_was_lost_first():
    sets = KeptSets()
    cuts = {"vision_encoder": [Cut((0, 1, 2), 0.5)], "prefill": [Cut((0, 1, 2), 0.01), Cut((0, 2), 0.2)]}
    tokens, starts = {"vision": (4, 3), "language": (4, 3, 2)}, {"vision_encoder": 0, "prefill": 1}
    equal = {"vision_encoder": [(0, 1, 2)], "prefill": [(0, 1, 2), (0, 2)]}
    # Which padding is kept does not matter: token 0 is padding, and so is nothing else.
    assert sets.add(equal, cuts, tokens=tokens, starts=starts) and sets.agreement == 1.0
    flipped = {"vision_encoder": [(0, 1, 2)], "prefill": [(0, 1, 3), (0, 2)]}
    assert not sets.add(flipped, cuts, tokens=tokens, starts=starts)
    assert (sets.agreeing, sets.compared, sets.lost_margins) == (4, 6, [0.01])
    assert sets.to_json()["smallest_cut_margin"] == 0.01
    assert KeptSets().agreement == 1.0 and KeptSets().to_json()["smallest_cut_margin"] is None
    with pytest.raises(ValueError):  # a drop that the trace did not show is not an agreement
        sets.add({"vision_encoder": [], "prefill": []}, cuts, tokens=tokens, starts=starts)


def test_eager_engine_notes_cuts_and_rounds_a_copy(source, modules):
    plain, rounded = EagerEngine(modules), EagerEngine(modules, round_to_fp16=True)
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    difference = (plain.call("vision_encoder", pixels) - rounded.call("vision_encoder", pixels)).abs().max()
    assert 0 < difference < 0.05
    (cut,) = plain.cuts["vision_encoder"]
    assert len(cut.kept) == 9 and cut.kept[0] == 0 and cut.margin > 0 and list(cut.kept) == sorted(cut.kept)
    assert torch.equal(plain.call("vision_encoder", pixels), modules.by_method["vision_encoder"](pixels))
    assert torch.equal(plain.outputs["vision_encoder"], plain.call("vision_encoder", pixels))


# ---- comparisons


def golden(tokens, logits):
    return Golden(("q",), torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 2), (tokens,), (logits,))


def test_logits_count_up_to_the_first_that_follows_another_token():
    expected = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    answer = Generation(tokens=(1, 0, 1), text="", logits=(expected[:1], expected[1:2] + 0.5, expected[2:] + 9))
    comparison = Comparison()
    comparison.add(answer, torch.zeros(1, 2), golden((1, 1, 1), expected), 0, counts=True)
    assert comparison.logits == 0.5 and comparison.matched == [False]
    quiet = Comparison()
    assert quiet.add(answer, torch.ones(1, 2), golden((1, 1, 1), expected), 0, counts=False) == 1.0
    assert quiet.error == 0.0


def test_nan_is_never_right():
    expected = torch.tensor([[0.0, 1.0]])
    comparison = Comparison()
    for logits in (torch.full((1, 2), math.nan), expected):
        answer = Generation(tokens=(1,), text="", logits=(logits,))
        comparison.add(answer, torch.zeros(1, 2), golden((1,), expected), 0, counts=True)
    assert math.isnan(comparison.error) and "logits differ by nan" in _too_large(comparison, 1.0)[0]


def test_wrong_tokens_fail_unless_a_drop_was_ambiguous():
    result = SimpleNamespace(tolerance=1e-4, ambiguous=1, questions=3)
    assert _failures(result, Comparison(), ["a"], [1]) == []
    assert "2 of 3 questions, first 'a'" in _failures(result, Comparison(), ["a", "b"], [1])[0]
    assert "rounding decides" in _failures(result, Comparison(), [], [])[0]


# ---- conversion and command line


def test_an_operation_that_cannot_be_converted_is_named(tmp_path):
    class Strange(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    port = TensorSpec(name="x", shape=(1, 2), dtype="float32", layout="a, b")
    spec = MethodSpec(name="odd", file="m.mlpackage", function="main", inputs=(port,), outputs=(port,))
    modules = Modules(by_method={"odd": Strange()}, language=None, selection="topk")
    with pytest.raises(ExportError, match="odd cannot be converted.*bessel_j0"):
        write_packages(export_programs(modules, {"odd": spec}), {"odd": spec}, "fp32", tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[Errno 28] No space left on device\nbacktrace"),
        shutil.Error([("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'"), ("c", "d", "the same again")]),
    ],
)
def test_an_error_of_the_packages_writer_is_a_disk_error(tmp_path, error):
    def save(path):
        raise error

    with pytest.raises(OSError, match=r"saving m.mlpackage failed: \[Errno 28\] No space left on device$"):
        convert._save(SimpleNamespace(save=save), tmp_path / "m.mlpackage")


def run(capsys, *arguments):
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err.strip()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--precision", "fp8"),
        ("--select", "best"),
        ("--verify", "0"),
        ("--max-new-tokens", "-1"),
        ("--prompt", "no image token {question}"),
        ("--golden", "missing.safetensors"),
        ("--prompt-tokens", "8"),  # the plan has them
    ],
)
def test_bad_options(capsys, tmp_path, folders, option, value):
    code, out, err = run(capsys, folders["pruned"], "-o", tmp_path / "b", option, value)
    assert code == 2 and not out and err.count("\n") == 0 and value in err, err
    assert not (tmp_path / "b").exists()


def test_bad_models_and_outputs(capsys, tmp_path, folders):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for model, out in (("nowhere", "b"), (tmp_path / "empty", "b"), (folders["pruned"], "file")):
        code, printed, err = run(capsys, model, "-o", tmp_path / out)
        assert code == 2 and not printed and err.count("\n") == 0, err
    assert (tmp_path / "file").read_text() == "" and not (tmp_path / "b").exists()


def test_images_of_another_size(capsys, tmp_path, folders):
    path = tmp_path / "golden.safetensors"
    save_file({"pixel_values": torch.zeros(2, 3, 32, 32)}, path, metadata={"questions": json.dumps(["a", "b"])})
    code, _, err = run(capsys, folders["pruned"], "-o", tmp_path / "b", "--golden", path, "--verify", 2)
    assert code == 2 and "[3, 32, 32]" in err and "[3, 64, 64]" in err


def test_a_full_disk_leaves_nothing(capsys, tmp_path, folders, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, "export_programs", lambda *args: {})
    monkeypatch.setattr(build, "write_packages", full)
    (tmp_path / "out").mkdir()
    code, out, err = run(capsys, folders["pruned"], "-o", tmp_path / "out" / "b", "--json")
    assert code == 2 and not out and err.splitlines()[-1].endswith("No space left on device.")
    assert list((tmp_path / "out").iterdir()) == []
