"""Token schedules on a live transformers model: tokens are really dropped between layers, in `forward` and `generate`.

Hooks do it, so that every forward pass stays transformers' own. A pre-hook on each layer gathers the tokens that the
layer is to compute on, from the importance that a layer before left (see `comp_edge.attention`); where a connector needs
all tokens, a hook drops behind it. What joins the streams of a generative model is in `comp_edge.fusion`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comp_edge import attention
from comp_edge.families import family_of
from comp_edge.families.base import LayerView, StreamView
from comp_edge.fusion import Fusion
from comp_edge.prompts import spread
from comp_edge.selection import PROTECTED, keep_tokens, keep_within, layer_width, take, targets

_ATTRIBUTE = "comp_edge_schedule"
_MASKS = ("attention_mask", "encoder_attention_mask")


@dataclass
class _Flow:
    """One forward pass through one stream.

    Attributes:
        width: tokens that the first layer got.
        kept: [b, n] indices of the surviving tokens among them; None while nothing was dropped.
        valid: [b, n] which survivors are real tokens.
        prompt: [b, n] which survivors belong to the prompt (may be dropped, count as queries).
        scores: [b, n] last known importance.
        counts: [b] real prompt tokens at the first layer.
        anchor: [b] the token that is never dropped; -1 for none.
        decoding: tokens follow a filled cache: nothing is dropped.
        answers: tokens at the end that belong to answers.
        context: of the layer that ran last.
        handed: [k] of each image: which tokens the connector's hook kept; None while it keeps all.
    """

    width: int
    valid: Tensor
    prompt: Tensor
    counts: Tensor
    anchor: Tensor
    decoding: bool
    answers: int
    kept: Tensor | None = None
    scores: Tensor | None = None
    context: attention.LayerContext | None = None
    handed: list[Tensor] | None = None

    def positions(self) -> Tensor:
        """[b, n] where the survivors were in the first layer."""
        if self.kept is not None:
            return self.kept
        return torch.arange(self.width, device=self.valid.device).expand(len(self.valid), -1)


# Called as (stream, layer, scores [b, n], valid [b, n]).
Observer = Callable[[str, int, Tensor, Tensor], None]
# Called as (stream, layer, scores [b, n], valid [b, n]); gives scores [b, n] and how many tokens stay [b], or None.
Decision = Callable[[str, int, Tensor, Tensor], tuple[Tensor, Tensor] | None]


@dataclass
class Schedule:
    """The active token schedule of a model; made by `attach`.

    Attributes:
        tokens: per stream, its token schedule (see `StreamPlan.schedule`).
        head_masks: per (stream, layer), the [heads] mask that token importance sees; fading heads have values below 1.
        observe: called for each layer when set, and with the number of layers for what a connector hands on; makes every
            layer score.
        decide: called before each drop when set: may give other scores to rank the tokens by, and how many of each example
            stay, protected ones included. Where examples keep different numbers, the rest of their slots is padding, which
            is the caller's to mask in streams whose layers get no mask.
    """

    model: Any
    streams: Mapping[str, StreamView]
    tokens: dict[str, tuple[int, ...]]
    head_masks: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    observe: Observer | None = None
    decide: Decision | None = None
    fusion: Fusion | None = None
    _flows: dict[str, _Flow] = field(default_factory=dict)
    _arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)

    def drops(self, stream: str) -> bool:
        """Whether any layer of the stream computes on fewer tokens than its first, or a connector hands on fewer."""
        return any(self._falls(stream, point) for point in self.streams[stream].drop_points)

    def kept(self, stream: str) -> Tensor | None:
        """Indices [b, n] of the tokens that reached the last layer in the latest forward pass; None: all of them."""
        flow = self._flow(stream)
        return None if flow is None else flow.kept

    def handed(self, stream: str) -> list[Tensor] | None:
        """Of each image, indices [k] of the connector's tokens that were handed on in the latest pass; None: all."""
        flow = self._flow(stream)
        return None if flow is None else flow.handed

    def reached(self, stream: str) -> Tensor | None:
        """[b, n] bool: which of the first layer's n tokens reached the last in the latest forward pass; pads did not.

        None before the first pass.
        """
        flow = self._flow(stream)
        if flow is None or flow.kept is None:
            return None if flow is None else flow.valid
        return flow.valid.new_zeros(len(flow.valid), flow.width).scatter(1, flow.kept, flow.valid)

    def detach(self) -> None:
        """Remove the schedule: the model runs every layer on every token again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.fusion is not None:
            self.fusion.detach()
        for stream in self.streams.values():
            for layer in stream.layers:
                if layer.attn is not None:
                    vars(layer.attn.module).pop(attention.CONTEXT, None)
        delattr(self.model, _ATTRIBUTE)

    def _flow(self, stream: str) -> _Flow | None:
        return self._flows.get(self.streams[stream].follows or stream)

    # ---- where tokens fall

    def _falls(self, stream: str, point: int) -> bool:
        """Whether a point of the schedule has fewer tokens than what comes to it."""
        tokens, layers = self.tokens[stream], len(self.streams[stream].layers)
        before = tokens[point - 1]
        if point == layers:
            before = family_of(self.model).image_tokens(self.model, before)
        return tokens[point] < before

    def _ranks(self, stream: StreamView, index: int) -> bool:
        """Whether a drop ranks tokens by this layer: it is the last one before the drop that has attention."""
        falls = [point for point in stream.drop_points if point > index and self._falls(stream.name, point)]
        later = [i for i in range(index + 1, falls[0]) if self._attends(stream, i)] if falls else []
        return bool(falls) and not later and self._attends(stream, index)

    def _attends(self, stream: StreamView, index: int) -> bool:
        """Attention whose heads are all masked ranks nothing, as if it had been removed."""
        mask = self.head_masks.get((stream.name, index))
        return stream.layers[index].attn is not None and (mask is None or bool(mask.any()))

    # ---- one layer

    def before_layer(self, stream: StreamView, index: int, arguments: dict[str, Any]) -> dict[str, Any]:
        """Pre-hook of a layer: drop what it need not compute on, and ask its attention for scores."""
        hidden, mask = arguments["hidden_states"], arguments.get("attention_mask")
        if index == 0:
            self._flows[stream.name] = self._start(stream, hidden, mask)
        flow = self._flows[stream.name]
        self._collect(stream, flow, index - 1)
        if index in stream.drops and not flow.decoding and self._falls(stream.name, index):
            arguments["hidden_states"] = self._drop(stream, flow, index, hidden)
        if flow.kept is not None:
            for name in _MASKS:
                if arguments.get(name) is not None:
                    arguments[name] = _smaller_mask(arguments[name], flow, keys=name == "attention_mask")
            if arguments.get("position_embeddings") is not None:
                arguments["position_embeddings"] = tuple(
                    take(part, flow.kept, 1) for part in arguments["position_embeddings"]
                )
            if arguments.get("position_ids") is not None:
                arguments["position_ids"] = take(arguments["position_ids"], flow.kept, 1)
        view = stream.layers[index]
        if self.fusion is not None and stream.name == "language":
            mask = arguments.get("attention_mask")
            arguments["attention_mask"] = self._through_cache(flow, view, index, mask)
        flow.context = attention.LayerContext(
            wants_scores=not flow.decoding
            and (self._ranks(stream, index) or self.observe is not None and self._attends(stream, index)),
            head_mask=self.head_masks.get((stream.name, index)),
            queries=flow.valid & flow.prompt if _has_padding(flow) or stream.causal else None,
        )
        if view.attn is not None:
            setattr(view.attn.module, attention.CONTEXT, flow.context)
        return arguments

    def _start(self, stream: StreamView, hidden: Tensor, mask: Tensor | None) -> _Flow:
        arguments = self._arguments.get(stream.name, {})
        batch, width = (1, len(hidden)) if stream.packed else hidden.shape[:2]
        valid = torch.ones(batch, width, dtype=torch.bool, device=hidden.device)
        if mask is not None:
            # The last query sees every real token, whatever side the padding is on.
            last = mask[:, 0, -1, -width:]
            valid = (last if last.dtype == torch.bool else last == 0).expand(batch, -1)
        places = torch.arange(width, device=hidden.device)[None]
        end = None
        if stream.protected == "end":
            end = stream.end(arguments)
            valid = valid & (places <= end[:, None])
        decoding, answers, prompt = False, 0, torch.ones_like(valid)
        if self.fusion is not None and stream.name == "language":
            decoding, start = self.fusion.decoding, self.fusion.answer_start
            if start is not None and not decoding:
                prompt = places < start[:, None]
                answers = width - int(start.max())
        return _Flow(
            width=width,
            valid=valid,
            prompt=prompt,
            counts=(valid & prompt).sum(1),
            anchor=_anchor(stream, valid & prompt, end),
            decoding=decoding,
            answers=answers,
        )

    def _collect(self, stream: StreamView, flow: _Flow, index: int) -> None:
        """Take over the scores that layer `index` left; a layer without attention hands on those before it."""
        if flow.context is None:
            return
        if (scores := flow.context.take()) is not None:
            flow.scores = scores.reshape(flow.valid.shape)
        if self.observe is not None and flow.scores is not None and not flow.decoding:
            self.observe(stream.name, index, flow.scores, flow.valid & flow.prompt)

    def _drop(self, stream: StreamView, flow: _Flow, index: int, hidden: Tensor) -> Tensor:
        tokens = self.tokens[stream.name]
        keep = layer_width(flow.width, before=tokens[0], after=tokens[index], answers=flow.answers)
        if self.decide is None and keep >= hidden.shape[1]:
            return hidden
        if flow.scores is None:
            raise RuntimeError(
                f"stream {stream.name!r} drops tokens before layer {index}, but no layer before it has attention"
            )
        answers = ~flow.prompt & flow.valid
        scores, goal = flow.scores, targets(flow.counts, before=tokens[0], after=tokens[index]) + answers.sum(1)
        if self.decide is not None and (decision := self.decide(stream.name, index, scores, flow.valid)) is not None:
            scores, goal = decision
            keep = int(goal.max())
        protected = answers | (flow.positions() == flow.anchor[:, None])
        ranking = scores.float() * flow.valid + PROTECTED * protected
        survivors = flow.valid & keep_within(ranking, goal)
        chosen = keep_tokens(ranking, keep=keep)
        flow.kept = chosen if flow.kept is None else flow.kept.gather(1, chosen)
        flow.valid, flow.prompt = survivors.gather(1, chosen), flow.prompt.gather(1, chosen)
        flow.scores = flow.scores.gather(1, chosen)
        return take(hidden, chosen, 1)

    def _through_cache(self, flow: _Flow, view: LayerView, index: int, mask: Tensor | None) -> Tensor | None:
        """Book the tokens of this layer into its cache layer; the mask over cached and new entries."""
        cache = self.fusion.cache
        if cache is None:
            return mask
        before = cache.layers[index].valid
        cache.layers[index].extend(flow.valid, flow.width)
        if not flow.decoding or view.attn is None or mask is None and bool(before.all()):
            return mask
        floor = torch.finfo(self.model.dtype).min
        old = torch.zeros_like(before, dtype=self.model.dtype).masked_fill(~before, floor)[:, None, None]
        if mask is None:
            mask = _causal(flow.width, old)
        new = mask[..., -flow.width :]
        return torch.cat([old.expand(-1, 1, new.shape[2], -1), new.expand(len(old), -1, -1, -1)], -1)

    # ---- around the streams

    def enter(self, stream: StreamView, arguments: dict[str, Any]) -> None:
        """Pre-hook of a stream's entry: note what it was called with."""
        self._arguments[stream.name] = arguments

    def after_stream(self, stream: StreamView, output: Any) -> Any:
        """Post-hook of a stream: collect the last scores; one position per token again where others count on that."""
        flow = self._flows[stream.name]
        self._collect(stream, flow, len(stream.layers) - 1)
        if stream.spread and flow.kept is not None:
            output.last_hidden_state = spread(output.last_hidden_state, flow.kept, flow.width)
        return output

    def after_connector(self, output: Any) -> Any:
        """Post-hook of the connector: drop behind it where it needs all tokens.

        As many features an image as the dense model has come out, zeros for those dropped: transformers counts features
        against placeholders when it expands a batch for beam search. The zeros stand at the end; in a model with absolute
        positions they stand where the dropped tokens were.
        """
        family, stream = family_of(self.model), self.streams["vision"]
        if stream.hands_over:
            return family.change_features(output, self._hand_on)
        dense = family.image_tokens(self.model, self.tokens["vision"][0])
        return F.pad(output, (0, 0, 0, dense - output.shape[1]))

    def _hand_on(self, features: Tensor) -> Tensor:
        """Features [rows, d] of all images, with those of dropped tokens at the end of their image's, or zero in place."""
        family, stream, flow = family_of(self.model), self.streams["vision"], self._flows["vision"]
        flow.handed = None
        falls = self._falls("vision", len(stream.layers))
        if not falls and self.observe is None:
            return features
        scores = family.pool_scores(self.model, flow.scores, self._arguments["vision"])
        if self.observe is not None:
            for row in scores:
                self.observe("vision", len(stream.layers), row[None], torch.ones_like(row[None], dtype=torch.bool))
        if not falls:
            return features
        flow.handed, parts = [], []
        before, after = family.image_tokens(self.model, self.tokens["vision"][0]), self.tokens["vision"][-1]
        for row, image in zip(scores, features.split([len(row) for row in scores]), strict=True):
            keep = layer_width(len(row), before=before, after=after, answers=0)
            chosen = keep_tokens(row[None].float(), keep=keep)[0]
            places = chosen if family.absolute_positions else torch.arange(keep, device=chosen.device)
            parts.append(torch.zeros_like(image).index_copy(0, places, image[chosen]))
            flow.handed.append(chosen)
        return torch.cat(parts)


