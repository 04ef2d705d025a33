"""Small models of genuine architectures, trained from nothing and shipped with the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from comp_edge.reference import blip_digits, clip_digits, llava_digits

ASSETS = Path(__file__).resolve().parent.parent / "assets"
# name -> (seed) -> (untrained model, processor)
REFERENCE_MODELS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "llava-digits": llava_digits.build,
    "blip-digits": blip_digits.build,
    "clip-digits": clip_digits.build,
}
# Optimizer steps from nothing until more of them gain nothing.
STEPS = {"llava-digits": 3000, "blip-digits": 1500, "clip-digits": 1500}


def asset_folder(name: str) -> Path:
    """The folder that a shipped reference model lies in."""
    return ASSETS / name
