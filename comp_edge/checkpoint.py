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

from comp_edge.card import write_card
from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.files import read_json, whole_folder, write_json, write_text
from comp_edge.plan import PLAN_FILE, Plan, plan_of
from comp_edge.reference import REFERENCE_MODELS, asset_folder
from comp_edge.reference.processors import CORPUS, auto_processor, build_processor, config_for
from comp_edge.reference.shapes import SHAPES, build_random, shape_config
from comp_edge.remote_code import MODULE, MODULE_FILE, local_folder, mark_config, unmark_config
from comp_edge.structure import empty_model
from comp_edge.surgery import apply_plan
from comp_edge.weights import WEIGHTS_FILE, check_checkpoint, check_unquantized

CONFIG_FILE = "config.json"
RANDOM = "random:"  # in front of the name of a shape: that architecture with random weights


def save_pretrained(model: Any, plan: Plan, folder: str | Path, *, processor: Any = None) -> Path:
    """Write a pruned model folder: config, weights, plan and (when given) processor files.

    The folder appears as a whole or not at all.

    Raises:
        InputError: the folder cannot be written to, or the model was not pruned to this plan.
    """
    if plan_of(model) != plan:
        raise InputError("the model was not pruned to the plan that is to be saved with it: call apply_plan first.")
    with whole_folder(folder) as staging:
        write_model(model, plan, staging, processor=processor)
    return Path(folder)


def write_model(model: Any, plan: Plan, folder: Path, *, processor: Any = None) -> None:
    """The files of `save_pretrained`, into an existing folder."""
    write_json(folder / CONFIG_FILE, pruned_config(model, plan))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    for name in model.all_tied_weights_keys:  # each of them is another tensor under a second name
        del tensors[name]
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    plan.save(folder / PLAN_FILE)
    generation = getattr(model, "generation_config", None)  # encoders have none
    if generation is not None:
        write_json(folder / "generation_config.json", generation.to_diff_dict())
    if processor is not None:
        processor.save_pretrained(folder)
    write_text(folder / MODULE_FILE, MODULE)
    write_card(folder, model, plan)


def pruned_config(model: Any, plan: Plan) -> dict[str, Any]:
    """The original config, `per_layer_config` in transformers' schema for what differs, and a `comp_edge` section."""
    family = family_of(model)
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    config.pop("_name_or_path", None)  # where the dense model lay is nobody else's business
    for name, stream in family.streams(model).items():
        sub = family.stream_config(model, name)
        key = next(
            key for key, value in config.items() if isinstance(value, dict) and getattr(model.config, key) is sub
        )
        # Streams of one sub-config (cross-attention lies between the layers of its text model) share the entries.
        entries: dict[str, dict[str, Any]] = config[key].get("per_layer_config") or {}
        for index, layer in enumerate(stream.layers):
            widths = family.layer_config(sub, name, layer).items()
            # What the config has no global value for must stand in every layer, a skipped one included.
            entry: dict[str, Any] = {
                k: v for k, v in widths if v != (dense := getattr(sub, k, None)) and (v or dense is None)
            }
            parts = {"cross_attention": layer.attn} if stream.follows else {"attention": layer.attn, "mlp": layer.mlp}
            if skipped := [part for part, view in parts.items() if view is None]:
                entry["skip"] = entries.get(str(index), {}).get("skip", []) + skipped
            if entry:
                entries.setdefault(str(index), {}).update(entry)
        if entries:
            config[key]["per_layer_config"] = entries
            # Without this transformers' own validation of the global widths refuses to read the config.
            config[key]["allow_global_per_layer_attribute_access"] = True
    mark_config(config)
    config["comp_edge"] = {"plan": PLAN_FILE, "base": plan.base, "load_with": "comp_edge.load_pretrained"}
    return config


def load_pretrained(folder: str | Path, *, dtype: torch.dtype | None = None) -> Any:
    """A pruned model as an ordinary transformers model, its token schedule active; `generate` works.

    The dense weights are never materialised: the model is built without storage, shrunk, and then filled.

    Args:
        folder: a pruned folder, or the hub id of one.
        dtype: of the weights; by default as they were saved.

    Raises:
        InputError: the folder is no pruned model, or a file in it is missing, truncated or inconsistent.
    """
    folder = local_folder(folder)
    if not (folder / PLAN_FILE).is_file():
        raise InputError(f"{str(folder)!r} is not a pruned model: it has no {PLAN_FILE}.")
    model = load_structure(folder)
    _fill(model, folder / WEIGHTS_FILE, dtype)
    generation = folder / "generation_config.json"
    if generation.is_file():
        model.generation_config = transformers.GenerationConfig.from_dict(
            read_json(generation, what="generation config")
        )
    return model.eval()


def load_structure(folder: str | Path) -> Any:
    """A pruned model without its weights: parameters on the meta device, shrunk, its token schedule active.

    Raises:
        InputError: see `load_pretrained`.
    """
    folder = Path(folder)
    plan = Plan.load(folder)
    model = empty_model(_read_config(folder))
    apply_plan(model, plan)
    return model