def _anchor(stream: StreamView, prompt: Tensor, end: Tensor | None) -> Tensor:
    """[b] the position of the token that must survive: CLS, the one that predicts what comes next, ..."""
    width = prompt.shape[1]
    if stream.protected == "end":
        return end
    if stream.protected == "last":
        return width - 1 - prompt.int().flip(1).argmax(1)
    fixed = {"first": 0, "final": width - 1, "none": -1}[stream.protected]
    return torch.full((len(prompt),), fixed, device=prompt.device)


def _has_padding(flow: _Flow) -> bool:
    return not bool((flow.valid & flow.prompt).all())


def _smaller_mask(mask: Tensor, flow: _Flow, *, keys: bool) -> Tensor:
    """A mask [b, 1, n, m] for the surviving queries, and where `keys` are the same tokens for the surviving keys."""
    if mask.shape[-2] != flow.width:
        return mask
    mask = take(mask, flow.kept, 2)
    if not keys:
        return mask
    mask = take(mask, flow.kept, 3)
    # An example may keep fewer than the batch; the rest of its slots are padding.
    return mask.masked_fill(~flow.valid[:, None, None], torch.finfo(mask.dtype).min)


def _causal(width: int, like: Tensor) -> Tensor:
    """[1, 1, width, width], the mask among new tokens."""
    floor = torch.finfo(like.dtype).min
    return like.new_full((1, 1, width, width), floor).triu(1)


