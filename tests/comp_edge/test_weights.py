"""Checkpoints that cannot be read say so in one sentence; those that can are written and read without a second copy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from comp_edge.errors import InputError
from comp_edge.weights import INDEX_FILE, WEIGHTS_FILE, check_checkpoint, check_files, check_unquantized, check_version

OURS = int(transformers.__version__.split(".")[0])
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def index_of(*files: str) -> dict[str, Any]:
    """An index that spreads tensors over these files."""
    return {"metadata": {"total_size": 1}, "weight_map": {f"layers.{i}.weight": name for i, name in enumerate(files)}}


def refusal(call: Any, *args: Any, **options: Any) -> str:
    """The message of the InputError, which is one sentence."""
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    return message


# ---- versions


@pytest.mark.parametrize(
    "version", [None, transformers.__version__, f"{OURS}.0.0", f"{OURS}.999.1.dev0", "", "unknown", 5]
)
@pytest.mark.parametrize("pruned", [False, True])
def test_minor_versions_never_matter(version: Any, pruned: bool) -> None:
    check_version({"transformers_version": version}, where="m", pruned=pruned)
    check_version({}, where="m", pruned=pruned)


def test_older_dense_checkpoints_are_transformers_own_business() -> None:
    check_version({"transformers_version": f"{OURS - 1}.47.1"}, where="m")
    message = refusal(check_version, {"transformers_version": f"{OURS - 1}.47.1"}, where="m", pruned=True)
    assert (
        f"'m' was pruned with transformers {OURS - 1}.47.1" in message
        and f"install transformers {OURS - 1}.x" in message
    )
    assert transformers.__version__ in message


@pytest.mark.parametrize("pruned", [False, True])
def test_a_newer_major_version_is_refused(pruned: bool) -> None:
    message = refusal(check_version, {"transformers_version": f"{OURS + 1}.0.0"}, where="m", pruned=pruned)
    assert f"transformers {OURS + 1}.0.0" in message and f"install transformers {OURS + 1}.x" in message


# ---- quantization


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "gptq"),
        ({"quantization_config": {"bits": 8}}, "by a method that its config does not name"),
    ],
)
def test_quantized(config: dict[str, Any], method: str) -> None:
    message = refusal(check_unquantized, config, where="org/name")
    assert message.startswith(f"model 'org/name' is quantized ({method}); comp-edge prunes unquantized weights")


@pytest.mark.parametrize(
    "config", [{}, {"quantization_config": None}, {"quantization_config": {}}, {"text_config": {"a": 1}}]
)
def test_not_quantized(config: dict[str, Any]) -> None:
    check_unquantized(config, where="m")


# ---- files


def test_whole_checkpoints() -> None:
    assert check_files(["config.json", WEIGHTS_FILE, "pytorch_model.bin"], where="m") == [WEIGHTS_FILE]
    assert check_files([*SHARDS, INDEX_FILE], index_of(*SHARDS, SHARDS[0]), where="m") == SHARDS


@given(present=st.sets(st.sampled_from(SHARDS)))
def test_shards_are_complete_or_the_first_missing_one_is_named(present: set[str]) -> None:
    index = index_of(*SHARDS)
    missing = [name for name in SHARDS if name not in present]
    if not missing:
        assert check_files({*present, INDEX_FILE}, index, where="m") == SHARDS
        return
    message = refusal(check_files, {*present, INDEX_FILE}, index, where="m")
    assert message.startswith("model 'm' is incomplete: ") and repr(missing[0]) in message
    assert ("more" in message) == (len(missing) > 1)


@pytest.mark.parametrize(
    ("names", "index", "words"),
    [
        (SHARDS[:2], None, [repr(SHARDS[0]), f"no {INDEX_FILE}"]),
        (["config.json", "pytorch_model.bin"], None, ["'pytorch_model.bin'", "and nothing else"]),
        (["pytorch_model-00001-of-00002.bin"], None, ["'pytorch_model-00001-of-00002.bin'"]),
        (["llava-q4.gguf"], None, ["'llava-q4.gguf'"]),
        (["model.fp16.safetensors"], None, ["'model.fp16.safetensors'", WEIGHTS_FILE]),
        (["config.json", "training_args.bin"], None, ["has no weights"]),
        ([], None, ["has no weights"]),
        ([INDEX_FILE], {"weight_map": {}}, ["must hold a 'weight_map'"]),
        ([INDEX_FILE], {"weight_map": {"a": 1}}, ["must hold a 'weight_map'"]),
        ([INDEX_FILE], [], ["must hold a 'weight_map'"]),
        ([INDEX_FILE], index_of("../../secret.safetensors"), ["names '../../secret.safetensors'"]),
        ([INDEX_FILE, "a.bin"], index_of("a.bin"), ["names 'a.bin'"]),
    ],
)
def test_unreadable_checkpoints(names: list[str], index: Any, words: list[str]) -> None:
    message = refusal(check_files, names, index, where="m")
    assert message.startswith("model 'm'") and all(word in message for word in words)


def test_a_folder(tmp_path: Path) -> None:
    config: dict[str, Any] = {"transformers_version": transformers.__version__}
    assert "has no weights" in refusal(check_checkpoint, tmp_path, config)
    (tmp_path / INDEX_FILE).write_text("{")
    assert "is not valid JSON" in refusal(check_checkpoint, tmp_path, config)
    (tmp_path / INDEX_FILE).write_text(json.dumps(index_of(*SHARDS)))
    assert f"{SHARDS[0]!r} and 2 more are missing" in refusal(check_checkpoint, tmp_path, config)
    for name in SHARDS:
        (tmp_path / name).write_bytes(b"weights")
    check_checkpoint(tmp_path, config)
    assert "is quantized (awq)" in refusal(
        check_checkpoint, tmp_path, {**config, "quantization_config": {"quant_method": "awq"}}
    )


def test_pointers_of_git_lfs_are_no_weights(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 988097824\n"
    (tmp_path / WEIGHTS_FILE).write_text(pointer)
    message = refusal(check_checkpoint, tmp_path, {})
    assert "model.safetensors' are a Git LFS pointer" in message and "git lfs pull" in message


# ---- memory

MEASURE = """
import sys, torch, comp_edge
from pathlib import Path
from comp_edge.checkpoint import load_pretrained
from comp_edge.units import dense_plan
from tests.tiny import make_model

