"""The class that a pruned folder's `auto_map` leads transformers' auto classes to (see `comp_edge.remote_code`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from comp_edge.checkpoint import load_pretrained
from comp_edge.errors import InputError
from comp_edge.remote_code import local_folder

# What `from_pretrained` is given on the way, and what a caller may ask for without changing the result.
_NO_MATTER = frozenset(
    ("trust_remote_code", "adapter_kwargs", "low_cpu_mem_usage", "use_safetensors", "weights_only", "code_revision")
)
_MAY_BE_OFF = frozenset(("output_loading_info", "ignore_mismatched_sizes"))
_HUB = frozenset(("revision", "cache_dir", "token", "local_files_only", "force_download"))
_OWN = frozenset(("dtype", "torch_dtype", "device_map", "attn_implementation"))


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