def _read_config(folder: Path) -> Any:
    values = read_json(folder / CONFIG_FILE, what="config")
    if not isinstance(values, dict):
        raise InputError(f"config {str(folder / CONFIG_FILE)!r} must hold a JSON object.")
    check_checkpoint(folder, values, pruned=True)
    values.pop("comp_edge", None)
    unmark_config(values)
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


def _fill(model: nn.Module, path: Path, dtype: torch.dtype | None = None) -> None:
    """Give every parameter its tensor from a safetensors file; names and shapes must match exactly.

    Without a `dtype` the tensors are views of the mapped file, and are read when they are first used. With one they are
    read and converted one by one: the pages of a mapped file would count as memory beside what they were converted to.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    try:
        with safe_open(path, framework="pt", backend="mmap" if dtype is None else "pread") as file:
            names = set(file.keys())
            for name in sorted(names ^ (set(expected) - tied) - (tied & names)):
                side = "lacks" if name in expected else "has an unexpected"
                raise InputError(f"weights {str(path)!r} {side} tensor {name!r}.")
            tensors = {name: _converted(file.get_tensor(name), dtype) for name in sorted(names)}
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
    if dtype is not None:
        model.config.dtype = dtype
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _converted(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def load_dense(ref: str | Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """A dense model: a shipped reference model by name, a local folder, a hub id, or a shape with random weights.

    Args:
        dtype: what the weights are held in.

    Raises:
        InputError: nothing of this name, an architecture that no family knows, a quantized or incomplete checkpoint, or a
            folder that transformers cannot load.
    """
    source = resolve(ref)
    if isinstance(source, str) and source.startswith(RANDOM):
        return build_random(source.removeprefix(RANDOM), dtype=dtype, config=_random_config(source)[0])
    if isinstance(source, Path) and not (source / CONFIG_FILE).is_file():
        raise InputError(f"{str(source)!r} is not a model folder: it has no {CONFIG_FILE}.")
    try:
        if isinstance(source, Path):
            check_checkpoint(source, read_json(source / CONFIG_FILE, what="config"))
        config = transformers.AutoConfig.from_pretrained(str(source))
        family = family_of(config)
        check_unquantized(config.to_dict(), where=str(ref))
        kind = getattr(transformers, next(iter(config.architectures or family.architectures)))
        model = kind.from_pretrained(
            str(source),
            dtype=dtype,
            use_safetensors=True,
            attn_implementation="eager" if family.returns_probabilities else "sdpa",
        )
    except InputError:
        raise
    except (OSError, ValueError, SafetensorError, json.JSONDecodeError, RuntimeError) as error:
        raise InputError(f"model {str(ref)!r} cannot be loaded: {_first_line(error)}.") from None
    return model.eval()


def _random_config(source: str) -> tuple[Any, Any]:
    """The config of `random:NAME`, and the processor that its token ids come from: no tokenizer can be downloaded."""
    config = shape_config(source.removeprefix(RANDOM))
    processor = build_processor(config.model_type, config, CORPUS)
    return config_for(processor, config), processor


def resolve(ref: str | Path) -> str | Path:
    """Where a model reference points: a folder, or a hub id that transformers would download.

    Raises:
        InputError: neither a shipped name, an existing folder nor the form of a hub id.
    """
    text = str(ref)
    if text in REFERENCE_MODELS:
        return asset_folder(text)
    if text.startswith(RANDOM):
        shape_config(text.removeprefix(RANDOM))
        return text
    if Path(text).is_dir():
        return Path(text)
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return text
    known = ", ".join(sorted(REFERENCE_MODELS))
    raise InputError(
        f"unknown model {text!r}: give a shipped model ({known}), a folder, a hub id like org/name, or random: and a shape "
        f"({', '.join(SHAPES)})."
    )


def is_pruned(ref: str | Path) -> bool:
    """Whether a reference points to a folder with a plan, or to a repository on the hub that says it has one."""
    source = resolve(ref)
    if isinstance(source, Path):
        return (source / PLAN_FILE).is_file()
    if source.startswith(RANDOM):
        return False
    try:
        return hasattr(transformers.AutoConfig.from_pretrained(source), "comp_edge")
    except (OSError, ValueError):  # loading it will say what is wrong
        return False


def check_dense(ref: str | Path) -> None:
    """Check that a reference is one of a dense model, before a command that prunes it itself does anything.

    Raises:
        InputError: there is no such model, or it is pruned already.
    """
    resolve(ref)
    if is_pruned(ref):
        raise InputError(f"{str(ref)!r} is pruned already; give a dense model, this command prunes it itself.")


def load_any(ref: str | Path, *, dtype: torch.dtype | None = None) -> Any:
    """A dense model or a pruned one, by name, folder or hub id (see `load_dense` and `load_pretrained`).

    Args:
        dtype: of the weights; by default float32 for a dense model, and as it was saved for a pruned one.
    """
    if is_pruned(ref):
        return load_pretrained(resolve(ref), dtype=dtype)
    return load_dense(ref, dtype=dtype or torch.float32)


def load_processor(ref: str | Path) -> Any:
    """The processor of a model.

    Raises:
        InputError: it has none that transformers can load.
    """
    source = str(resolve(ref))
    if source.startswith(RANDOM):
        return _random_config(source)[1]
    try:
        return auto_processor(source)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"model {str(ref)!r} has no usable processor: {_first_line(error)}.") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