def peak(reset=False):
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["VmHWM" if not reset else "VmRSS"].split()[0]) / 1024

def size(model):
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20

folder, mode = sys.argv[1:]
if mode == "save":
    model = make_model(width=512, ffn=8192, vision_layers=4, language_layers=4)
    plan = dense_plan(model, base="x", prompt_tokens=8)
    comp_edge.apply_plan(model, plan)
    comp_edge.save_pretrained(model, plan, folder + "/warm")  # imports
    before = peak(reset=True)
    comp_edge.save_pretrained(model, plan, folder + "/model")
else:
    load_pretrained(folder + "/warm")
    before = peak(reset=True)
    model = load_pretrained(folder + "/model", dtype=torch.bfloat16 if mode == "convert" else None)
    sum(float(p.sum()) for p in model.parameters())  # what is mapped is read
print((peak() - before) / size(model), size(model))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_weights_are_never_held_twice(tmp_path: Path) -> None:
    """Growth of the peak over the size of the model: nothing while saving, once while loading (converting, too)."""

    def grown(mode: str) -> float:
        command = [sys.executable, "-c", MEASURE, str(tmp_path), mode]
        root = Path(__file__).resolve().parents[2]
        result = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False, timeout=300)
        assert result.returncode == 0, result.stderr
        share, size = map(float, result.stdout.split()[-2:])
        assert size > 100
        return share

    assert grown("save") <= 0.15
    assert grown("load") <= 1.15
    assert grown("convert") <= 1.3
