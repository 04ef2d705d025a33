"""CLIP, SigLIP and BLIP in small with processors of their own, dense and pruned, for the tests of exporters."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch

from comp_edge.checkpoint import save_pretrained
from comp_edge.families import family_of
from comp_edge.families.base import Request
from comp_edge.plan import Plan
from comp_edge.reference.processors import CORPUS, build_processor, config_for
from comp_edge.surgery import apply_plan
from comp_edge.units import dense_plan
from export.encoders import EncoderSource, text_spec
from tests.comp_edge.plans import family_plan
from tests.families import SIDE, _enliven, _generation, case_named

NAMES = ("clip", "siglip", "siglip2", "blip-retrieval", "blip-vqa", "blip-captioning")
TEXT_TOKENS = 14
# SigLIP 2's images have no usual size: neither square nor the number of patches that it was trained with.
NAFLEX_SIZE = (80, 64)
NEW_TOKENS = 5


@functools.cache
def _dense(name: str, layers: int) -> tuple[Any, Any]:
    """The model with the token ids of its processor, and the processor."""
    first = case_named(name).model(vision_layers=layers, language_layers=layers)
    processor = build_processor(first.config.model_type, first.config, CORPUS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = type(first)(config_for(processor, first.config)).eval().requires_grad_(False)
        _enliven(model)
    if hasattr(model, "text_decoder"):
        model.text_decoder.generation_config = _generation()
    return model, processor


def image_size(name: str) -> tuple[int, int]:
    return NAFLEX_SIZE if name == "siglip2" else (SIDE, SIDE)


def _request(name: str, model: Any) -> Request:
    family, (height, width) = family_of(model), image_size(name)
    patches = height * width // 16**2 if family.variable_images else family.dense_vision_tokens(model)
    most = model.config.text_config.max_position_embeddings
    return Request(vision_tokens=patches, text_tokens=most if name.startswith("siglip") else TEXT_TOKENS)


def make_source(name: str, kind: str) -> EncoderSource:
    """A model of three layers a stream: `dense`, `tokens` or `units` alone, or `pruned`: both, with skipped sub-layers."""
    model, processor = copy.deepcopy(_dense(name, 3))
    request = _request(name, model)
    if kind == "dense":
        plan = dense_plan(model, base=name, request=request)
    else:
        plan = family_plan(model, request, tokens=kind != "units", units=kind != "tokens")
    return _source(name, model, plan, processor)


def _source(name: str, model: Any, plan: Plan, processor: Any) -> EncoderSource:
    apply_plan(model, plan)
    return EncoderSource(model, plan, processor, image_size(name), NEW_TOKENS, text_spec(model, processor, plan))


@functools.cache
def _workspace() -> tempfile.TemporaryDirectory:
    """A folder for the whole session, gone when Python ends."""
    return tempfile.TemporaryDirectory(prefix="comp-edge-tests-")


@functools.cache
def pruned_folder(name: str) -> Path:
    """A pruned folder of two layers a stream, so that it is exported in seconds: heads and channels gone, tokens dropped."""
    model, processor = copy.deepcopy(_dense(name, 2))
    plan = dense_plan(model, base=name, request=_request(name, model))
    for stream, view in family_of(model).streams(model).items():
        layers = list(plan.streams[stream].layers)
        layers[1] = layers[1].model_copy(update={"heads": layers[1].heads[1:], "ffn": layers[1].ffn[::2]})
        streams = plan.streams | {stream: plan.streams[stream].model_copy(update={"layers": tuple(layers)})}
        plan = plan.model_copy(update={"streams": streams})
        first = plan.streams[stream].tokens[0]
        followed = family_of(model).streams(model).get(view.follows, view)
        if followed.drops:
            plan = plan.with_tokens(stream, (first, first * 2 // 3))
    apply_plan(model, plan)
    return save_pretrained(model, plan, Path(_workspace().name) / name, processor=processor)
