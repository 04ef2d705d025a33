"""Every generative family in small with a processor of its own, dense and pruned, for the tests of exporters."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch

from comp_edge.families import family_of
from comp_edge.families.base import Request
from comp_edge.plan import LayerPlan, Plan, stream_plan
from comp_edge.reference.processors import CORPUS, build_processor, config_for
from comp_edge.surgery import apply_plan
from comp_edge.units import dense_plan
from tests.families import QWEN_PATCH, SIDE, _enliven, _generation, case_named

NAMES = ("llava", "idefics3", "smolvlm", "internvl", "qwen2.5-vl")
TEXT_TOKENS = 40
# Of Qwen's images, which have no usual size: not a multiple of its windows, so that some are ragged.
QWEN_SIDE = 40


@dataclass(frozen=True)
class Sample:
    """A model under test with its plan; `size` is height and width of its images."""

    name: str
    model: Any
    plan: Plan
    processor: Any
    size: tuple[int, int]

    @property
    def schedules(self) -> dict[str, tuple[int, ...]]:
        return self.plan.schedules

    @property
    def dense_image_tokens(self) -> int:
        return family_of(self.model).image_tokens(self.model, self.schedules["vision"][0])

    @property
    def image_tokens(self) -> int:
        return family_of(self.model).delivered(self.model, self.schedules["vision"])

    def images(self, n: int, seed: int = 0) -> torch.Tensor:
        return torch.randn(n, 3, *self.size, generator=torch.Generator().manual_seed(seed))


@functools.cache
def _dense(name: str, seed: int, **options: Any) -> tuple[Any, Any]:
    """The model with the token ids of its processor, and the processor."""
    case = case_named(name)
    first = case.model(seed, **options)
    processor = build_processor(first.config.model_type, first.config, CORPUS)
    config = config_for(processor, first.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = type(first)(config).eval().requires_grad_(False)
        _enliven(model)
    model.generation_config = _generation()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model, processor


def make_sample(name: str, kind: str, *, seed: int = 0, text_tokens: int = TEXT_TOKENS, **options: Any) -> Sample:
    """A family's model, `dense` or `pruned`: units of every kind, and tokens wherever they can be dropped.

    The options are those of `tests.families.Sizes`.
    """
    model, processor = _dense(name, seed, **options)
    model, family = copy.deepcopy(model), family_of(model)
    size = (QWEN_SIDE, QWEN_SIDE) if family.variable_images else (SIDE, SIDE)
    patches = (QWEN_SIDE // QWEN_PATCH) ** 2 if family.variable_images else family.dense_vision_tokens(model)
    plan = dense_plan(model, base=name, request=Request(vision_tokens=patches, text_tokens=text_tokens))
    if kind == "pruned":
        plan = _pruned(plan, model)
    apply_plan(model, plan)
    return Sample(name=name, model=model, plan=plan, processor=processor, size=size)


def _pruned(plan: Plan, model: Any) -> Plan:
    """Vision: a head and half of a feed-forward, a whole attention; language: a head of each group, a whole feed-forward."""
    family = family_of(model)
    vision, language = plan.streams["vision"], plan.streams["language"]
    layers = list(vision.layers)
    layers[0] = layers[0].model_copy(update={"heads": layers[0].heads[1:], "ffn": layers[0].ffn[::2]})
    layers[1] = layers[1].model_copy(update={"heads": () if len(layers) > 2 else layers[1].heads})
    tokens = list(vision.schedule)
    if family.streams(model)["vision"].hands_over:
        tokens[-1] = tokens[-1] * 2 // 3
    else:
        tokens[1:] = [tokens[0] * 2 // 3] * (len(tokens) - 1)
    streams = {"vision": stream_plan(layers, tokens)}
    layers = list(language.layers)
    layers[0] = layers[0].model_copy(update={"heads": (0, 3)})
    layers[1] = LayerPlan(heads=(2, 3), ffn=() if len(layers) > 2 else layers[1].ffn[1::2])
    if len(layers) > 2:
        layers[2] = layers[2].model_copy(update={"ffn": layers[2].ffn[::2]})
    gone = family.image_tokens(model, vision.schedule[0]) - family.delivered(model, tokens)
    first = language.tokens[0] - gone
    streams["language"] = stream_plan(layers, (first, first * 3 // 4, first // 2)[: len(layers)])
    return plan.model_copy(update={"streams": streams})
