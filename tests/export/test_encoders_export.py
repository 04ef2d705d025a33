"""Encoders through both exporters' real commands, and the conformance tests on what they wrote, whole or damaged."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from export.bundle import GOLDEN_FILE, MANIFEST_FILE, Bundle, sha256
from export.coreml.__main__ import main as coreml
from export.encoder_runner import EncoderRunner
from export.encoders import encoder_reference, load_encoders, synthetic_encoder_requests
from export.executorch import encoders as executorch_encoders
from export.executorch.__main__ import main as executorch
from export.executorch.lower import Lowered
from runtime_tests.__main__ import main as runtime_tests
from tests.export.encoder_models import NAMES, pruned_folder

pytestmark = pytest.mark.slow
COMMANDS = {"executorch": executorch, "coreml": coreml}
# Lowering to XNNPACK takes a while: the towers, and of BLIP the model that has every part of the others.
EXPORTED = [("executorch", name) for name in ("clip", "blip-vqa")] + [("coreml", name) for name in NAMES]
BOTH_PRECISIONS = ("clip",)
every_export = pytest.mark.parametrize(("backend", "name"), EXPORTED)
METHODS = {
    "blip-retrieval": ["vision_encoder", "matcher"],
    "blip-vqa": ["vision_encoder", "prefill", "decode"],
    "blip-captioning": ["vision_encoder", "prefill", "decode"],
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`exported(backend, name)`: the folder that the command wrote for a pruned model, and the JSON that it printed."""
    cache = {}

    def get(backend, name, capsys=None):
        if (backend, name) not in cache:
            out = tmp_path_factory.mktemp(backend) / "bundle"
            options = ["--image-size", "80x64"] if name == "siglip2" else []
            if backend == "coreml" and name not in BOTH_PRECISIONS:
                options += ["--precision", "fp16"]
            capsys.readouterr()
            assert (
                COMMANDS[backend]([str(pruned_folder(name)), "-o", str(out), "--verify", "16", "--json", *options]) == 0
            )
            cache[backend, name] = out, json.loads(capsys.readouterr().out)
        return cache[backend, name]

    return get


@every_export
def test_a_model_of_each_kind(exported, capsys, backend, name):
    out, result = exported(backend, name, capsys)
    entries = result if backend == "executorch" else result["bundles"]
    expected = ["fp16", "fp32"] if name in BOTH_PRECISIONS else ["fp16"]
    assert list(entries) == (["encoders"] if backend == "executorch" else expected)
    for folder, entry in entries.items():
        assert entry["matched"] == entry["questions"] == 16 and entry["ambiguous"] <= 2
        assert (
            entry["tolerance"] == (1e-3 if folder == "fp16" else 1e-4) and entry["max_abs_error"] <= entry["tolerance"]
        )
        assert entry["tokens_equal"] is (True if name in ("blip-vqa", "blip-captioning") else None)
        bundle = Bundle.open(out / folder)
        assert bundle.hash_errors() == [] and {GOLDEN_FILE, "tokenizer.json"} <= set(bundle.manifest.files)
        methods = [method.name for method in bundle.manifest.methods]
        assert methods == METHODS.get(name, ["image_encoder", "text_encoder"])
        assert len(bundle.text_golden().texts) == 8
    if backend == "executorch":
        # One delegate more than drops: nothing but what a drop needs has left XNNPACK.
        assert {**entries["encoders"]["delegates"], "decode": 1} == {**dict.fromkeys(methods, 2), "decode": 1}
        assert [w for w in entries["encoders"]["warnings"] if "outside XNNPACK" in w] == []
    else:
        assert result["kept_set_agreement"] > 0.9
        assert result["fp16_max_abs_error"] < result["fp16_declared_max_abs_error"] < 1
        assert (out / "fp16" / f"{bundle.manifest.model_type}_fp16_image.mlpackage").is_dir()
    assert runtime_tests([str(out), "--rounds", "0", "--json"]) == 0
    for report in json.loads(capsys.readouterr().out)["bundles"]:
        assert {check["status"] for check in report["checks"]} == {"pass"}


def edit_manifest(folder, change):
    value = json.loads((folder / MANIFEST_FILE).read_text())
    change(value)
    (folder / MANIFEST_FILE).write_text(json.dumps(value))


def edit_golden(folder, change):
    path = folder / GOLDEN_FILE
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata=metadata)
    edit_manifest(folder, lambda v: v["files"].update({GOLDEN_FILE: sha256(path)}))


def failed(capsys, folder):
    """Names of the checks that fail, with what they found."""
    code = runtime_tests([str(folder), "--rounds", "0", "--json"])
    checks = json.loads(capsys.readouterr().out)["bundles"][0]["checks"]
    wrong = {check["name"]: check["detail"] for check in checks if check["status"] == "fail"}
    assert code == (1 if wrong else 0)
    return wrong


