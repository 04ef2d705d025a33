"""Model families. A new one is a new file here and a line in `FAMILIES`."""

from __future__ import annotations

from typing import Any

from comp_edge.errors import InputError
from comp_edge.families.base import Family
from comp_edge.families.llava import Llava

FAMILIES: dict[str, Family] = {family.model_type: family for family in (Llava(),)}


def family_of(model: Any) -> Family:
    """The family of a transformers model or config.

    Raises:
        InputError: no family knows this architecture.
    """
    config = getattr(model, "config", model)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise InputError(f"model type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}.")
    return FAMILIES[model_type]
