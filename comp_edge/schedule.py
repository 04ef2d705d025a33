"""Token schedules on a live transformers model: tokens are really dropped between layers, in `forward` and `generate`.

Hooks do it, so that every forward pass stays transformers' own. A pre-hook on each layer gathers the tokens that the
layer is to compute on, from the importance that the layer before left (see `comp_edge.attention`). Hooks around the
language model keep the caller's view whole: inputs carry one placeholder per image token of the *dense* model, image
features are padded with zeros to that number, and outputs have one position per input token (dropped ones read zero).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

from comp_edge import attention
from comp_edge.cache import ScheduledLayer, scheduled_cache
from comp_edge.families import family_of
from comp_edge.families.base import LayerView, StreamView
from comp_edge.selection import PROTECTED, keep_tokens, keep_within, layer_width, take, targets

_ATTRIBUTE = "comp_edge_schedule"


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
        decoding: tokens follow a filled cache: nothing is dropped.
        answers: tokens at the end that belong to answers.
        context: of the layer that ran last.
    """

    width: int
    valid: Tensor
    prompt: Tensor
    counts: Tensor
    decoding: bool
    answers: int
    kept: Tensor | None = None
    scores: Tensor | None = None
    context: attention.LayerContext | None = None


@dataclass
class _Request:
    """What the outer hooks found out about the batch, for the hooks of the language model's layers."""

    cache: Any = None
    answer_start: Tensor | None = None  # [b], in compact positions
    real: Tensor | None = None  # [b, given], False for surplus image placeholders
    answer_start_given: Tensor | None = None


Observer = Callable[[str, int, Tensor, Tensor], None]


