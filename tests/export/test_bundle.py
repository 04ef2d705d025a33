"""The bundle folder: manifest, hashes, golden file, and errors that say where."""

import json
import math

import jsonschema
import pytest
import torch

from export.bundle import (
    GOLDEN_FILE,
    MANIFEST_FILE,
    SCHEMA_FILE,
    Bundle,
    BundleError,
    Golden,
    find_bundles,
    finish_bundle,
    json_schema,
    largest,
    read_golden,
    write_golden,
)

TENSOR = {"name": "x", "shape": [1, {"min": 1, "max": 9}], "dtype": "float32", "layout": "batch, token"}
FIELDS = {
    "backend": "executorch",
    "profile": "scheduled",
    "model_type": "llava",
    "base": "tiny",
    "precision": "float32",
    "methods": [{"name": "m", "file": "model.pte", "inputs": [TENSOR], "outputs": []}],
    "constants": {"use_kv_cache": True, "get_eos_ids": [2]},
    "image": {
        "height": 8,
        "width": 8,
        "resample": "bicubic",
        "center_crop": False,
        "rescale": 1 / 255,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    },
    "prompt": {
        "template": "<image>{question}",
        "image_token": "<image>",
        "image_token_id": 3,
        "image_tokens": 4,
        "max_text_tokens": 9,
        "pad_token_id": 0,
        "eos_token_ids": [2],
        "max_new_tokens": 8,
    },
    "tokens": {"vision": [5, 5]},
}


def golden(n=3):
    lengths = range(1, n + 1)
    return Golden(
        questions=tuple(f"q{i} é" for i in range(n)),
        pixel_values=torch.randn(n, 3, 8, 8),
        image_features=torch.randn(n, 4, 6),
        tokens=tuple(tuple(range(length)) for length in lengths),
        logits=tuple(torch.randn(length, 5) for length in lengths),
    )


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "model.pte").write_bytes(b"program")
    write_golden(folder / GOLDEN_FILE, golden())
    finish_bundle(folder, **FIELDS)
    return folder


def edit(folder, change):
    value = json.loads((folder / MANIFEST_FILE).read_text())
    change(value)
    (folder / MANIFEST_FILE).write_text(json.dumps(value))


def test_the_shipped_json_schema_is_current_and_accepts_a_manifest(bundle):
    schema = json.loads(SCHEMA_FILE.read_text())
    assert schema == json_schema()
    jsonschema.validate(json.loads((bundle / MANIFEST_FILE).read_text()), schema)


def test_round_trip(bundle):
    opened = Bundle.open(bundle)
    assert opened.hash_errors() == []
    assert set(opened.manifest.files) == {"model.pte", GOLDEN_FILE}
    assert opened.manifest.constants == {"use_kv_cache": True, "get_eos_ids": [2]}
    assert opened.manifest.method("m").inputs[0].shape[1].max == 9
    assert {"python", "torch", "executorch"} <= set(opened.manifest.toolchain)


def test_manifests_from_before_there_were_encoders(bundle):
    """Entries were added to schema 1: what was valid stays valid."""
    edit(bundle, lambda value: (value.pop("text"), value.pop("answer")))
    value = json.loads((bundle / MANIFEST_FILE).read_text())
    jsonschema.validate(value, json.loads(SCHEMA_FILE.read_text()))
    manifest = Bundle.open(bundle).manifest
    assert manifest.prompt.image_tokens == 4 and manifest.text is None and manifest.answer is None


def test_a_request_is_tokenized_in_one_way(bundle):
    text = {"max_tokens": 8, "prefix": [1], "suffix": [2], "pad_token_id": 0}
    edit(bundle, lambda value: value.update(text=text))
    with pytest.raises(BundleError, match="exactly one of 'prompt' and 'text'"):
        Bundle.open(bundle)
    edit(bundle, lambda value: value.update(prompt=None))
    assert Bundle.open(bundle).manifest.text.padding == "right"


def test_golden_round_trip(tmp_path):
    before = golden()
    write_golden(tmp_path / "g.safetensors", before)
    after = read_golden(tmp_path / "g.safetensors")
    assert after.questions == before.questions and after.tokens == before.tokens
    assert torch.equal(after.pixel_values, before.pixel_values)
    assert all(torch.equal(a, b) for a, b in zip(after.logits, before.logits, strict=True))
    chosen = after.take([2, 0])
    assert chosen.tokens == ((0, 1, 2), (0,)) and torch.equal(chosen.pixel_values[1], before.pixel_values[0])


def test_hashes_name_what_differs(bundle):
    (bundle / "model.pte").write_bytes(b"other")
    (bundle / GOLDEN_FILE).unlink()
    (bundle / "stray").write_text("")
    errors = Bundle.open(bundle).hash_errors()
    assert ["golden.safetensors is missing" in errors, "stray is not in the manifest" in errors] == [True, True]
    assert any(error.startswith("model.pte has changed") for error in errors)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda v: v.update(schema=2), "schema 2"),
        (lambda v: v.pop("methods"), "methods"),
        (lambda v: v.update(surprise=1), "surprise"),
        (lambda v: v["methods"][0]["inputs"][0].update(dtype="int8"), "methods.0.inputs.0.dtype"),
        (lambda v: v["methods"].append(v["methods"][0]), "different names"),
        (lambda v: v["files"].pop("model.pte"), "model.pte"),
        (lambda v: v["files"].update({"../evil": "0"}), "../evil"),
    ],
)
def test_an_invalid_manifest_says_where(bundle, change, where):
    edit(bundle, change)
    with pytest.raises(BundleError, match=where.replace(".", r"\.")):
        Bundle.open(bundle)


def test_what_is_no_bundle(tmp_path, bundle):
    with pytest.raises(BundleError, match="is not a folder"):
        Bundle.open(tmp_path / "nothing")
    with pytest.raises(BundleError, match="it has no manifest.json"):
        Bundle.open(tmp_path)
    (bundle / MANIFEST_FILE).write_text("{")
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.open(bundle)
    (bundle / MANIFEST_FILE).write_text("[]")
    with pytest.raises(BundleError, match="list"):
        Bundle.open(bundle)


def test_find_bundles(tmp_path, bundle):
    assert find_bundles(bundle) == [bundle]
    assert find_bundles(tmp_path) == [bundle]
    with pytest.raises(BundleError, match="not a bundle"):
        find_bundles(tmp_path / "none")


@pytest.mark.parametrize("damage", ["truncate", "inconsistent", "no questions"])
def test_a_damaged_golden_file(tmp_path, damage):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "g.safetensors"
    write_golden(path, golden())
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        tensors = load_file(path)
        if damage == "inconsistent":
            tensors["lengths"][0] = 7
        save_file(tensors, path, metadata=None if damage == "no questions" else {"questions": '["a", "b", "c"]'})
    with pytest.raises(BundleError, match="golden file"):
        read_golden(path)


def test_a_nan_is_the_largest_error():
    assert largest([0.1, 0.3, 0.2]) == 0.3 and largest([]) == 0.0
    assert math.isnan(largest([0.1, float("nan"), 0.2]))
