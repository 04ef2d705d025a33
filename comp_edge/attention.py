"""The attention function that comp-edge registers with transformers: plain attention that can also score tokens.

transformers lets a model pick its attention by name. Under the name "comp_edge" a layer computes what "sdpa" computes;
when the token schedule leaves a `LayerContext` on the attention module that asks for scores, it also leaves the importance
of each token there. (On the module, because many layers do not hand keyword arguments on to their attention.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from comp_edge.importance import token_importance

NAME = "comp_edge"
CONTEXT = "comp_edge_context"  # the attribute of an attention module


@dataclass
class LayerContext:
    """What a layer's attention is told, and what it answers.

    Attributes:
        wants_scores: compute `scores`.
        head_mask: [heads] mask that the importance sees (CIT); None while no head fades.
        queries: [b, n] bool, query rows that count; None for all.
        scores: the answer, [b, n] importance of the tokens before Norm; in parts where attention is called for one
            stretch of tokens after the other.
    """

    wants_scores: bool = False
    head_mask: Tensor | None = None
    queries: Tensor | None = None
    scores: list[Tensor] = field(default_factory=list)

    def note(self, probabilities: Tensor) -> None:
        """Score the tokens of one call, from softmax probabilities [b, heads, n, n]."""
        # Which tokens to keep is a decision, not a function to learn through: no gradient.
        self.scores.append(token_importance(probabilities.detach(), head_mask=self.head_mask, queries=self.queries))

    def take(self) -> Tensor | None:
        """The scores of all calls [b, n], which are forgotten here; None without any."""
        scores = torch.cat(self.scores, 1) if self.scores else None
        self.scores = []
        return scores


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface.

    Args:
        query: [b, heads, n, head_dim]; key, value: [b, kv heads, m, head_dim].
        attention_mask: [b, 1, n, m], added to the logits.

    Returns:
        [b, n, heads, head_dim], None
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    context: LayerContext | None = getattr(module, CONTEXT, None)
    if context is None or not context.wants_scores:
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
        )
        return output.transpose(1, 2).contiguous(), None
    # In place: the products of all heads are the largest tensors of a layer.
    logits = query @ key.transpose(-1, -2)
    logits *= scaling
    if attention_mask is not None:
        logits += attention_mask
    probabilities = logits.float().softmax(-1).to(query.dtype)
    context.note(probabilities)
    output = F.dropout(probabilities, dropout, module.training) @ value
    return output.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make "comp_edge" known to transformers. Idempotent; nothing changes for models that do not ask for it."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, eager_mask)


__all__ = ["CONTEXT", "NAME", "LayerContext", "attention", "register"]