# ---- hooks: objects, so that a copied model gets copies that belong to it


@dataclass
class _Hook:
    schedule: Schedule
    stream: StreamView


@dataclass
class _LayerHook(_Hook):
    index: int
    names: tuple[str, ...]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        arguments = self.schedule.before_layer(self.stream, self.index, arguments)
        return (arguments.pop("hidden_states"),), arguments


@dataclass
class _EntryHook(_Hook):
    names: tuple[str, ...]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.schedule.enter(self.stream, dict(zip(self.names, args, strict=False)) | kwargs)


@dataclass
class _StreamHook(_Hook):
    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return self.schedule.after_stream(self.stream, output)


@dataclass
class _ConnectorHook:
    schedule: Schedule

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return self.schedule.after_connector(output)


@dataclass
class _ProbabilitiesHook:
    """For attention that returns its probabilities and does not ask transformers' attention interface."""

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        context = getattr(module, attention.CONTEXT, None)
        if context is not None and context.wants_scores:
            context.note(output[1])


def attach(model: Any, tokens: Mapping[str, Iterable[int]]) -> Schedule:
    """Activate a token schedule on a model; one that is already active is replaced.

    Args:
        tokens: per stream, tokens of each layer, as in a plan (see `StreamPlan.schedule`).
    """
    if (active := active_schedule(model)) is not None:
        active.detach()
    attention.register()
    family = family_of(model)
    streams = family.streams(model)
    schedule = Schedule(model=model, streams=streams, tokens={name: tuple(tokens[name]) for name in streams})
    handles = schedule._handles
    for name, stream in streams.items():
        if stream.follows:
            continue
        if not family.returns_probabilities:
            _use_our_attention(family.stream_config(model, name), stream)
        handles.append(
            (stream.entry or stream.root).register_forward_pre_hook(
                _EntryHook(schedule, stream, _parameters(stream.entry or stream.root)), with_kwargs=True
            )
        )
        for index, layer in enumerate(stream.layers):
            hook = _LayerHook(schedule, stream, index, _parameters(layer.module))
            handles.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
            if family.returns_probabilities and layer.attn is not None:
                handles.append(layer.attn.module.register_forward_hook(_ProbabilitiesHook()))
        handles.append(stream.root.register_forward_hook(_StreamHook(schedule, stream)))
    if (connector := family.connector(model)) is not None:
        handles.append(connector.register_forward_hook(_ConnectorHook(schedule)))
    handles += family.attach_extras(schedule)
    setattr(model, _ATTRIBUTE, schedule)
    if family.fusion(model) is not None:
        schedule.fusion = Fusion(model, schedule)
        schedule.fusion.attach()
    return schedule


def _parameters(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)


def _use_our_attention(config: Any, stream: StreamView) -> None:
    """transformers asks the config of each module which attention to use, and some modules have copies of their own."""
    configs = [config, stream.root.config, getattr(stream.entry, "config", None)]
    configs += [layer.attn.module.config for layer in stream.layers if layer.attn is not None]
    for found in configs:
        if found is not None:
            found._attn_implementation = attention.NAME


def active_schedule(model: Any) -> Schedule | None:
    """The schedule that `attach` activated on the model, if any."""
    return getattr(model, _ATTRIBUTE, None)


def lift_language_drops(model: Any) -> None:
    """Let every language layer compute on all tokens that the first one gets, as a stock runtime does."""
    schedule = active_schedule(model)
    if schedule is not None:
        tokens = schedule.tokens["language"]
        attach(model, {**schedule.tokens, "language": tokens[:1] * len(tokens)})


def drops_tokens(model: Any, stream: str) -> bool:
    """Whether the model's active schedule drops tokens of a stream."""
    schedule = active_schedule(model)
    return schedule is not None and schedule.drops(stream)