@dataclass
class Schedule:
    """The active token schedule of a model; made by `attach`.

    Attributes:
        tokens: per stream, how many tokens each layer computes on.
        head_masks: per (stream, layer), the [heads] mask that token importance sees; fading heads have values below 1.
        observe: called as (stream, layer, scores [b, n], valid [b, n]) for each layer when set; makes every layer score.
    """

    model: Any
    streams: Mapping[str, StreamView]
    tokens: dict[str, tuple[int, ...]]
    head_masks: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    observe: Observer | None = None
    _flows: dict[str, _Flow] = field(default_factory=dict)
    _request: _Request = field(default_factory=_Request)
    _handles: list[Any] = field(default_factory=list)

    def drops(self, stream: str) -> bool:
        """Whether any layer of the stream computes on fewer tokens than its first."""
        return len(set(self.tokens[stream])) > 1

    def kept(self, stream: str) -> Tensor | None:
        """Indices [b, n] of the tokens that reached the last layer in the latest forward pass; None: all of them."""
        flow = self._flows.get(stream)
        return None if flow is None else flow.kept

    def reached(self, stream: str) -> Tensor | None:
        """[b, n] bool: which of the first layer's n tokens reached the last in the latest forward pass; pads did not.

        None before the first pass.
        """
        flow = self._flows.get(stream)
        if flow is None or flow.kept is None:
            return None if flow is None else flow.valid
        return flow.valid.new_zeros(len(flow.valid), flow.width).scatter(1, flow.kept, flow.valid)

    def detach(self) -> None:
        """Remove the schedule: the model runs every layer on every token again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        delattr(self.model, _ATTRIBUTE)

    # ---- one layer

    def before_layer(self, stream: StreamView, index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Pre-hook of a layer: drop what it need not compute on, and ask its attention for scores."""
        hidden = args[0]
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if index == 0:
            self._flows[stream.name] = self._start(stream, hidden, mask)
        flow = self._flows[stream.name]
        self._collect(stream, flow, index - 1)
        tokens = self.tokens[stream.name]
        if index and not flow.decoding and tokens[index] < tokens[index - 1]:
            hidden = self._drop(stream, flow, index, hidden)
        view = stream.layers[index]
        if flow.kept is not None and mask is not None and mask.shape[-2] == flow.width:
            mask = take(take(mask, flow.kept, 2), flow.kept, 3)
            # An example may keep fewer than the batch; the rest of its slots are padding.
            mask = mask.masked_fill(~flow.valid[:, None, None], torch.finfo(mask.dtype).min)
        if stream.causal:
            mask = self._through_cache(flow, view, index, mask)
            if flow.kept is not None and (rotary := kwargs.get("position_embeddings")) is not None:
                kwargs["position_embeddings"] = tuple(take(part, flow.kept, 1) for part in rotary)
            if flow.kept is not None and kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = take(kwargs["position_ids"], flow.kept, 1)
        later_drop = any(b < a for a, b in zip(tokens[index:], tokens[index + 1 :], strict=False))
        head_mask = self.head_masks.get((stream.name, index))
        flow.context = attention.LayerContext(
            # Attention whose heads are all gone ranks nothing, as if it had been removed: earlier scores stay.
            wants_scores=not flow.decoding
            and (later_drop or self.observe is not None)
            and (head_mask is None or bool(head_mask.any())),
            head_mask=head_mask,
            queries=None if not stream.causal else flow.valid & flow.prompt,
        )
        if view.attn is not None:
            kwargs["comp_edge"] = flow.context
        if len(args) > 1:
            return (hidden, mask, *args[2:]), kwargs
        kwargs["attention_mask"] = mask
        return (hidden, *args[1:]), kwargs

    def _start(self, stream: StreamView, hidden: Tensor, mask: Tensor | None) -> _Flow:
        batch, width = hidden.shape[:2]
        valid = torch.ones(batch, width, dtype=torch.bool, device=hidden.device)
        answer_start = None
        decoding = False
        if stream.causal:
            cache = self._request.cache
            decoding = cache is not None and cache.get_seq_length() > 0
            if mask is not None:
                # The last query sees every real token, whatever side the padding is on.
                valid = mask[:, 0, -1, -width:] == 0
            answer_start = self._request.answer_start
        prompt, answers = torch.ones_like(valid), 0
        if answer_start is not None and not decoding:
            prompt = torch.arange(width, device=hidden.device)[None] < answer_start[:, None]
            answers = width - int(answer_start.max())
        counts = (valid & prompt).sum(1)
        return _Flow(width=width, valid=valid, prompt=prompt, counts=counts, decoding=decoding, answers=answers)

    def _collect(self, stream: StreamView, flow: _Flow, index: int) -> None:
        """Take over the scores that layer `index` left; a layer without attention hands on those before it."""
        if flow.context is None:
            return
        if flow.context.scores is not None:
            flow.scores, flow.context.scores = flow.context.scores, None
        if self.observe is not None and flow.scores is not None and not flow.decoding:
            self.observe(stream.name, index, flow.scores, flow.valid & flow.prompt)

    def _drop(self, stream: StreamView, flow: _Flow, index: int, hidden: Tensor) -> Tensor:
        tokens = self.tokens[stream.name]
        keep = layer_width(flow.width, before=tokens[0], after=tokens[index], answers=flow.answers)
        if keep >= hidden.shape[1]:
            return hidden
        if flow.scores is None:
            raise RuntimeError(
                f"stream {stream.name!r} drops tokens before layer {index}, but no layer before it has attention"
            )
        ranking = flow.scores.float() * flow.valid
        # Answers, and the token that must survive: CLS, or the one that predicts what comes next.
        protected = ~flow.prompt & flow.valid
        if stream.protected == "first":
            protected[:, 0] = True
        else:
            last = (flow.valid & flow.prompt).int()
            protected.scatter_(1, last.shape[1] - 1 - last.flip(1).argmax(1, keepdim=True), True)
        ranking = ranking + PROTECTED * protected
        goal = targets(flow.counts, before=tokens[0], after=tokens[index]) + (~flow.prompt & flow.valid).sum(1)
        survivors = flow.valid & keep_within(ranking, goal)
        chosen = keep_tokens(ranking, keep=keep)
        flow.kept = chosen if flow.kept is None else flow.kept.gather(1, chosen)
        flow.valid, flow.prompt = survivors.gather(1, chosen), flow.prompt.gather(1, chosen)
        flow.scores = flow.scores.gather(1, chosen)
        return take(hidden, chosen, 1)

    def _through_cache(self, flow: _Flow, view: LayerView, index: int, mask: Tensor | None) -> Tensor | None:
        """Book the tokens of this layer into its cache layer; the mask over cached and new entries."""
        cache = self._request.cache
        if cache is None:
            return mask
        layer: ScheduledLayer = cache.layers[index]
        before = layer.valid
        layer.extend(flow.valid, flow.width)
        if not flow.decoding or mask is None or view.attn is None:
            return mask
        floor = torch.finfo(mask.dtype).min
        new = mask[..., -flow.width :]
        old = torch.zeros_like(before, dtype=mask.dtype).masked_fill(~before, floor)
        return torch.cat([old[:, None, None].expand(-1, 1, new.shape[2], -1), new], -1)

    # ---- around the streams

    def after_stream(self, stream: StreamView, output: Any) -> Any:
        """Post-hook of a stream: collect the last scores; give a causal stream one position per token again."""
        flow = self._flows[stream.name]
        self._collect(stream, flow, len(stream.layers) - 1)
        if stream.causal and flow.kept is not None:
            output.last_hidden_state = _spread(output.last_hidden_state, flow.kept, flow.width)
        return output

    def before_model(self, kwargs: dict) -> dict:
        """Pre-hook of the whole model: where do answers begin, as far as labels tell?"""
        self._request = _Request()
        labels = kwargs.get("labels")
        if labels is not None:
            is_answer = labels != -100
            first = is_answer.int().argmax(1)
            self._request.answer_start_given = torch.where(
                is_answer.any(1), first, torch.full_like(first, labels.shape[1])
            )
        return kwargs

    def before_fusion(self, kwargs: dict) -> dict:
        """Pre-hook of the module that joins the streams: leave out surplus image placeholders, prepare the cache."""
        request, ids = self._request, kwargs.get("input_ids")
        self._request = _Request(answer_start_given=request.answer_start_given)
        request = self._request
        if kwargs.get("use_cache") is not False or kwargs.get("past_key_values") is not None:
            config = family_of(self.model).stream_config(self.model, "language")
            kwargs["past_key_values"] = request.cache = scheduled_cache(kwargs.get("past_key_values"), config)
        decoding = request.cache is not None and request.cache.get_seq_length() > 0
        if decoding:
            self._shift_decoding(kwargs, request.cache)
            return kwargs
        request.answer_start = request.answer_start_given
        real = self._deliver_images(kwargs) if ids is not None else None
        if real is None:
            return kwargs
        batch, width = real.shape
        columns = real.nonzero()[:, 1].view(batch, -1)
        request.real = real
        if request.cache is not None:
            request.cache.layers[0].real = real
        kwargs["input_ids"] = ids.gather(1, columns)
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(ids)
        if mask.ndim != 2:
            raise ValueError(
                f"attention_mask must be [batch, tokens] for a model with a token schedule, got {mask.shape}"
            )
        kwargs["attention_mask"] = mask.gather(1, columns)
        # Kept image tokens follow each other, so positions are those of the compact sequence.
        kwargs["position_ids"] = (kwargs["attention_mask"].long().cumsum(1) - 1).clamp(min=0)
        if request.answer_start_given is not None:
            before = torch.cat([real.new_zeros(batch, 1), real], 1).long().cumsum(1)
            request.answer_start = before.gather(1, request.answer_start_given[:, None])[:, 0]
        return kwargs

    def _deliver_images(self, kwargs: dict) -> Tensor | None:
        """Replace images by the features that the vision stream delivers for them.

        Returns:
            [b, tokens] bool, False for the placeholders beyond these features; None where there are none.
        """
        family, model, ids = family_of(self.model), self.model, kwargs["input_ids"]
        dense = family.image_tokens(model, family.dense_vision_tokens(model))
        delivered = family.image_tokens(model, self.tokens["vision"][-1])
        if delivered == dense:
            return None
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if encoded is None:
            if kwargs.get("pixel_values") is None:
                return None
            given = inspect.signature(family.fusion(model).get_image_features).parameters
            arguments = {name: kwargs.pop(name) for name in list(kwargs) if name in given}
            encoded = family.fusion(model).get_image_features(**arguments, return_dict=True)
        features = [image[:delivered] for image in encoded.pooler_output]
        kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}
        is_image = ids == model.config.image_token_id
        per_row = is_image.sum(1)
        if int(per_row.sum()) != len(features) * dense:
            return None  # compact already, or an error that transformers reports itself
        if len(per_row.unique()) > 1:
            raise ValueError("all prompts of a batch must show the same number of images under a token schedule")
        within = (is_image.long().cumsum(1) - 1) % dense
        return ~is_image | (within < delivered)

    def after_connector(self, features: Tensor) -> Tensor:
        """Post-hook of the connector: as many features an image as the dense model has, zeros for those dropped.

        transformers counts features against placeholders when it expands a batch for beam search.
        """
        family = family_of(self.model)
        dense = family.image_tokens(self.model, family.dense_vision_tokens(self.model))
        return F.pad(features, (0, 0, 0, dense - features.shape[1]))

    def _shift_decoding(self, kwargs: dict, cache: Any) -> None:
        """Bring the caller's mask and positions, where they count surplus placeholders, to the compact sequence."""
        real, mask, positions = cache.layers[0].real, kwargs.get("attention_mask"), kwargs.get("position_ids")
        if real is None:
            return
        new = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        surplus = (~real).sum(1, keepdim=True)
        if mask is not None:
            decoded = cache.get_seq_length() - int(real[0].sum())
            if mask.shape[1] != real.shape[1] + decoded + new.shape[1]:
                return  # compact already
            columns = torch.cat([real, real.new_ones(len(real), mask.shape[1] - real.shape[1])], 1)
            kwargs["attention_mask"] = mask[columns].view(len(real), -1)
        elif positions is None or int(positions[0, 0]) < cache.get_seq_length() + int(surplus[0, 0]):
            return  # without padding generate passes no mask; positions alone tell whether the surplus is counted
        if positions is not None:
            kwargs["position_ids"] = positions - surplus

    def after_fusion(self, output: Any) -> Any:
        """Post-hook of the joining module: one position per given token again."""
        real = self._request.real
        if real is not None:
            columns = real.nonzero()[:, 1].view(len(real), -1)
            output.last_hidden_state = _spread(output.last_hidden_state, columns, real.shape[1])
        self._request = _Request()
        return output


