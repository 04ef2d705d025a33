"""A device whose latency is known, to the tests of the latency model: it counts in its own way, and its clock is noisy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from comp_edge.families import family_of
from comp_edge.files import read_json
from comp_edge.plan import LayerPlan, Plan, stream_plan
from comp_edge.reference import asset_folder
from comp_edge.reference.shapes import shape_config
from comp_edge.structure import empty_model
from comp_edge.units import dense_plan
from devices.depth import config_from, with_layers
from devices.profiles import Profile

ROOM = 16  # tokens that programs have room for behind a prompt
RATE = 50  # million multiply-accumulates a millisecond
TEXT = {"clip": 20, "llava": 24}


def clip_config() -> Any:
    """CLIP ViT-B/16 in small: 6 vision layers with 197 tokens, 4 text layers."""
    config = copy.deepcopy(shape_config("clip-vit-b-16"))
    sizes = {"vision_config": (6, 256, 8), "text_config": (4, 128, 4)}
    for name, (layers, width, heads) in sizes.items():
        part = getattr(config, name)
        part.num_hidden_layers, part.hidden_size, part.num_attention_heads = layers, width, heads
        part.intermediate_size = 4 * width
    return config


def llava_config() -> Any:
    """The shipped `llava-digits`."""
    return config_from(read_json(asset_folder("llava-digits") / "config.json", what="config"), where="llava-digits")


class Machine:
    """Milliseconds of a plan's methods by hidden coefficients.

    Args:
        noise: relative, of every sample.
        tile: token counts are computed in multiples of it.
        plain: time is in proportion to multiply-accumulates, and nothing else counts.
    """

    def __init__(self, model: Any, *, noise: float = 0.01, tile: int = 1, plain: bool = False, seed: int = 0) -> None:
        self.family, self.model = family_of(model), model
        self.shapes = {name: self.family.shape(model, name) for name in self.family.streams(model)}
        self.noise, self.tile, self.plain = noise, tile, plain
        self.rng = np.random.default_rng(seed)

    def ms(self, plan: Plan, *, whole: bool = True) -> dict[str, float]:
        """What each method takes."""
        vision, language = plan.streams["vision"].tokens, plan.streams["language"].tokens
        call = 0.0 if self.plain else 0.1
        outside = {name: macs * 1e-6 / RATE + call for name, macs in self._outside(vision[-1]).items()}
        image, text = outside  # what reads the image, and what reads the text
        found = {
            image: outside[image] + self._stream(plan, "vision", one=image == "image_encoder", whole=whole),
            text: outside[text] + self._stream(plan, "language", one=True, whole=whole),
        }
        return (
            found if image == "image_encoder" else found | {"decode": 0.03 + self._decode(plan, language, whole=whole)}
        )

    def _outside(self, vision: int) -> dict[str, int]:
        """MACs of patches, projections and heads."""
        width = self.shapes["vision"].width
        if self.family.model_type == "clip":
            return {
                "image_encoder": 196 * 768 * width + width * 512,
                "text_encoder": self.shapes["language"].width * 512,
            }
        return {"vision_encoder": 64 * 192 * width + (self._up(vision) - 1) * 2 * 96 * 96, "prefill": 512 * 96}

    def request(self, plan: Plan, *, decode_tokens: int = 0) -> float:
        """What a request takes that generates so many tokens after the first."""
        return sum(ms * (decode_tokens if name == "decode" else 1) for name, ms in self.ms(plan).items())

    def measure(self, plan: Plan, *, whole: bool) -> dict[str, Any]:
        """Three noisy rounds of each method, as a profile has them."""
        return {
            method: {"rounds": [[ms * float(np.exp(self.rng.normal(0, self.noise)))] for _ in range(3)]}
            for method, ms in self.ms(plan, whole=whole).items()
        }

    def _up(self, n: int) -> int:
        return -(-n // self.tile) * self.tile if n > 1 else n

    def _stream(self, plan: Plan, name: str, *, one: bool, whole: bool) -> float:
        """Args:
        one: a single token is read behind the last attention.
        """
        stream, shape, total, before = plan.streams[name], self.shapes[name], 0.0, None
        last = max(index for index, layer in enumerate(stream.layers) if layer.heads)
        for index, (layer, tokens) in enumerate(zip(stream.layers, stream.tokens, strict=True)):
            behind = one and index > last
            n = 1 if behind else self._up(tokens)
            read = 1 if one and index >= last else n
            if before is not None and tokens < before and not behind:
                total += 0 if self.plain else 0.02 + self._up(before) * shape.width * 0.4e-6
            before = tokens
            wide = len(layer.heads) * shape.head_dim
            narrow = len({head // shape.group for head in layer.heads}) * shape.head_dim
            total += self._product(read, 2 * shape.width * wide, whole) + self._product(
                n, 2 * shape.width * narrow, whole
            )
            total += 2 * read * n * wide * 1e-6 / (RATE if self.plain else 30)
            total += 0 if self.plain else read * n * len(layer.heads) * 3e-6
            weights = shape.width * len(layer.ffn) * shape.projections
            total += self._product(read, weights, whole)
            if not self.plain:
                total += 0.004 * (bool(layer.heads) + bool(layer.ffn)) + (n + read) * shape.width * 0.8e-6
        return total

    def _product(self, n: int, weights: int, whole: bool) -> float:
        """A matrix product: its MACs, and the weights that are read, which stay in the caches of small models alone."""
        if self.plain:
            return n * weights * 1e-6 / RATE
        return n * weights * 1e-6 / RATE + weights * 1e-6 * (0.5 if whole else 0.3)

    def _decode(self, plan: Plan, tokens: tuple[int, ...], *, whole: bool) -> float:
        shape, total = self.shapes["language"], 0.0
        for layer, n in zip(plan.streams["language"].layers, tokens, strict=True):
            wide = len(layer.heads) * shape.head_dim
            narrow = len({head // shape.group for head in layer.heads}) * shape.head_dim
            weights = shape.width * (2 * wide + 2 * narrow + len(layer.ffn) * shape.projections)
            total += weights * 1e-6 * (1.0 if whole else 0.7) + (n + ROOM) * (2 * narrow * 1.5e-6 + wide * 0.2e-6)
        return total


def random_plan(model: Any, rng: np.random.Generator, *, keep: float) -> Plan:
    """A plan that keeps about this share of units, and some of the tokens; every layer keeps a head."""
    family = family_of(model)
    text = TEXT[family.model_type]
    plan = dense_plan(model, base="tests", prompt_tokens=text)
    layers, tokens = {}, {}
    for name, view in family.streams(model).items():
        shape = family.shape(model, name)

        heads, ffn = keep * rng.uniform(0.5, 1.5, 2)

        def some(count: int, share: float) -> int:
            return int(np.clip(round(count * rng.normal(share, 0.15)), 1, count))

        layers[name] = [
            LayerPlan(
                heads=tuple(range(some(shape.kv_heads, heads) * shape.group)),
                ffn=tuple(range(some(shape.ffn // 32, ffn) * 32)),
            )
            for _ in view.layers
        ]
        schedule = list(plan.streams[name].schedule)
        for point in view.drop_points:
            if rng.random() < 0.4:
                fewer = max(6, int(schedule[point] * rng.uniform(0.6, 0.95)))
                schedule[point:] = [min(n, fewer) for n in schedule[point:]]
        tokens[name] = schedule
    if family.fusion(model) is not None:
        first = family.delivered(model, tokens["vision"]) + text
        tokens["language"] = [first, *(min(n, first) for n in tokens["language"][1:])]
    return plan.model_copy(update={"streams": {name: stream_plan(layers[name], tokens[name]) for name in layers}})


def make_profile(
    config: Any, machine_of: Callable[[Any], Machine], *, whole: int = 4, blocks: int = 8, seed: int = 0, **changes: Any
) -> Profile:
    """Whole models, the first of them dense, and blocks of two layers in which one stream's methods are measured.

    Args:
        machine_of: the machine for a model.
        changes: fields of the profile.
    """
    rng, model = np.random.default_rng(seed), empty_model(config)
    machine, points = machine_of(model), []

    def add(kind: str, plan: Plan, methods: tuple[str, ...] = ()) -> None:
        measured = machine.measure(plan, whole=kind == "whole")
        points.append(
            {
                "id": f"{kind}-{len(points)}",
                "kind": kind,
                "layers": {name: len(stream.layers) for name, stream in plan.streams.items()},
                "plan": plan.to_json(),
                "methods": {name: value for name, value in measured.items() if not methods or name in methods},
            }
        )

    text = TEXT[config.model_type]
    add("whole", dense_plan(model, base="tests", prompt_tokens=text))
    for index in range(whole - 1):
        add("whole", random_plan(model, rng, keep=(0.35, 0.6, 0.8)[index % 3]))
    small = empty_model(with_layers(config, {"vision": 2, "language": 2}))
    names = list(machine.ms(dense_plan(model, base="tests", prompt_tokens=text)))
    for index in range(blocks):
        for methods in (tuple(names[:1]), tuple(names[1:])):
            add("block", random_plan(small, rng, keep=(0.9, 0.3, 0.6)[index % 3]), methods)
    value = {
        "schema": 1,
        "created": "2026-01-01T00:00:00Z",
        "device": {"address": "host", "name": "machine"},
        "model": {
            "name": "tests",
            "model_type": config.model_type,
            "config": config.to_dict() | {"architectures": list(config.architectures)},
            "text_tokens": text,
            "new_tokens": ROOM,
        },
        "settings": {"preset": "quick", "agent": "tests", "runtime": "tests", "threads": 1},
        "points": points,
        "seconds": 60.0,
        "complete": True,
    }
    return Profile.parse(value | changes)
