"""A key-value cache whose layers have different lengths, on top of transformers' DynamicCache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class ScheduledLayer(DynamicLayer):
    """One layer of a scheduled cache: keys and values of the tokens that this layer kept.

    Attributes:
        valid: [b, cached] bool, which entries are real tokens (not padding).
        seen: compact positions that have passed, dropped ones included; what the model counts positions by.
        real: layer 0 only: [b, given] bool, which of the tokens the caller gave were not surplus image placeholders.
    """

    def __init__(self) -> None:
        super().__init__()
        self.valid: Tensor | None = None
        self.real: Tensor | None = None
        self.seen = 0

    def get_seq_length(self) -> int:
        """Positions seen so far (not the number of cached entries)."""
        return self.seen

    def extend(self, valid: Tensor, new_positions: int) -> None:
        """Note that `new_positions` have passed, of which `valid` [b, kept] entries are (about to be) cached."""
        self.valid = valid if self.valid is None else torch.cat([self.valid, valid], 1)
        self.seen += new_positions

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.valid = self.real = None
        self.seen = 0

    def _each_batch_tensor(self, change: Any) -> None:
        for name in ("keys", "values", "valid", "real"):
            value = getattr(self, name, None)
            if value is not None:
                setattr(self, name, change(value))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every example `repeats` times."""
        self._each_batch_tensor(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these examples."""
        self._each_batch_tensor(lambda t: t[indices])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the examples (beam search)."""
        self._each_batch_tensor(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` decoded tokens."""
        super().crop(tokens_to_remove)
        if tokens_to_remove and self.valid is not None:
            self.valid = self.valid[:, :tokens_to_remove]
            self.seen += tokens_to_remove


def scheduled_cache(cache: Any, config: Any) -> DynamicCache:
    """A cache with scheduled layers: `cache` itself, its layers replaced while they are still empty.

    Args:
        cache: what the caller passed as `past_key_values`, or None for a new one.
        config: the language model's config.

    Raises:
        ValueError: the cache is of another kind, or was filled by a model without a token schedule.
    """
    if cache is None:
        cache = DynamicCache(config=config)
    if not isinstance(cache, DynamicCache):
        raise ValueError(
            f"a model with a token schedule needs a DynamicCache, whose layers may differ in length; got "
            f"{type(cache).__name__}"
        )
    if not all(isinstance(layer, ScheduledLayer) for layer in cache.layers) or not cache.layers:
        if cache.get_seq_length():
            raise ValueError("the cache was filled by a model without a token schedule")
        cache.layers = [ScheduledLayer() for _ in range(config.num_hidden_layers)]
    return cache
