"""Model families. A new one is a new file here and a line in `FAMILIES` (see docs/families.md)."""

from __future__ import annotations

from typing import Any

from comp_edge.errors import InputError
from comp_edge.families.base import Family
from comp_edge.families.blip import Blip
from comp_edge.families.clip import Clip
from comp_edge.families.idefics3 import Idefics3, SmolVLM
from comp_edge.families.internvl import InternVL
from comp_edge.families.llava import Llava
from comp_edge.families.qwen2_5_vl import Qwen2_5VL
from comp_edge.families.siglip import Siglip, Siglip2

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Blip(),
        Clip(),
        Idefics3(),
        InternVL(),
        Llava(),
        Qwen2_5VL(),
        Siglip(),
        Siglip2(),
        SmolVLM(),
    )
}
GUIDE = "docs/families.md"


def family_of(model: Any) -> Family:
    """The family of a transformers model or config.

    Raises:
        InputError: no family knows this architecture.
    """
    config = getattr(model, "config", model)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise InputError(
            f"model type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))} ({GUIDE} says how to "
            "add one)."
        )
    family = FAMILIES[model_type]
    if hasattr(model, "config"):
        named = [kind.__name__ for kind in type(model).__mro__]
    else:
        named = list(getattr(model, "architectures", None) or family.architectures)
    if not set(named) & set(family.architectures):
        raise InputError(
            f"architecture {named[0]!r} of model type {model_type!r} is not supported; supported: "
            f"{', '.join(family.architectures)} ({GUIDE} says how to add one)."
        )
    return family
