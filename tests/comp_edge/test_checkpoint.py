"""Pruned folders: loaded equals saved, the dense weights are never held, damage is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import comp_edge
from comp_edge.checkpoint import load_any, load_dense, load_processor, resolve
from comp_edge.errors import InputError
from comp_edge.surgery import apply_plan
from tests.comp_edge.plans import tiny_plan


@pytest.fixture(scope="module")
def saved(make_model: Any, processor: Any, tiny_task: Any, tmp_path_factory: Any) -> tuple[Any, Path]:
    model = make_model(seed=1)
    plan = tiny_plan(prompt=tiny_task.prompt_length - 16)
    apply_plan(model, plan)
    folder = tmp_path_factory.mktemp("pruned") / "model"
    comp_edge.save_pretrained(model, plan, folder, processor=processor)
    return model, folder


@pytest.fixture
def folder(saved: tuple[Any, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved[1], tmp_path / "copy"))


@torch.no_grad()
def test_loaded_equals_saved(saved: tuple[Any, Path], tiny_task: Any) -> None:
    model, folder = saved
    loaded = comp_edge.load_pretrained(folder)
    assert isinstance(loaded, transformers.LlavaForConditionalGeneration)
    assert loaded.comp_edge_plan == comp_edge.Plan.load(folder) == model.comp_edge_plan
    batch = tiny_task.batch("test", list(range(6)))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    assert (loaded(**inputs).logits - model(**inputs).logits).abs().max() <= 1e-6
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(**inputs, **options), model.generate(**inputs, **options))
    assert tiny_task.generate(loaded, batch) == tiny_task.generate(model, batch)


def test_a_training_step_changes_the_loss(saved: tuple[Any, Path], tiny_task: Any) -> None:
    loaded = comp_edge.load_pretrained(saved[1]).train()
    batch = tiny_task.batch("train", list(range(6)))
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=1e-3)
    before = tiny_task.loss(loaded, batch)
    before.backward()
    optimizer.step()
    assert tiny_task.loss(loaded, batch) < before


def test_saved_twice_is_the_same(saved: tuple[Any, Path], tmp_path: Path, processor: Any) -> None:
    loaded = comp_edge.load_pretrained(saved[1])
    comp_edge.save_pretrained(loaded, loaded.comp_edge_plan, tmp_path / "again", processor=processor)
    for name in ("config.json", "plan.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved[1] / name).read_bytes()


def test_the_config_speaks_transformers(saved: tuple[Any, Path]) -> None:
    config = transformers.AutoConfig.from_pretrained(saved[1])
    vision, text = config.vision_config, config.text_config
    assert vision.per_layer_config[1].intermediate_size == 32 and vision.per_layer_config[1].num_attention_heads == 3
    assert vision.per_layer_config[2].skip == ["mlp"] and text.per_layer_config[1].skip == ["attention"]
    assert text.per_layer_config[0].num_key_value_heads == 2
    assert json.loads((saved[1] / "config.json").read_text())["comp_edge"]["base"] == "tiny"


def test_the_processor_comes_along(saved: tuple[Any, Path], tiny_task: Any) -> None:
    processor = transformers.AutoProcessor.from_pretrained(saved[1])
    question = tiny_task.split("val").questions[0][1]
    assert type(tiny_task)(processor).prompt_ids(question) == tiny_task.prompt_ids(question)


def test_no_dense_tensor_is_ever_held(saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense feed-forward of layer 1 has 64 channels: no real tensor of that many rows appears for it."""
    from comp_edge import surgery

    devices = []
    original = surgery.keep_outputs

    def spy(linear: Any, rows: list[int]) -> None:
        devices.append(linear.weight.device.type)
        original(linear, rows)

    monkeypatch.setattr(surgery, "keep_outputs", spy)
    comp_edge.load_pretrained(saved[1])
    assert devices and set(devices) == {"meta"}


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="model.safetensors' are corrupt or truncated"):
        comp_edge.load_pretrained(folder)


def test_missing_extra_and_misshapen_tensors(folder: Path) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = "model.language_model.norm.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, weights)
    with pytest.raises(InputError, match=f"lacks tensor '{name}'"):
        comp_edge.load_pretrained(folder)
    save_file({**tensors, "stray": torch.zeros(1)}, weights)
    with pytest.raises(InputError, match="has an unexpected tensor 'stray'"):
        comp_edge.load_pretrained(folder)
    save_file({**tensors, name: torch.zeros(7)}, weights)
    with pytest.raises(InputError, match=r"shape \[7\], the plan says \[32\]"):
        comp_edge.load_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("plan.json", "{", "plan.json' is not valid JSON"),
        ("plan.json", "[]", "must hold a JSON object"),
        ("plan.json", '{"schema": 9}', "schema 9; this version reads schema 1"),
        ("config.json", "{", "config.json' is not valid JSON"),
        ("config.json", '{"model_type": "nonsense"}', "unknown model type 'nonsense'"),
        ("config.json", '{"model_type": "bert"}', "model type 'bert' is not supported; supported: .*llava"),
    ],
)
def test_damaged_json(folder: Path, file: str, text: str, message: str) -> None:
    (folder / file).write_text(text)
    with pytest.raises(InputError, match=message):
        comp_edge.load_pretrained(folder)


def test_what_is_no_pruned_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        comp_edge.load_pretrained(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is not a pruned model: it has no plan.json"):
        comp_edge.load_pretrained(tmp_path)
    with pytest.raises(InputError, match="is not a model folder"):
        load_dense(tmp_path)
    with pytest.raises(InputError, match="has no usable processor"):
        load_processor(tmp_path)


def test_model_references(saved: tuple[Any, Path], tmp_path: Path) -> None:
    assert resolve("org/name") == "org/name" and resolve(tmp_path) == tmp_path
    with pytest.raises(InputError, match="unknown model 'lava-digits': give a shipped model"):
        resolve("lava-digits")
    assert load_any(saved[1]).comp_edge_plan.base == "tiny"


def test_a_model_is_saved_with_its_own_plan_only(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, _ = saved
    other = model.comp_edge_plan.with_tokens("language", (model.comp_edge_plan.streams["language"].tokens[0], 9, 9))
    with pytest.raises(InputError, match="not pruned to the plan"):
        comp_edge.save_pretrained(model, other, tmp_path / "x")
    assert not (tmp_path / "x").exists()
