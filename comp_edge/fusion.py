"""What joins the streams of a generative model under a token schedule: placeholders, positions, cache and `generate`.

The caller's view stays whole: inputs carry one placeholder per image token of the *dense* model, and outputs have one
position per input token (dropped ones read zero).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from comp_edge.cache import scheduled_cache
from comp_edge.families import family_of
from comp_edge.prompts import Compaction, answer_starts, surplus_placeholders


@dataclass
class Fusion:
    """Hooks around the module that joins the streams, and around the whole model.

    Attributes:
        schedule: whose `tokens["vision"]` say how many features an image has.
        cache: the scheduled cache of the running pass; None without one.
        decoding: the running pass follows a filled cache.
        answer_start: [b] the first compact slot that belongs to an answer, where that is known.
    """

    model: Any
    schedule: Any
    cache: Any = None
    decoding: bool = False
    answer_start: Tensor | None = None
    _given_start: Tensor | None = None
    _compaction: Compaction | None = None
    _prompt_length: int | None = None
    _handles: list[Any] = field(default_factory=list)

    def attach(self) -> None:
        """Register the hooks, and let `generate` say how long its prompt is."""
        fusion: nn.Module = family_of(self.model).fusion(self.model)
        self._handles = [
            self.model.register_forward_pre_hook(_Before(self.before_model), with_kwargs=True),
            fusion.register_forward_pre_hook(_Before(self.before_fusion), with_kwargs=True),
            fusion.register_forward_hook(_After(self.after_fusion)),
        ]
        self.model.generate = _Generate(self)

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        vars(self.model).pop("generate", None)

    @contextmanager
    def generating(self, prompt_length: int | None) -> Iterator[None]:
        """While `generate` runs: tokens beyond the prompt belong to the answer, also where no cache tells them apart."""
        previous, self._prompt_length = self._prompt_length, prompt_length
        try:
            yield
        finally:
            self._prompt_length = previous

    # ---- hooks

    def before_model(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Pre-hook of the whole model: where do answers begin, as far as labels or `generate` tell?"""
        self._given_start = None
        given = arguments.get("input_ids")
        given = arguments.get("inputs_embeds") if given is None else given
        if arguments.get("labels") is not None:
            self._given_start = answer_starts(arguments["labels"])
        elif self._prompt_length is not None and given is not None and given.shape[1] > self._prompt_length:
            self._given_start = torch.full((len(given),), self._prompt_length, device=given.device)
        return arguments

    def before_fusion(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Pre-hook of the joining module: leave out surplus image placeholders, prepare the cache."""
        self._compaction, self.cache = None, None
        if arguments.get("use_cache") is not False or arguments.get("past_key_values") is not None:
            config = family_of(self.model).stream_config(self.model, "language")
            self.cache = arguments["past_key_values"] = scheduled_cache(arguments.get("past_key_values"), config)
        self.decoding = self.cache is not None and self.cache.get_seq_length() > 0
        self.answer_start = self._given_start
        if self.decoding:
            self._shift_decoding(arguments)
            return arguments
        real = self._deliver_images(arguments) if arguments.get("input_ids") is not None else None
        if real is not None:
            self._compact(arguments, Compaction.of(real))
        return arguments

    def after_fusion(self, output: Any) -> Any:
        """Post-hook of the joining module: one position per given token again."""
        if self._compaction is not None:
            output.last_hidden_state = self._compaction.spread(output.last_hidden_state)
        return output

    # ---- prefill

    def _deliver_images(self, arguments: dict[str, Any]) -> Tensor | None:
        """Replace images by the features that the vision stream delivers for them.

        Returns:
            [b, tokens] bool, False for the placeholders beyond these features; None where there are none.
        """
        family, model, ids = family_of(self.model), self.model, arguments["input_ids"]
        vision = self.schedule.tokens["vision"]
        if arguments.get("pixel_values_videos") is not None and self.schedule.drops("vision"):
            raise ValueError("a model whose image tokens are dropped takes images, not videos")
        dense, delivered = family.image_tokens(model, vision[0]), family.delivered(model, vision)
        if delivered == dense:
            return None
        encoded = (arguments.get("mm_encoder_outputs") or {}).get("image")
        if encoded is None:
            if arguments.get("pixel_values") is None:
                return None
            fusion = family.fusion(model)
            wanted = inspect.signature(fusion.get_image_features).parameters
            given = {name: value for name, value in arguments.items() if name in wanted}
            encoded = fusion.get_image_features(**given, return_dict=True)
        arguments["pixel_values"] = None
        pooled = encoded.pooler_output
        rows = pooled if isinstance(pooled, Tensor) else torch.cat(list(pooled))
        is_image = ids == model.config.image_token_id
        rows = rows.reshape(-1, rows.shape[-1])
        if family.absolute_positions:
            stays = (rows != 0).any(-1)
        else:
            stays = torch.arange(len(rows), device=ids.device) % dense < delivered
        # Otherwise the prompt is compact already, or wrong in a way that transformers reports itself.
        real = surplus_placeholders(is_image, stays) if int(is_image.sum()) == len(rows) else None
        rows = rows[stays]
        pooled = rows if isinstance(pooled, Tensor) else [rows]
        arguments["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=pooled)}
        return real

    def _compact(self, arguments: dict[str, Any], compaction: Compaction) -> None:
        """The arguments without the surplus placeholders."""
        family = family_of(self.model)
        self._compaction = compaction
        if self.cache is not None:
            self.cache.layers[0].real = compaction.real
        ids, mask = arguments["input_ids"], arguments.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        if mask.ndim != 2:
            raise ValueError(
                f"attention_mask must be [batch, tokens] for a model with a token schedule, got {tuple(mask.shape)}"
            )
        positions = None
        if family.absolute_positions:
            positions = compaction.gather(family.positions(self.model, arguments))
        arguments["input_ids"] = compaction.gather(ids)
        arguments["attention_mask"] = compaction.gather(mask)
        if positions is None:
            # Kept image tokens follow each other, so positions are those of the compact sequence.
            positions = (arguments["attention_mask"].long().cumsum(1) - 1).clamp(min=0)
        arguments["position_ids"] = positions
        if self._given_start is not None:
            self.answer_start = compaction.start(self._given_start)

    # ---- decoding

    def _shift_decoding(self, arguments: dict[str, Any]) -> None:
        """Bring the caller's mask and positions, where they count surplus placeholders, to the compact sequence."""
        real, mask, positions = (
            self.cache.layers[0].real,
            arguments.get("attention_mask"),
            arguments.get("position_ids"),
        )
        if real is None:
            return
        compaction = Compaction.of(real)
        seen = self.cache.get_seq_length()
        decoded = seen - compaction.columns.shape[1]
        new = arguments["input_ids"] if arguments.get("input_ids") is not None else arguments["inputs_embeds"]
        surplus, family = compaction.surplus, family_of(self.model)
        if family.absolute_positions and positions is None:
            before = real.new_ones(len(real), real.shape[1] + decoded) if mask is None else mask[:, : -new.shape[1]]
            passed = before.long().sum(1, keepdim=True)
            arguments["position_ids"] = family.later_positions(self.model, passed, new.shape[1])
        if mask is not None:
            if mask.shape[1] != real.shape[1] + decoded + new.shape[1]:
                return  # compact already
            prompt = compaction.gather(mask[:, : real.shape[1]])
            arguments["attention_mask"] = torch.cat([prompt, mask[:, real.shape[1] :]], 1)
        elif not compaction.full:
            more = real.new_ones(len(real), decoded + new.shape[1])
            arguments["attention_mask"] = torch.cat([compaction.present, more], 1).long()
        if family.absolute_positions:
            return
        if mask is None and (positions is None or int(positions[0, 0]) < seen + int(surplus[0, 0])):
            return  # without padding generate passes no mask; positions alone tell whether the surplus is counted
        if positions is not None:
            arguments["position_ids"] = positions - surplus


@dataclass
class _Before:
    """A pre-hook that changes keyword arguments."""

    method: Any

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        names = tuple(inspect.signature(module.forward).parameters)
        return (), self.method(dict(zip(names, args, strict=False)) | kwargs)


@dataclass
class _After:
    """A post-hook that changes the output."""

    method: Any

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return self.method(output)


@dataclass
class _Generate:
    """transformers' own `generate` of the model, with the prompt's length noted while it runs."""

    fusion: Fusion

    def __call__(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        given = [inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        prompt = next((value.shape[1] for value in given if value is not None), None)
        model = self.fusion.model
        with self.fusion.generating(prompt):
            return type(model).generate(model, inputs, *args, **kwargs)