def test_damage_is_noticed(exported, capsys, tmp_path):
    out, _ = exported("executorch", "clip", capsys)
    cases = {
        "outputs": (lambda f: edit_golden(f, lambda t: t["text_embeds"].add_(0.01)), "text_embeds", "1.0e-02"),
        "nan": (lambda f: edit_golden(f, lambda t: t["image_embeds"].fill_(torch.nan)), "image_embeds", "nan"),
        "silence": (lambda f: edit_golden(f, lambda t: t.pop("image_embeds")), "golden", "lacks image_embeds"),
        "tokens": (
            lambda f: edit_manifest(f, lambda v: v["text"].update(prefix=[7])),
            "texts",
            "other token ids",
        ),
        "shape": (
            lambda f: edit_manifest(f, lambda v: v["methods"][1]["outputs"][0].update(shape=[1, 9])),
            "signatures",
            "text_embeds",
        ),
        "file": (lambda f: (f / "tokenizer_config.json").write_text("{}"), "hashes", "has changed"),
        "program": (
            lambda f: (f / "model.pte").write_bytes((f / "model.pte").read_bytes()[:1000]),
            "load",
            "cannot be loaded",
        ),
    }
    for name, (damage, check, said) in cases.items():
        folder = shutil.copytree(out / "encoders", tmp_path / name)
        damage(folder)
        wrong = failed(capsys, folder)
        assert said in wrong[check], name
    folder = shutil.copytree(exported("coreml", "blip-vqa", capsys)[0] / "fp16", tmp_path / "answers")
    assert failed(capsys, folder) == {}
    edit_golden(folder, lambda t: t["tokens"].copy_((t["tokens"] + 1) % 9))
    assert set(failed(capsys, folder)) >= {"tokens"}


def test_timing_against_another_bundle(exported, capsys, tmp_path):
    out, _ = exported("executorch", "blip-vqa", capsys)
    copy = shutil.copytree(out, tmp_path / "copy")
    code = runtime_tests([str(out), "--against", str(copy), "--rounds", "3", "--json"])
    result = json.loads(capsys.readouterr().out)
    (bundle,) = result["bundles"]
    assert 0.2 < result["speedup"][str(out / "encoders")]["min"] < 5  # the same program twice
    assert code == 0 and list(bundle["latency_ms"]) == ["first_token", "vision_encoder", "prefill", "next_token"]
    # A first token is an image, a question and a decode.
    assert bundle["latency_ms"]["first_token"]["min"] > bundle["latency_ms"]["prefill"]["min"] > 0
    assert bundle["memory"]["program_mb"] > 0


def test_requests_that_were_not_verified(exported, capsys):
    """Other requests, each twice and out of order: nothing of one may stay in the caches for the next."""
    out, _ = exported("executorch", "blip-vqa", capsys)
    source = load_encoders(pruned_folder("blip-vqa"))
    golden = encoder_reference(source, synthetic_encoder_requests(source, count=3, seed=11))
    runner = EncoderRunner(out / "encoders")
    for index in (0, 2, 1, 1, 0):
        pixels = golden.tensors["pixel_values"][index : index + 1]
        answer = runner.respond(pixels, runner.input_ids(golden.texts[index]))
        assert answer.tokens == golden.tokens[index]
        assert (torch.cat(answer.logits) - golden.logits[index]).abs().max() <= 1e-4


def test_a_wrong_program_is_not_written(exported, capsys, monkeypatch, tmp_path):
    out, _ = exported("executorch", "clip", capsys)
    program, delegation = (
        (out / "encoders" / "model.pte").read_bytes(),
        Bundle.open(out / "encoders").manifest.delegation,
    )
    # What lowering this folder gives, without the time that it takes.
    lowered = Lowered(program=program, delegation=delegation)
    monkeypatch.setattr(executorch_encoders, "lower", lambda methods, constants: lowered)
    honest = executorch_encoders.encoder_reference

    def other(source, requests, **options):
        golden = honest(source, requests, **options)
        golden.tensors["text_embeds"] += 1.0
        return golden

    arguments = [str(pruned_folder("clip")), "-o", str(tmp_path / "b"), "--verify", "2"]
    monkeypatch.setattr(executorch_encoders, "encoder_reference", other)
    assert executorch(arguments) == 1
    err = capsys.readouterr().err
    assert "text_embeds differ by 1.00e+00" in err and "Nothing was written" in err and not list(tmp_path.iterdir())
    monkeypatch.setattr(executorch_encoders, "encoder_reference", honest)
    cut = Lowered(program=program[:2000], delegation=delegation)
    monkeypatch.setattr(executorch_encoders, "lower", lambda methods, constants: cut)
    assert executorch(arguments) == 1
    assert "does not run" in capsys.readouterr().err and not list(tmp_path.iterdir())
