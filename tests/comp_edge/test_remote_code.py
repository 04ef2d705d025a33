"""Pruned folders through transformers' auto classes, from a folder and from a (local) Hub cache; and what refuses them."""

from __future__ import annotations

import importlib.abc
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import CommitOperationAdd, metadata_load
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
)

import comp_edge
from comp_edge.auto import PrunedModel
from comp_edge.card import amount
from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.plan import Plan, StreamPlan
from comp_edge.remote_code import REFUSAL, auto_classes, local_folder
from comp_edge.surgery import apply_plan
from tests.comp_edge.plans import family_plan, layer, tiny_plan
from tests.families import CASES, FamilyCase

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_ID = "somebody/tiny-pruned"


@pytest.fixture(autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where transformers puts the code of folders: not among the user's. Whether code may run is never asked for."""
    from transformers import dynamic_module_utils

    cache = tmp_path_factory.mktemp("modules")
    before = set(sys.modules)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asks whether it may run the code"))
    yield cache
    for name in set(sys.modules) - before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def prompt(tiny_task: Any) -> int:
    """Text tokens of the task's prompts."""
    return tiny_task.prompt_length - 16


@pytest.fixture(scope="module")
def folder(make_model: Any, processor: Any, prompt: int, tmp_path_factory: Any) -> Path:
    model = make_model(seed=1)
    plan = tiny_plan(prompt=prompt)
    apply_plan(model, plan)
    return comp_edge.save_pretrained(model, plan, tmp_path_factory.mktemp("pruned") / "model", processor=processor)


@pytest.fixture(scope="module")
def gentle(make_model: Any, prompt: int, tmp_path_factory: Any) -> dict[str, Path]:
    """Folders in which no tensor has another shape than in the dense model."""
    full, first = layer(range(4), range(64)), 16 + prompt
    whole = {"vision": StreamPlan(layers=(full,) * 3, tokens=(17,) * 3)}
    whole["language"] = StreamPlan(layers=(full,) * 3, tokens=(first,) * 3)
    tokens = {
        "vision": StreamPlan(layers=(full,) * 3, tokens=(17, 12, 9)),
        "language": StreamPlan(layers=(full,) * 3, tokens=(8 + prompt, 12, 7)),
    }
    skips = whole | {"language": StreamPlan(layers=(full, layer((), range(64)), full), tokens=(first,) * 3)}
    found = {}
    for name, streams in {"tokens": tokens, "skips": skips}.items():
        model, plan = make_model(seed=1), Plan(model_type="llava", base="tiny", streams=streams)
        apply_plan(model, plan)
        found[name] = comp_edge.save_pretrained(model, plan, tmp_path_factory.mktemp("gentle") / name)
    return found


@pytest.fixture
def hub(folder: Path, tmp_path: Path) -> Path:
    """A Hub cache as a download leaves it, of a repository that was pushed from the folder."""
    repository = tmp_path / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    for name in ("main", "v1"):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(COMMIT)
    return tmp_path / "hub"


def assert_same(found: Any, folder: Path) -> None:
    """The model is what `load_pretrained` gives: class, plan, config, every tensor."""
    wanted = comp_edge.load_pretrained(folder)
    assert type(found) is type(wanted) is LlavaForConditionalGeneration
    assert found.comp_edge_plan == wanted.comp_edge_plan and not found.training
    assert found.config.to_dict() == wanted.config.to_dict()
    assert found.generation_config.to_dict() == wanted.generation_config.to_dict()
    state, other = found.state_dict(), wanted.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


# ---- which auto classes


@pytest.mark.parametrize(
    ("architecture", "model_type", "named", "not_named"),
    [
        ("LlavaForConditionalGeneration", "llava", "AutoModelForImageTextToText", "AutoModelForCausalLM"),
        (
            "SmolVLMForConditionalGeneration",
            "smolvlm",
            "AutoModelForImageTextToText",
            "AutoModelForVisualQuestionAnswering",
        ),
        (
            "InternVLForConditionalGeneration",
            "internvl",
            "AutoModelForImageTextToText",
            "AutoModelForVisualQuestionAnswering",
        ),
        ("BlipForQuestionAnswering", "blip", "AutoModelForVisualQuestionAnswering", "AutoModelForImageTextToText"),
        ("BlipForConditionalGeneration", "blip", "AutoModelForImageTextToText", "AutoModelForVisualQuestionAnswering"),
        ("BlipForImageTextRetrieval", "blip", "AutoModel", "AutoModelForImageTextToText"),
        ("CLIPModel", "clip", "AutoModelForZeroShotImageClassification", "AutoModelForImageTextToText"),
        ("Siglip2Model", "siglip2", "AutoModelForZeroShotImageClassification", "AutoModelForImageTextToText"),
    ],
)
def test_auto_classes_are_transformers_own(architecture: str, model_type: str, named: str, not_named: str) -> None:
    found = auto_classes(architecture, model_type)
    assert named in found and "AutoModel" in found and not_named not in found
    assert all(hasattr(transformers, name) for name in found)


# ---- loading


def test_every_auto_class_in_the_map_gives_the_model(folder: Path) -> None:
    names = json.loads((folder / "config.json").read_text())["auto_map"]
    assert "AutoModelForImageTextToText" in names
    for name in names:
        assert_same(getattr(transformers, name).from_pretrained(folder, trust_remote_code=True), folder)


@torch.no_grad()
def test_it_answers_the_same(folder: Path, tiny_task: Any) -> None:
    batch = tiny_task.batch("test", list(range(3)))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    found = AutoModel.from_pretrained(folder, trust_remote_code=True)
    wanted = comp_edge.load_pretrained(folder)
    assert torch.equal(found(**inputs).logits, wanted(**inputs).logits)
    assert torch.equal(found.generate(**inputs, max_new_tokens=3), wanted.generate(**inputs, max_new_tokens=3))


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "bfloat16", "device_map": "cpu"}, torch.bfloat16),
        ({"dtype": "auto", "device_map": None, "low_cpu_mem_usage": True, "use_safetensors": True}, torch.float32),
        ({"device_map": {"": "cpu"}, "attn_implementation": "sdpa"}, torch.float32),
    ],
)
def test_options(folder: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **options)
    assert {p.dtype for p in model.parameters()} == {dtype} and {p.device.type for p in model.parameters()} == {"cpu"}
    wanted = comp_edge.load_pretrained(folder).state_dict()
    assert all(torch.equal(value, wanted[name].to(value.dtype)) for name, value in model.state_dict().items())
    # Tables of the rotary embedding are computed in full precision, whatever the weights are kept in.
    assert all(b.dtype != torch.bfloat16 for name, b in model.named_buffers() if "inv_freq" in name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "option 'quantization_config' does not apply"),
        ({"ignore_mismatched_sizes": True}, "option 'ignore_mismatched_sizes' does not apply"),
        ({"output_loading_info": True}, "option 'output_loading_info' does not apply"),
        ({"use_cache": False}, "option 'use_cache' does not apply"),
        ({"device_map": "balanced"}, "device_map 'balanced' is not one device"),
        ({"device_map": {"model": "cpu"}}, "is not one device"),
        ({"dtype": "int8"}, "dtype 'int8' is no floating-point type"),
        ({"attn_implementation": "eager"}, "attn_implementation='eager' cannot be chosen"),
        ({"output_hidden_states": True}, "option output_hidden_states=True cannot be given"),
        ({"image_seq_length": 9}, "option image_seq_length=9 cannot be given"),
    ],
)
def test_what_cannot_be_honoured_is_refused(folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **options)
    assert "\n" not in str(caught.value)


