"""The methods of an exported program, and what each of them computes under a plan.

Everything is counted as `export.graph` lowers it: behind the last attention only the tokens that are read go on, decode blends
new keys into caches with room for the whole answer, and keys of an image are projected once. A program of fewer layers than
the model's is that of its first layers, so that what was measured of blocks and what is asked of plans are the same sums.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from comp_edge.families import family_of
from comp_edge.families.base import Count, StreamShape
from comp_edge.plan import Plan
from comp_edge.structure import empty_model
from comp_edge.units import kept_kv_heads
from devices.depth import config_from
from devices.errors import DeviceError
from devices.latency.features import ZERO, Reading, Vector, attention, feed_forward, rows, vector, window
from devices.profiles import ModelRecord
from export.encoder_methods import kind_of

DENSE_METHODS = {"answers": ("decode",)}  # that run no layer that can be pruned
# More than any model has: the numbers of a file must not keep us busy for hours.
MOST = {"num_hidden_layers": 512, "depth": 512, "max_position_embeddings": 2**24, "image_size": 2**14}


@dataclass(frozen=True)
class Run:
    """Layers of a stream as one method runs them.

    Attributes:
        rows_of: the stream whose tokens the layers compute on.
        decodes: one token, which attends to what is in the caches.
        cached: its keys and values go into a cache.
    """

    method: str
    stream: str
    reading: Reading = "all"
    rows_of: str = ""
    decodes: bool = False
    cached: bool = False


class Layers(NamedTuple):
    """All that decides what a run computes under a plan.

    Attributes:
        run: its number.
        kept: of each layer the heads, and the number of channels.
        tokens: schedule of the stream that the layers compute on.
        based: what the layers of that stream keep, where it is another one.
        source: tokens of the stream that is attended to; None for self-attention.
        delivered: see `StreamPlan.delivered`.
    """

    run: int
    kept: tuple[tuple[tuple[int, ...], int], ...]
    tokens: tuple[int, ...]
    based: tuple[tuple[tuple[int, ...], int], ...] | None
    source: int | None
    delivered: int | None


# What decides the features of one layer: the arguments of `Program.work`.
Work = tuple[int, tuple[int, ...], int, int, int, int, int]


class Program:
    """The methods of a model, by its dense shapes; no weights, and no model is built when a plan is asked about.

    Args:
        model: on the meta device.
        room: tokens that may be generated behind a prompt.
        step: token counts are rounded up to multiples of it, as a device does whose latency is a staircase.
    """

    def __init__(self, model: Any, *, room: int, step: int = 1) -> None:
        family = family_of(model)
        self.kind = "generative" if family.fusion(model) is not None else kind_of(model)
        self.room, self.step = room, step
        streams = family.streams(model)
        self.layers = {name: len(stream.layers) for name, stream in streams.items()}
        self.shapes = {name: family.shape(model, name) for name in streams}
        self.runs = _runs(self.kind, reads_class=streams["vision"].protected == "first")
        self._reads = [(run.stream, run.rows_of or run.stream, self.shapes[run.stream].keys_from) for run in self.runs]
        self.methods = tuple(dict.fromkeys(run.method for run in self.runs)) + DENSE_METHODS.get(self.kind, ())
        self._fixed = family.fixed_macs(model)
        self._image_tokens = lru_cache(maxsize=None)(lambda tokens: family.image_tokens(model, tokens))
        self._model = model
        self.work = lru_cache(maxsize=2**17)(self._work)
        self.outside = lru_cache(maxsize=2**14)(self._outside)

    @classmethod
    def of(cls, record: ModelRecord) -> Program:
        """From what a profile says of a model.

        Raises:
            DeviceError: the configuration is none of a model that can be built.
        """
        where = f"model {record.name!r} of the profile"
        try:
            config = config_from(record.config, where=where)
            for part in (getattr(config, "vision_config", None), getattr(config, "text_config", None)):
                _check_size(part, where)
            program = cls(empty_model(config), room=record.new_tokens)
        except DeviceError:
            raise
        except Exception as error:  # transformers raises many kinds for malformed values
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise DeviceError(f"{where} has a config that cannot be used: {reason}.") from None
        if config.model_type != record.model_type:
            raise DeviceError(f"{where} is said to be {record.model_type!r}; its config is of {config.model_type!r}.")
        return program

    def with_step(self, step: int) -> Program:
        """The same, with token counts rounded up."""
        return Program(self._model, room=self.room, step=step)

    def calls(self, plan: Plan, decode_tokens: int) -> dict[str, int]:
        """How often a request calls each method; an answer's first token is the prefill's, except in BLIP's answers."""
        counts = dict.fromkeys(self.methods, 1)
        if self.kind == "generative":
            counts["vision_encoder"] = plan.images
        if "decode" in counts:
            counts["decode"] = decode_tokens + (self.kind == "answers")
        return counts

    def check(self, plan: Plan, *, whole: bool = True) -> None:
        """Whether a plan is of this model.

        Args:
            whole: it has all of the model's layers.

        Raises:
            DeviceError: it has other streams, or other numbers of layers.
        """
        streams = plan.streams
        if streams.keys() != self.layers.keys():
            raise DeviceError(f"the plan has streams {sorted(streams)}; the measured model has {sorted(self.layers)}.")
        for name, count in self.layers.items():
            have = len(streams[name].layers)
            if have != count and (whole or not 1 <= have < count):
                raise DeviceError(f"the plan has {have} layers in stream {name!r}; the measured model has {count}.")
        if "cross" in streams and len(streams["cross"].layers) != len(streams["language"].layers):
            raise DeviceError("the plan must have as many layers in stream 'cross' as in 'language'.")

    def layers_of(self, plan: Plan) -> list[Layers]:
        """What every run computes on under a plan. Runs that agree in it cost the same, so that sums can be kept."""
        kept = {
            name: tuple([(layer.heads, len(layer.ffn)) for layer in stream.layers])
            for name, stream in plan.streams.items()
        }
        found = []
        for number, (stream, based, source) in enumerate(self._reads):
            found.append(
                Layers(
                    number,
                    kept[stream],
                    plan.streams[based].tokens,
                    None if based == stream else kept[based],
                    None if source is None else plan.streams[source].tokens[-1],
                    plan.streams[stream].delivered,
                )
            )
        return found

    def steps(self, layers: Layers) -> list[Work]:
        """The layers of a run one by one; a drop behind the connector is a layer behind the last."""
        number, kept, tokens, based, source, delivered = layers
        run = self.runs[number]
        shape, found = self.shapes[run.stream], []
        counts = rows(tokens, tuple([bool(heads) for heads, _ in based or kept]), run.reading, self.step)
        asking = 0  # heads of the layer before, whose probabilities a drop ranks by
        for index, ((heads, channels), (n, read, fall)) in enumerate(zip(kept, counts, strict=True)):
            ranked = fall and fall * shape.width + fall * fall * asking
            if run.decodes:
                n = read = 1
                keys, ranked = tokens[index] + self.room if source is None else source, 0
            elif source is not None:  # tokens are dropped by self-attention
                n, keys, ranked = read, self._up(source), 0
            else:
                keys = window(shape, index, n)
            asking = len(heads)
            found.append((number, heads, channels, n, read, keys, ranked))
        if delivered is not None and run.stream == "vision":
            before = self._image_tokens(tokens[-1])
            if delivered < before:
                ranked = self._up(before) * self.shapes["language"].width + read * keys * asking
                found.append((number, (), 0, 0, 0, 0, ranked))
        return found

    def _work(
        self, number: int, heads: tuple[int, ...], channels: int, n: int, read: int, keys: int, ranked: int
    ) -> tuple[Vector, Vector, Vector]:
        """Features of a layer's attention, of its feed-forward, and of the drop before it.

        Args:
            number: of the run.
            n, read: tokens that come in, and those that leave attention; `keys` are attended to by each.
            ranked: elements that the drop touches; 0 for none.
        """
        run = self.runs[number]
        shape = self.shapes[run.stream]
        if heads and heads[-1] >= shape.heads or channels > shape.ffn:
            raise DeviceError(
                f"the plan keeps head {heads[-1] if heads else None} and {channels} channels in a layer of stream "
                f"{run.stream!r}; the measured model has {shape.heads} heads and {shape.ffn} channels there."
            )
        attended = ZERO
        if heads:
            try:
                groups = len(kept_kv_heads(heads, heads=shape.heads, kv_heads=shape.kv_heads))
            except ValueError as error:
                raise DeviceError(f"the plan does not fit stream {run.stream!r}: {error}.") from None
            told = n if shape.keys_from is None else 0 if run.decodes else keys
            written = 0
            if run.cached:
                written = keys if run.decodes else keys + self.room
            attended = attention(shape, len(heads), groups, n=n, read=read, keys=keys, told=told, written=written)
        ffn = feed_forward(shape, channels, read) if channels else ZERO
        return attended, ffn, vector(drops=1, dropping=ranked) if ranked else ZERO

    def _outside(self, method: str, patches: int, vision: int, language: int, layers: int) -> Vector:
        """Features of a call outside the pruned layers.

        Args:
            patches, vision, language: tokens of the first and the last vision layer, and of the last language layer.
            layers: language layers, as many as the decoder of answers has.
        """
        fixed = self._fixed
        if method in ("vision_encoder", "image_encoder"):
            parts = [fixed.get("vision", Count()), fixed.get("connector", Count())]
            parts += [_pooled(fixed["head"], self.shapes["vision"])] if method == "image_encoder" else []
            tokens = self._up(vision)
            macs = sum(
                part.per_image
                + patches * part.per_patch
                + tokens * part.per_vision_token
                + self._image_tokens(tokens) * part.per_image_token
                for part in parts
            )
            return vector(calls=1, fixed=macs)
        if self.kind != "answers":
            return vector(calls=1, fixed=fixed["head"].constant)
        # The decoder of answers is never pruned: `prefill` projects its keys of the question, `decode` does the rest.
        shape = self.shapes["language"]
        heads, groups = shape.heads, shape.kv_heads
        if method == "prefill":
            return vector(calls=1, fixed=2 * layers * self._up(language) * shape.width * groups * shape.head_dim)
        slots = 1 + self.room
        own = attention(shape, heads, groups, n=1, read=1, keys=slots, told=1, written=slots)
        cross = attention(shape, heads, groups, n=1, read=1, keys=language, told=0, written=0)
        layer = np.sum([own, cross, feed_forward(shape, shape.ffn, 1)], axis=0)
        return tuple((layers * layer + vector(calls=1, fixed=fixed["head"].constant)).tolist())

    def outside_of(self, method: str, plan: Plan) -> Vector:
        """Features of a call of a method outside the pruned layers."""
        vision, language = plan.streams["vision"].tokens, plan.streams["language"].tokens
        return self.outside(method, vision[0], vision[-1], language[-1], len(language))

    def vectors(self, plan: Plan) -> dict[str, np.ndarray]:
        """[features] of one call of each method: the plain sums over its layers and what is outside them."""
        found = {method: np.array(self.outside_of(method, plan)) for method in self.methods}
        for layers in self.layers_of(plan):
            for work in self.steps(layers):
                found[self.runs[layers.run].method] += np.sum(self.work(*work), axis=0)
        return found

    def _up(self, tokens: int) -> int:
        return -(-tokens // self.step) * self.step


def _runs(kind: str, *, reads_class: bool) -> tuple[Run, ...]:
    """What runs which layers; see `export.executorch.profiles` and `export.encoder_methods`."""
    if kind == "towers":
        image = Run("image_encoder", "vision", "class" if reads_class else "all")
        return image, Run("text_encoder", "language", "one")
    runs = [Run("vision_encoder", "vision")]
    name, reading = ("matcher" if kind == "matcher" else "prefill"), ("all" if kind == "answers" else "one")
    decodes = kind in ("generative", "captions")
    runs.append(Run(name, "language", reading, cached=decodes))
    if kind != "generative":
        runs.append(Run(name, "cross", reading, rows_of="language"))
    if decodes:
        runs.append(Run("decode", "language", decodes=True, cached=True))
    if kind == "captions":
        runs.append(Run("decode", "cross", rows_of="language", decodes=True))
    return tuple(runs)


def _pooled(head: Count, shape: StreamShape) -> Count:
    """A head's MACs as they are lowered: SigLIP's pool asks by a constant, so that a token costs two products a head."""
    return dataclasses.replace(head, per_vision_token=2 * shape.heads * shape.width) if head.per_vision_token else head


def _check_size(config: Any, where: str) -> None:
    for key, most in MOST.items():
        value = getattr(config, key, None) or 1
        for number in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(number, int) or not 1 <= number <= most:
                raise DeviceError(f"{where} has {key} {value!r}; accepted: 1 to {most}.")
