"""A small BLIP that answers the questions of `tests.tiny`, and its processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comp_edge.reference.processors import build_processor, config_for
from tests import families, tiny


def make_blip(*, name: str = "blip-vqa", **sizes: Any) -> tuple[Any, Any]:
    """Model (16 patches and CLS) with lively weights, and processor."""
    model = families.case_named(name).model(**sizes)
    processor = build_processor(model.config.model_type, model.config, tiny.corpus())
    made = type(model)(config_for(processor, model.config)).eval()
    made.load_state_dict(model.state_dict())
    return made, processor


def save_blip(folder: Path, **sizes: Any) -> Path:
    """The same as a model folder."""
    for part in make_blip(**sizes):
        part.save_pretrained(folder)
    return folder