def test_an_unknown_data_type(folder: Path) -> None:
    with pytest.raises(InputError, match="dtype 'float31' is no floating-point type"):
        PrunedModel.from_pretrained(folder, dtype="float31")


def test_no_model_from_a_config_alone(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(InputError, match="cannot be made from its config alone"):
        AutoModel.from_config(config, trust_remote_code=True)


def test_a_pipeline(folder: Path, tiny_task: Any) -> None:
    pipe = transformers.pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
    assert_same(pipe.model, folder)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_family(case: FamilyCase, tmp_path: Path) -> None:
    """Its own auto classes give the pruned model, its own class refuses, and its card is one that the Hub reads."""
    options = {"feature_layer": -1} if case.name == "llava" else {}  # three layers that are used
    model = case.model(seed=1, **options)
    plan = family_plan(model, family_of(model).request(model, case.inputs([0])))
    apply_plan(model, plan)
    folder = comp_edge.save_pretrained(model, plan, tmp_path / "model")
    wanted = model.state_dict()
    for name in json.loads((folder / "config.json").read_text())["auto_map"]:
        found = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
        assert type(found) is type(model) and found.comp_edge_plan == plan
        state = found.state_dict()
        assert state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in state)
    with pytest.raises(OSError, match=REFUSAL):
        type(model).from_pretrained(folder)
    assert metadata_load(folder / "README.md")["library_name"] == "transformers"
    dense = case.model(seed=1, **options).num_parameters()
    assert f"| {amount(dense)} | {amount(model.num_parameters())} (" in (folder / "README.md").read_text()


# ---- what needs no code, and what refuses to go on without


