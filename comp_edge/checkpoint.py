"""Model folders: saving, loading and finding them. Only safetensors and JSON are read or written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.files import read_json, whole_folder, write_json
from comp_edge.plan import PLAN_FILE, Plan
from comp_edge.reference import REFERENCE_MODELS, asset_folder
from comp_edge.surgery import PLAN_ATTRIBUTE, apply_plan

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def save_pretrained(model: Any, plan: Plan, folder: str | Path, *, processor: Any = None) -> Path:
    """Write a pruned model folder: config, weights, plan and (when given) processor files.

    The folder appears as a whole or not at all.

    Raises:
        InputError: the folder cannot be written to, or the model was not pruned to this plan.
    """
    if getattr(model, PLAN_ATTRIBUTE, None) != plan:
        raise InputError("the model was not pruned to the plan that is to be saved with it: call apply_plan first.")
    with whole_folder(folder) as staging:
        write_model(model, plan, staging, processor=processor)
    return Path(folder)


def write_model(model: Any, plan: Plan, folder: Path, *, processor: Any = None) -> None:
    """The files of `save_pretrained`, into an existing folder."""
    write_json(folder / CONFIG_FILE, pruned_config(model, plan))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    _leave_out_tied(model, tensors)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    plan.save(folder / PLAN_FILE)
    if model.generation_config is not None:
        write_json(folder / "generation_config.json", model.generation_config.to_diff_dict())
    if processor is not None:
        processor.save_pretrained(folder)


def pruned_config(model: Any, plan: Plan) -> dict[str, Any]:
    """The original config, `per_layer_config` in transformers' schema for what differs, and a `comp_edge` section."""
    family = family_of(model)
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    for name, stream in family.streams(model).items():
        sub = family.stream_config(model, name)
        key = next(
            key for key, value in config.items() if isinstance(value, dict) and getattr(model.config, key) is sub
        )
        entries: dict[str, dict[str, Any]] = {}
        for index, layer in enumerate(stream.layers):
            widths = family.layer_config(name, layer).items()
            entry: dict[str, Any] = {k: v for k, v in widths if v and v != getattr(sub, k)}
            skipped = [part for part, view in (("attention", layer.attn), ("mlp", layer.mlp)) if view is None]
            if skipped:
                entry["skip"] = skipped
            if entry:
                entries[str(index)] = entry
        if entries:
            config[key]["per_layer_config"] = entries
            # Without this transformers' own validation of the global widths refuses to read the config.
            config[key]["allow_global_per_layer_attribute_access"] = True
    config["comp_edge"] = {"plan": PLAN_FILE, "base": plan.base, "load_with": "comp_edge.load_pretrained"}
    return config