def _spread(hidden: Tensor, index: Tensor, width: int) -> Tensor:
    """[b, k, d] at positions `index` [b, k] of [b, width, d]; zero elsewhere."""
    whole = hidden.new_zeros(hidden.shape[0], width, hidden.shape[2])
    return whole.scatter(1, index[..., None].expand(-1, -1, hidden.shape[2]), hidden)


def attach(model: Any, tokens: Mapping[str, Iterable[int]]) -> Schedule:
    """Activate a token schedule on a model; one that is already active is replaced.

    Args:
        tokens: per stream, tokens of each layer, as in a plan.
    """
    if (active := getattr(model, _ATTRIBUTE, None)) is not None:
        active.detach()
    attention.register()
    family = family_of(model)
    streams = family.streams(model)
    schedule = Schedule(model=model, streams=streams, tokens={name: tuple(tokens[name]) for name in streams})

    def on_kwargs(method: Callable[[dict], dict]) -> Callable:
        return lambda module, args, kwargs: (args, method(kwargs))

    handles = schedule._handles
    for name, stream in streams.items():
        family.stream_config(model, name)._attn_implementation = attention.NAME
        stream.root.config._attn_implementation = attention.NAME
        for index, layer in enumerate(stream.layers):
            hook = _layer_hook(schedule, stream, index)
            handles.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
        handles.append(
            stream.root.register_forward_hook(lambda m, args, output, s=stream: schedule.after_stream(s, output))
        )
    connector: nn.Module = family.connector(model)
    handles.append(connector.register_forward_hook(lambda m, args, output: schedule.after_connector(output)))
    fusion: nn.Module = family.fusion(model)
    handles.append(model.register_forward_pre_hook(on_kwargs(schedule.before_model), with_kwargs=True))
    handles.append(fusion.register_forward_pre_hook(on_kwargs(schedule.before_fusion), with_kwargs=True))
    handles.append(fusion.register_forward_hook(lambda m, args, output: schedule.after_fusion(output)))
    setattr(model, _ATTRIBUTE, schedule)
    return schedule


def _layer_hook(schedule: Schedule, stream: StreamView, index: int) -> Callable:
    return lambda module, args, kwargs: schedule.before_layer(stream, index, args, dict(kwargs))


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
    """Whether the model's active schedule drops tokens inside a stream."""
    schedule = active_schedule(model)
    return schedule is not None and schedule.drops(stream)