def test_config_and_processor_need_no_remote_code(folder: Path, modules: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is transformers.LlavaConfig
    assert type(AutoProcessor.from_pretrained(folder)) is transformers.LlavaProcessor
    assert transformers.AutoTokenizer.from_pretrained(folder).vocab_size > 0
    assert transformers.AutoImageProcessor.from_pretrained(folder).size
    assert not list(modules.rglob("modeling_comp_edge.py"))


@pytest.mark.parametrize("kind", ["tokens", "skips"])
def test_without_remote_code_nothing_is_loaded_silently(gentle: dict[str, Path], kind: str) -> None:
    """Every tensor has the dense shape: transformers alone would load these, wrong or partly random, and only warn."""
    path = gentle[kind]
    for load in (
        AutoModelForImageTextToText.from_pretrained,
        AutoModel.from_pretrained,
        LlavaForConditionalGeneration.from_pretrained,
        transformers.CLIPVisionModel.from_pretrained,
        transformers.LlamaForCausalLM.from_pretrained,
    ):
        with pytest.raises(OSError, match=REFUSAL):
            load(path)
        with pytest.raises(OSError, match=REFUSAL):
            load(path, ignore_mismatched_sizes=True)
    assert_same(AutoModel.from_pretrained(path, trust_remote_code=True), path)


def test_without_the_mark_it_would_be(gentle: dict[str, Path], tmp_path: Path) -> None:
    """Why the mark is there: should transformers refuse by itself one day, it can go."""
    copy = Path(shutil.copytree(gentle["skips"], tmp_path / "unmarked"))
    config = json.loads((copy / "config.json").read_text())
    del config["transformers_weights"]
    (copy / "config.json").write_text(json.dumps(config))
    _, info = LlavaForConditionalGeneration.from_pretrained(copy, output_loading_info=True)
    assert "model.language_model.layers.1.self_attn.q_proj.weight" in info["missing_keys"]


def test_without_comp_edge_transformers_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name == "comp_edge":
                raise ModuleNotFoundError("No module named 'comp_edge'")

    monkeypatch.delitem(sys.modules, "comp_edge")
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(ImportError, match="not found in your environment: comp_edge"):
        AutoModel.from_pretrained(folder, trust_remote_code=True)


# ---- the Hub


@pytest.mark.parametrize("revision", [None, "main", "v1", COMMIT])
def test_a_pushed_repository(hub: Path, folder: Path, revision: str | None) -> None:
    options: dict[str, Any] = {"cache_dir": hub, "trust_remote_code": True}
    if revision is not None:
        options["revision"] = revision
    assert_same(AutoModelForImageTextToText.from_pretrained(HUB_ID, **options), folder)
    assert local_folder(HUB_ID, cache_dir=hub, revision=revision).name == COMMIT
    assert type(AutoProcessor.from_pretrained(HUB_ID, cache_dir=hub)) is transformers.LlavaProcessor


def test_a_pushed_repository_without_remote_code(hub: Path) -> None:
    with pytest.raises(OSError):
        AutoModelForImageTextToText.from_pretrained(HUB_ID, cache_dir=hub)


def test_what_is_nowhere(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'nobody/nothing' is neither a folder nor a repository on the Hub"):
        comp_edge.load_pretrained("nobody/nothing")
    with pytest.raises(InputError, match="neither a folder nor a repository on the Hub"):
        PrunedModel.from_pretrained(HUB_ID, cache_dir=hub, revision="v2")
    for text in ("nowhere", str(tmp_path / "nowhere"), "a/b/c", "./a"):
        with pytest.raises(InputError, match="is not a folder; give the folder of a pruned model, or a hub id"):
            local_folder(text)


def test_the_folder_is_a_complete_repository(folder: Path) -> None:
    """What `upload_folder` would add: all that loading takes, and nothing that the Hub flags."""
    operations = [
        CommitOperationAdd(path_in_repo=path.relative_to(folder).as_posix(), path_or_fileobj=path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    names = [operation.path_in_repo for operation in operations]
    assert names == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_comp_edge.py",
        "plan.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert all(operation.upload_info.size > 0 for operation in operations)
    config = json.loads((folder / "config.json").read_text())
    assert {reference.split(".")[0] + ".py" for reference in config["auto_map"].values()} <= set(names)
    assert "_name_or_path" not in config and config["architectures"] == ["LlavaForConditionalGeneration"]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


# ---- versions and quantization


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"transformers_version": "4.57.1"}, "was pruned with transformers 4.57.1"),
        ({"transformers_version": "99.0.0"}, "was pruned with transformers 99.0.0"),
        ({"quantization_config": {"quant_method": "awq"}}, r"is quantized \(awq\)"),
    ],
)
def test_folders_that_cannot_be_read(folder: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=words):
        comp_edge.load_pretrained(copy)