def _leave_out_tied(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    if not model.config.tie_word_embeddings:
        return
    for name in getattr(model, "_tied_weights_keys", None) or {}:
        tensors.pop(name, None)


def load_pretrained(folder: str | Path) -> Any:
    """A pruned model as an ordinary transformers model, its token schedule active; `generate` works.

    The dense weights are never materialised: the model is built without storage, shrunk, and then filled.

    Raises:
        InputError: the folder is no pruned model, or a file in it is missing, truncated or inconsistent.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is not a folder; give the folder of a pruned model.")
    if not (folder / PLAN_FILE).is_file():
        raise InputError(f"{str(folder)!r} is not a pruned model: it has no {PLAN_FILE}.")
    plan = Plan.load(folder)
    config = _read_config(folder)
    model = _empty_model(config)
    apply_plan(model, plan)
    _fill(model, folder / WEIGHTS_FILE)
    generation = folder / "generation_config.json"
    if generation.is_file():
        model.generation_config = transformers.GenerationConfig.from_dict(
            read_json(generation, what="generation config")
        )
    return model.eval()


def _read_config(folder: Path) -> Any:
    values = read_json(folder / CONFIG_FILE, what="config")
    if not isinstance(values, dict):
        raise InputError(f"config {str(folder / CONFIG_FILE)!r} must hold a JSON object.")
    values.pop("comp_edge", None)
    for value in values.values():
        if isinstance(value, dict):
            # The plan says what each layer keeps; the model is built from the dense widths and then shrunk.
            value.pop("per_layer_config", None)
            value.pop("allow_global_per_layer_attribute_access", None)
    model_type = values.get("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        raise InputError(f"config {str(folder / CONFIG_FILE)!r} has unknown model type {model_type!r}.")
    try:
        config = transformers.CONFIG_MAPPING[model_type].from_dict(values)
    except Exception as error:  # transformers raises many kinds for malformed values
        raise InputError(f"config {str(folder / CONFIG_FILE)!r} is not valid: {_first_line(error)}.") from None
    family_of(config)
    config.architectures = values.get("architectures") or []
    return config


def _empty_model(config: Any) -> Any:
    """The dense model of a config with parameters on the meta device; its buffers are real."""
    from accelerate import init_empty_weights

    name = (config.architectures or [None])[0]
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise InputError(f"config names architecture {name!r}, which transformers {transformers.__version__} lacks.")
    with init_empty_weights(include_buffers=False):
        return kind(config)


def _fill(model: nn.Module, path: Path) -> None:
    """Give every parameter its tensor from a safetensors file; names and shapes must match exactly."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(getattr(model, "_tied_weights_keys", None) or {}) if model.config.tie_word_embeddings else set()
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in sorted(names ^ (set(expected) - tied) - (tied & names)):
                side = "lacks" if name in expected else "has an unexpected"
                raise InputError(f"weights {str(path)!r} {side} tensor {name!r}.")
            tensors = {name: file.get_tensor(name) for name in sorted(names)}
    except FileNotFoundError:
        raise InputError(f"weights {str(path)!r} do not exist.") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"weights {str(path)!r} are corrupt or truncated ({_first_line(error)}).") from None
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise InputError(
                f"tensor {name!r} in {str(path)!r} has shape {list(tensor.shape)}, the plan says {list(expected[name])}."
            )
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def load_dense(ref: str | Path) -> Any:
    """A dense model: a shipped reference model by name, a local folder, or a hub id.

    Raises:
        InputError: nothing of this name, or a folder that transformers cannot load.
    """
    source = resolve(ref)
    if isinstance(source, Path) and not (source / CONFIG_FILE).is_file():
        raise InputError(f"{str(source)!r} is not a model folder: it has no {CONFIG_FILE}.")
    try:
        config = transformers.AutoConfig.from_pretrained(str(source))
        family_of(config)
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            str(source), dtype=torch.float32, use_safetensors=True, attn_implementation="sdpa"
        )
    except InputError:
        raise
    except (OSError, ValueError, SafetensorError, json.JSONDecodeError, RuntimeError) as error:
        raise InputError(f"model {str(ref)!r} cannot be loaded: {_first_line(error)}.") from None
    return model.eval()


def resolve(ref: str | Path) -> str | Path:
    """Where a model reference points: a folder, or a hub id that transformers would download.

    Raises:
        InputError: neither a shipped name, an existing folder nor the form of a hub id.
    """
    text = str(ref)
    if text in REFERENCE_MODELS:
        return asset_folder(text)
    if Path(text).is_dir():
        return Path(text)
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return text
    known = ", ".join(sorted(REFERENCE_MODELS))
    raise InputError(f"unknown model {text!r}: give a shipped model ({known}), a folder, or a hub id like org/name.")


def is_pruned(ref: str | Path) -> bool:
    """Whether a reference points to a folder with a plan."""
    source = resolve(ref)
    return isinstance(source, Path) and (source / PLAN_FILE).is_file()


def load_any(ref: str | Path) -> Any:
    """A dense model or a pruned one, by name, folder or hub id (see `load_dense` and `load_pretrained`)."""
    return load_pretrained(resolve(ref)) if is_pruned(ref) else load_dense(ref)


def load_processor(ref: str | Path) -> Any:
    """The processor of a model.

    Raises:
        InputError: it has none that transformers can load.
    """
    try:
        return transformers.AutoProcessor.from_pretrained(str(resolve(ref)))
    except InputError:
        raise
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"model {str(ref)!r} has no usable processor: {_first_line(error)}.") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
