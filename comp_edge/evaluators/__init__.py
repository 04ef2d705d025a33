"""Adapters that let other people's evaluation suites run comp-edge models. Each needs its suite, comp-edge itself none."""

from __future__ import annotations

from typing import Any


def lmms_manifest() -> Any:
    """What lmms-eval's entry point group `lmms_eval.models` loads: `--model comp_edge` is `comp_edge.evaluators.lmms`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="comp_edge", chat_class_path="comp_edge.evaluators.lmms.CompEdge")
