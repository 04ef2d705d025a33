"""The attention function that comp-edge registers with transformers: plain attention that can also score tokens.

transformers lets a model pick its attention by name. Under the name "comp_edge" a layer computes what "sdpa" computes;
when the token schedule hands it a `LayerContext` that asks for scores, it also leaves the importance of each token there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from comp_edge.importance import token_importance

NAME = "comp_edge"


@dataclass
class LayerContext:
    """What a layer's attention is told, and what it answers.

    Attributes:
        wants_scores: compute `scores`.
        head_mask: [heads] mask that the importance sees (CIT); None while no head fades.
        queries: [b, n] bool, query rows that count; None for all.
        scores: the answer, [b, n] importance of the tokens before Norm.
    """

    wants_scores: bool = False
    head_mask: Tensor | None = None
    queries: Tensor | None = None
    scores: Tensor | None = None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    comp_edge: LayerContext | None = None,
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
    if comp_edge is None or not comp_edge.wants_scores:
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
        )
        return output.transpose(1, 2).contiguous(), None
    logits = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        logits = logits + attention_mask
    probabilities = logits.float().softmax(-1).to(query.dtype)
    # Which tokens to keep is a decision, not a function to learn through: no gradient.
    comp_edge.scores = token_importance(
        probabilities.detach(), head_mask=comp_edge.head_mask, queries=comp_edge.queries
    )
    output = F.dropout(probabilities, dropout, module.training) @ value
    return output.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make "comp_edge" known to transformers. Idempotent; nothing changes for models that do not ask for it."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, eager_mask)


__all__ = ["NAME", "LayerContext", "attention", "register"]
