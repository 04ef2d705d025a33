"""Pruned folders and transformers' auto classes.

transformers' own classes build every layer at the dense width: they cannot hold a pruned model. A pruned folder therefore
names, in the `auto_map` of its config, a class that hands loading over to comp-edge, and

    AutoModelForImageTextToText.from_pretrained(folder_or_hub_id, trust_remote_code=True)

gives what `comp_edge.load_pretrained` gives. Without `trust_remote_code` transformers would ignore the map, and load a model
whose plan drops only tokens or whole sub-layers without an error: wrong, or with random weights. So the config also points
transformers to weights that do not exist, under a name that says what to do.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from comp_edge.errors import InputError

MODULE_FILE = "modeling_comp_edge.py"
CLASS = "PrunedModel"
MODULE = f'''"""Loads this pruned model through transformers' auto classes; comp-edge, which must be installed, does it."""

from comp_edge.remote_code import {CLASS}

__all__ = ["{CLASS}"]
'''
REFUSAL = "pruned--load-with-trust_remote_code-or-comp_edge.load_pretrained.safetensors"
# The model and its processor (chat template, SentencePiece model, merges), not the report.
SNAPSHOT = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")

# What `from_pretrained` is given on the way, and what a caller may ask for without changing the result.
_NO_MATTER = frozenset(
    ("trust_remote_code", "adapter_kwargs", "low_cpu_mem_usage", "use_safetensors", "weights_only", "code_revision")
)
_MAY_BE_OFF = frozenset(("output_loading_info", "ignore_mismatched_sizes"))
_HUB = frozenset(("revision", "cache_dir", "token", "local_files_only", "force_download"))
_OWN = frozenset(("dtype", "torch_dtype", "device_map", "attn_implementation"))


def mark_config(config: dict[str, Any]) -> None:
    """Put into a pruned model's config, in place, what transformers is to know; also into those of the model's parts.

    A part has its own auto class, which reads its section of the config alone.
    """
    reference = f"{MODULE_FILE.removesuffix('.py')}.{CLASS}"
    names = auto_classes(config["architectures"][0], config["model_type"])
    config["auto_map"] = {name: reference for name in names}
    for part in _parts(config):
        part["transformers_weights"] = REFUSAL


def unmark_config(config: dict[str, Any]) -> None:
    """Take out again, in place, what `mark_config` put in."""
    config.pop("auto_map", None)
    for part in _parts(config):
        part.pop("transformers_weights", None)


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [config, *(value for value in config.values() if isinstance(value, dict) and "model_type" in value)]


def auto_classes(architecture: str, model_type: str) -> tuple[str, ...]:
    """transformers' auto classes that give an architecture, and `AutoModel`, in alphabetical order.

    `AutoModel` gives the whole model also where transformers itself would leave the head off: a pruned folder is one model.
    """
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    found = {"AutoModel"}
    for name, kind in vars(modeling_auto).items():
        if name.startswith("AutoModel") and isinstance(kind, type) and issubclass(kind, _BaseAutoModelClass):
            given = kind._model_mapping._model_mapping.get(model_type, ())
            if architecture in ((given,) if isinstance(given, str) else given):
                found.add(name)
    return tuple(sorted(found))


class PrunedModel:
    """What `auto_map` names. Never an instance: `from_pretrained` gives the model of transformers' own class."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """transformers calls this; there is nothing to note, for the model is of a class that it knows."""

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, config: Any = None, **options: Any) -> Any:
        """A pruned model, as `comp_edge.load_pretrained` gives it.

        Args:
            source: a pruned folder, or the hub id of one.
            config: what an auto class read from the same source.
            options: `dtype` or `torch_dtype` (by default as saved), `device_map` (one device, or "auto" for the
                accelerator where there is one), and of the Hub `revision`, `cache_dir`, `token`, `local_files_only`,
                `force_download`.

        Raises:
            InputError: no pruned model there, or an option that a pruned model cannot honour; names it.
        """
        from comp_edge.checkpoint import load_pretrained  # which imports this module

        for name, value in options.items():
            known = name in _HUB or name in _OWN or name in _NO_MATTER or name.startswith("_")
            unasked = value is None or (value is False and name in _MAY_BE_OFF)
            if not known and not unasked:
                raise InputError(
                    f"option {name!r} does not apply to a pruned model; it takes {', '.join(sorted(_OWN | _HUB))}."
                )
        folder = local_folder(source, **{name: options[name] for name in _HUB if name in options})
        _check_attention(options.get("attn_implementation"))
        if config is not None:
            _check_config(config, folder)
        device = _device(options.get("device_map"))
        model = load_pretrained(folder, dtype=_dtype(options.get("dtype") or options.get("torch_dtype")))
        return model if device is None else model.to(device)

    @classmethod
    def _from_config(cls, config: Any, **_: Any) -> Any:
        raise InputError(
            "a pruned model cannot be made from its config alone: the plan in its folder says what each layer keeps; use "
            "from_pretrained with the folder."
        )


def local_folder(source: str | os.PathLike[str], **hub: Any) -> Path:
    """The folder of a pruned model: the one given, or a snapshot of a repository on the Hub.

    Args:
        source: a folder, or a hub id such as org/name.
        hub: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`, as `snapshot_download` takes them.

    Raises:
        InputError: neither, or a repository that cannot be had.
    """
    from huggingface_hub import snapshot_download

    text = os.fspath(source)
    if Path(text).is_dir():
        return Path(text)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise InputError(f"{text!r} is not a folder; give the folder of a pruned model, or a hub id like org/name.")
    try:
        return Path(snapshot_download(text, allow_patterns=list(SNAPSHOT), **_given(hub)))
    except (OSError, ValueError) as error:  # all of the Hub's errors are one or the other
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(
            f"{text!r} is neither a folder nor a repository on the Hub that can be had ({reason})."
        ) from None


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _check_attention(wanted: Any) -> None:
    # comp-edge's attention computes what "sdpa" computes, and scores tokens besides.
    if wanted not in (None, "sdpa", "comp_edge"):
        raise InputError(
            f"attn_implementation={wanted!r} cannot be chosen for a pruned model: it brings its own, which equals 'sdpa'."
        )


def _check_config(config: Any, folder: Path) -> None:
    """Options that an auto class put into the config would be lost without a word: the model is built from the folder's."""
    from transformers import AutoConfig

    _check_attention(config._attn_implementation)
    given, saved = _flat(config.to_dict()), _flat(AutoConfig.from_pretrained(folder).to_dict())
    for name in sorted(given.keys() | saved.keys()):
        if given.get(name) != saved.get(name):
            raise InputError(
                f"option {name}={given.get(name)!r} cannot be given while a pruned model is loaded; set it on model.config "
                "afterwards."
            )


def _flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name, without those that may differ: data types, and where the config was read from."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("dtype", "_name_or_path", "auto_map"):
            continue
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _dtype(value: Any) -> torch.dtype | None:
    """A data type by itself or by name; None (or "auto") leaves the weights as they were saved."""
    if value is None or value == "auto":
        return None
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise InputError(f"dtype {value!r} is no floating-point type; give one like torch.bfloat16 or 'float32'.")
    return found


def _device(value: Any) -> torch.device | None:
    if isinstance(value, Mapping) and set(value) == {""}:
        value = value[""]
    if value is None:
        return None
    if value == "auto":
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        return torch.device(value)
    except (RuntimeError, TypeError):
        raise InputError(
            f"device_map {value!r} is not one device; a pruned model is not split over several: give one like 'cuda:0'."
        ) from None
