"""`python -m runtime_tests` on good bundles, damaged ones, and things that are no bundle."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.bundle import MANIFEST_FILE, sha256
from runtime_tests.__main__ import main


def run(capfd, *arguments):
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capfd.readouterr()
    return code, out, err


@pytest.fixture
def copy(bundles, tmp_path):
    """`copy(profile)`: a bundle that a test may damage."""

    def make(profile="scheduled"):
        return shutil.copytree(bundles.folder / profile, tmp_path / profile)

    return make


def edit_manifest(folder, change):
    value = json.loads((folder / MANIFEST_FILE).read_text())
    change(value)
    (folder / MANIFEST_FILE).write_text(json.dumps(value))


def edit_golden(folder, change):
    path = folder / "golden.safetensors"
    tensors = load_file(path)
    change(tensors)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)
    edit_manifest(folder, lambda v: v["files"].update({"golden.safetensors": sha256(path)}))


def results(capfd, folder):
    code, out, _ = run(capfd, folder, "--rounds", "0", "--json")
    report = json.loads(out)["bundles"][0]
    return code, {check["name"]: check for check in report["checks"]}


@pytest.mark.slow
def test_good_bundles(capfd, bundles):
    code, out, _ = run(capfd, bundles.folder, "--rounds", "3", "--json")
    result = json.loads(out)
    assert code == 0 and result["ok"] is True
    assert [bundle["profile"] for bundle in result["bundles"]] == ["scheduled", "stock"]
    for bundle in result["bundles"]:
        assert all(check["status"] != "fail" for check in bundle["checks"])
        first = bundle["latency_ms"]["first_token"]
        assert 0 < first["min"] <= first["p50"] <= first["p90"]
        assert bundle["memory"]["peak_mb"] > bundle["memory"]["program_mb"] > 0


@pytest.mark.slow
def test_against_another_bundle(capfd, bundles, copy):
    code, out, _ = run(capfd, bundles.folder / "scheduled", "--against", copy(), "--rounds", "5", "--json")
    ratio = json.loads(out)["speedup"][str(bundles.folder / "scheduled")]
    assert code == 0 and 0.2 < ratio["min"] < 5  # the same program twice
    code, _, err = run(capfd, bundles.folder / "scheduled", "--against", bundles.folder / "stock")
    assert code == 2 and "executorch stock" in err


@pytest.mark.slow
def test_the_table(capfd, bundles):
    code, out, _ = run(capfd, bundles.folder / "scheduled", "--rounds", "2")
    assert code == 0 and "latency" in out and "first token" in out and "pass" in out


@pytest.mark.slow
def test_changed_files_fail(capfd, copy):
    folder = copy()
    (folder / "tokenizer_config.json").write_text("{}")
    code, checks = results(capfd, folder)
    assert code == 1 and "tokenizer_config.json has changed" in checks["hashes"]["detail"]
    assert checks["tokens"]["status"] == "pass"


@pytest.mark.slow
def test_other_outputs_and_tokens_fail(capfd, copy):
    folder = copy()
    edit_golden(folder, lambda t: (t["logits"].add_(0.01), t["image_features"].mul_(1.1)))
    code, checks = results(capfd, folder)
    assert code == 1 and checks["hashes"]["status"] == "pass"
    assert checks["logits"]["status"] == checks["image features"]["status"] == "fail"
    assert checks["logits"]["measured"] == pytest.approx(0.01, rel=0.1)
    folder = shutil.copytree(folder, folder.parent / "tokens")
    edit_golden(folder, lambda t: t["tokens"].copy_((t["tokens"] + 1) % 9))
    assert results(capfd, folder)[1]["tokens"]["status"] == "fail"


@pytest.mark.slow
def test_a_golden_file_of_nans_fails(capfd, copy):
    folder = copy()
    edit_golden(folder, lambda t: t["logits"].fill_(torch.nan))
    assert results(capfd, folder)[1]["logits"]["status"] == "fail"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v["methods"][0]["inputs"][0].update(shape=[1, 3, 32, 32]), "vision_encoder input 'pixel_values'"),
        (lambda v: v["constants"].update(use_kv_cache=False), "constant 'use_kv_cache'"),
        (lambda v: v["constants"].update(extra=1), "'extra' is only in the manifest"),
        (lambda v: v["constants"].pop("use_kv_cache"), "'use_kv_cache' is only in the program"),
    ],
)
def test_signatures_that_differ_fail(capfd, copy, change, said):
    folder = copy()
    edit_manifest(folder, change)
    code, checks = results(capfd, folder)
    assert code == 1 and said in checks["signatures"]["detail"]


@pytest.mark.slow
def test_a_program_that_does_not_load_fails(capfd, copy):
    folder = copy()
    (folder / "model.pte").write_bytes((folder / "model.pte").read_bytes()[:1000])
    code, checks = results(capfd, folder)
    assert code == 1 and checks["load"]["status"] == "fail"


@pytest.mark.slow
def test_a_manifest_that_breaks_the_schema_fails(capfd, copy):
    folder = copy()
    edit_manifest(folder, lambda v: v["methods"][0].update(surprise=1))
    code, checks = results(capfd, folder)
    assert code == 1 and list(checks) == ["manifest"] and "surprise" in checks["manifest"]["detail"]


def test_bad_input(capfd, tmp_path):
    for arguments, named in (
        ([tmp_path / "none"], "none"),
        ([tmp_path], "manifest.json"),
        ([tmp_path, "--threads", "0"], "--threads 0"),
        ([tmp_path, "--device", "adb://X"], "adb://X"),
        ([tmp_path, "--threads", "x"], "'x'"),
    ):
        code, out, err = run(capfd, *arguments)
        assert code == 2 and named in err and err.strip().count("\n") == 0 and not out


def test_nothing_of_comp_edge_is_imported():
    script = (
        "import sys, runtime_tests.__main__, runtime_tests.memory; "
        "print([m for m in sys.modules if m.split('.')[0] == 'comp_edge'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
