"""Core ML bundles, written by the real command and run: right, and never written when they are wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from comp_edge.reference.llava_digits import build_processor
from export.bundle import MANIFEST_FILE, Bundle, sha256
from export.coreml import build
from export.coreml.__main__ import main, summary
from export.coreml.build import build_bundle
from export.coreml.convert import ExportError
from export.coreml.engine import MilEngine
from export.coreml.functions import build_modules
from export.executorch.runner import ScheduledRunner
from export.mil import Interpreter, Package, interpreter
from export.reference import reference, synthetic_requests
from export.source import Source, load_source
from runtime_tests.__main__ import main as runtime_tests

pytestmark = pytest.mark.slow
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


@pytest.fixture(scope="session")
def exported(folders, tmp_path_factory):
    """The folder that the command wrote for the pruned model, and the JSON that it printed."""
    out = tmp_path_factory.mktemp("coreml") / "bundle"
    command = [sys.executable, "-m", "export.coreml", str(folders["pruned"]), "-o", str(out), "--verify", "6", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # All that coremltools prints is kept away: the rest of stderr is our own progress and result.
    assert "MIL" not in done.stderr and "Core ML only supports" not in done.stderr
    return out, json.loads(done.stdout)


@pytest.fixture
def without_conversion(exported, monkeypatch):
    """`without_conversion(damage)`: instead of converting, take the packages of `exported` and damage them."""

    def patch(damage=lambda folder: None):
        def copy(programs, specs, precision, folder, *, step=None):
            for file in {spec.file for spec in specs.values()}:
                shutil.copytree(exported[0] / precision / file, folder / file)
            damage(folder)

        monkeypatch.setattr(build, "export_programs", lambda *args: {})
        monkeypatch.setattr(build, "write_packages", copy)

    return patch


@pytest.fixture(scope="module")
def flip_weight(folders):
    """`flip_weight(package)`: turn the sign of one stored weight of a package `<part>_<precision>.mlpackage`."""
    modules = build_modules(load_source(folders["pruned"], new_tokens=8), selection="topk")

    def flip(package: Path) -> None:
        part, precision = package.stem.split("_")
        layer = modules.language.head if part == "language" else modules.vision.connector.project_out
        weights = layer.weight.detach().to(torch.float16 if precision == "fp16" else torch.float32)[:2]
        data = bytearray((package / WEIGHTS).read_bytes())
        at = data.find(weights.numpy().tobytes())
        assert at > 0
        largest = weights.flatten().abs().argmax().item()
        data[at + (largest + 1) * weights.element_size() - 1] ^= 0x80
        (package / WEIGHTS).write_bytes(bytes(data))

    return flip


def test_json_of_the_command(exported):
    out, result = exported
    assert result["path"] == str(out)
    assert result["fp32_max_abs_error"] <= 1e-4 and result["fp16_max_abs_error"] <= 1e-3
    assert result["fp16_max_abs_error"] < result["fp16_declared_max_abs_error"] < 1
    assert 0 <= result["kept_set_agreement"] <= 1 and result["kept_sets"]["compared"] == 6 * 2
    assert result["tokens_equal"] is True and result["questions"] == 6 and result["warnings"] == []
    for precision in ("fp16", "fp32"):
        entry = result["bundles"][precision]
        assert entry["matched"] == 6 and entry["ambiguous"] == 0
        assert set(entry["bytes"]) == {f"language_{precision}.mlpackage", f"vision_{precision}.mlpackage"}
        assert "not how a device rounds" in entry["details"]["meaning"]


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_bundles_are_whole(exported, precision):
    bundle = Bundle.open(exported[0] / precision)
    assert bundle.hash_errors() == []
    assert {"golden.safetensors", "tokenizer.json", "processor_config.json", "CoreMLExample.swift"} <= set(
        bundle.manifest.files
    )
    assert not any("debug" in name or "part_" in name for name in bundle.manifest.files)
    assert (bundle.manifest.backend, bundle.manifest.tokens["language"]) == ("coreml", (32, 20))
    language = Package(bundle.path(f"language_{precision}.mlpackage"))
    assert language.default_function == "decode"
    assert set(language.functions) == {"token_embedding", "prefill", "decode"}
    assert language.functions["prefill"].states == language.functions["decode"].states
    # Prefill and decode share their weights: together they are hardly larger than the weights once.
    stored = bundle.path(f"language_{precision}.mlpackage") / WEIGHTS
    bytes_each = 2 if precision == "fp16" else 4
    parameters = 512 * 64 * 2 + 2 * 64 * (64 + 32 + 32 + 64 + 3 * 128)
    assert stored.stat().st_size < 1.5 * bytes_each * parameters


def test_runtime_tests_pass_and_notice_damage(exported, flip_weight, tmp_path, capfd):
    out, _ = exported
    assert runtime_tests([str(out), "--rounds", "0", "--json"]) == 0
    assert [bundle["ok"] for bundle in json.loads(capfd.readouterr().out)["bundles"]] == [True, True]

    for package in ("vision_fp16.mlpackage", "language_fp16.mlpackage"):
        folder = shutil.copytree(out / "fp16", tmp_path / package)
        flip_weight(folder / package)
        # The hash is made right, so that only running the package can tell.
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        manifest["files"][f"{package}/{WEIGHTS}"] = sha256(folder / package / WEIGHTS)
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
        assert runtime_tests([str(folder), "--rounds", "0", "--json"]) == 1
        checks = {c["name"]: c["status"] for c in json.loads(capfd.readouterr().out)["bundles"][0]["checks"]}
        assert checks["hashes"] == "pass" and "fail" in (checks["logits"], checks["image features"])


def test_golden_requests_are_answered_as_generate_does(exported, folders):
    source = load_source(folders["pruned"], new_tokens=8)
    requests = synthetic_requests(source, count=3, seed=11)
    golden = reference(source, requests)
    bundle = Bundle.open(exported[0] / "fp32")
    runner = ScheduledRunner(bundle, engine=MilEngine(bundle))
    # Each request twice and out of order: nothing of one may stay in the states for the next.
    for index in (0, 2, 1, 1, 0):
        answer = runner.generate(requests.pixel_values[index], requests.questions[index])
        assert answer.tokens == golden.tokens[index]
        assert (torch.cat(answer.logits) - golden.logits[index]).abs().max() <= 1e-4


@pytest.mark.parametrize("part", ["vision", "language"])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_package_that_computes_something_else_is_not_written(
    without_conversion, flip_weight, folders, tmp_path, capfd, part, precision
):
    without_conversion(lambda folder: flip_weight(folder / f"{part}_{precision}.mlpackage"))
    code = main(
        [str(folders["pruned"]), "-o", str(tmp_path / "b"), "--precision", precision, "--verify", "2", "--json"]
    )
    out, err = capfd.readouterr()
    assert code == 1 and not out and "is not right" in err and "Nothing was written." in err
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_package_is_not_written(without_conversion, folders, tmp_path, capfd):
    def truncate(folder):
        path = folder / "language_fp32.mlpackage" / WEIGHTS
        path.write_bytes(path.read_bytes()[:5000])

    without_conversion(truncate)
    code = main([str(folders["pruned"]), "-o", str(tmp_path / "b"), "--precision", "fp32", "--verify", "1"])
    assert code == 1 and "does not run" in capfd.readouterr().err and list(tmp_path.iterdir()) == []


def test_an_unknown_operation_is_an_error_that_names_it(without_conversion, folders, tmp_path, capfd, monkeypatch):
    without_conversion()
    monkeypatch.delitem(interpreter.HANDLERS, "softmax")
    # What stood there before stays.
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("kept")
    code = main([str(folders["pruned"]), "-o", str(tmp_path / "b"), "--verify", "1", "--json"])
    out, err = capfd.readouterr()
    assert code == 1 and not out and "'softmax'" in err and "cannot be verified" in err
    assert (tmp_path / "b" / "mine.txt").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


def test_a_wrong_deployment_form_is_noticed_at_fp16_too(without_conversion, folders, tmp_path, monkeypatch):
    """The fp16 package is compared with the modules, so the modules are compared with the model."""
    without_conversion()
    source = load_source(folders["pruned"], new_tokens=8)
    modules = build.build_modules(source, selection="topk")
    modules.language.head.weight.mul_(1.01)
    monkeypatch.setattr(build, "build_modules", lambda *args, **kwargs: modules)
    with pytest.raises(ExportError, match="modules to convert are not the model: logits differ"):
        build_bundle(("fp16",), source, synthetic_requests(source, count=1), tmp_path / "b")


def test_values_that_fp16_cannot_hold_are_warned_of(without_conversion, folders, tmp_path, monkeypatch):
    """Rounded as declared, this interpreter overflows; the program is still the right one."""
    without_conversion()
    original = Interpreter._conform

    def overflow(self, value, output):
        result = original(self, value, output)
        large = self.precision == "declared" and result.is_floating_point()
        return torch.full_like(result, torch.nan) if large else result

    monkeypatch.setattr(Interpreter, "_conform", overflow)
    monkeypatch.setattr("export.coreml.verify.KeptSets.add", lambda *args, **kwargs: True)
    source = load_source(folders["pruned"], new_tokens=8)
    manifests = build_bundle(("fp16",), source, synthetic_requests(source, count=1), tmp_path / "b")
    assert "not finite" in manifests["fp16"].warnings[0]
    text = json.dumps(summary(manifests, tmp_path / "b"), allow_nan=False)
    assert json.loads(text)["fp16_declared_max_abs_error"] is None
    assert "NaN" not in (tmp_path / "b" / "fp16" / MANIFEST_FILE).read_text()


@pytest.mark.parametrize(("kind", "selection"), [("everything", "rank"), ("dense", "topk")])
def test_other_plans(case, tmp_path, kind, selection):
    """Skipped sub-layers, carried scores, layers without caches; and nothing pruned at all."""
    corpus = [f"USER: <image> what is the {colour}? 3" for colour in ("red", "green")]
    model = case(kind)
    source = Source(
        model=model.model,
        plan=model.plan,
        processor=build_processor(corpus),
        template="USER: <image> {question}",
        new_tokens=4,
    )
    requests = synthetic_requests(source, count=3)
    precision = "fp16" if selection == "rank" else "fp32"
    manifest = build_bundle((precision,), source, requests, tmp_path / "b", selection=selection)[precision]
    result = summary({precision: manifest}, tmp_path / "b")
    assert result["tokens_equal"] and result[f"{precision}_max_abs_error"] <= manifest.verification.tolerance
    bundle = Bundle.open(tmp_path / "b" / precision)
    counts = MilEngine(bundle)._interpreters["prefill"].op_counts()
    assert not counts["topk"] and not (selection == "rank" and counts["gather"])
    if kind == "everything":
        assert {port.name[-1] for port in manifest.method("decode").states} == {"0", "2"}
        assert result["kept_sets"]["compared"] == 3 * 5
    else:
        assert result["kept_sets"]["compared"] == 0 and result["kept_set_agreement"] == 1.0
