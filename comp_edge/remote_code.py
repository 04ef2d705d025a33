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

from comp_edge.errors import InputError

MODULE_FILE = "modeling_comp_edge.py"
CLASS = "PrunedModel"
MODULE = f'''"""Loads this pruned model through transformers' auto classes; comp-edge, which must be installed, does it."""

from comp_edge.auto import {CLASS}

__all__ = ["{CLASS}"]
'''
REFUSAL = "pruned--load-with-trust_remote_code-or-comp_edge.load_pretrained.safetensors"
# The model and its processor (chat template, SentencePiece model, merges), not the report.
SNAPSHOT = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


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
