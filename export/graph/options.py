"""Where the backends want the same function written differently."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class GraphOptions:
    """How a graph is written; every choice computes the same function.

    Attributes:
        mask: what is subtracted from the logit of a masked key. A key can be masked twice (later than the query, and
            padding), so twice this value must be finite in the backend's precision.
        protect: what is added to the score of a token that must survive. Scores are sums of at most n probabilities.
        norm: the mean inside a norm. "linear" multiplies with a row of 1/d: XNNPACK has no mean over the last dimension of
            a rank-3 tensor. "mean" says what it means.
        selection: "topk" takes the best scores, orders their indices by a second top-k (`aten.sort` lowers for
            ExecuTorch and then fails at load) and gathers. "rank" compares the scores pairwise and gathers by a one-hot
            matmul: the same tokens without top-k or gather, which the Neural Engine does not run.
    """

    mask: float = 1e9
    protect: float = 1e4
    norm: Literal["linear", "mean"] = "linear"
    selection: Literal["topk", "rank"] = "topk"


EXECUTORCH = GraphOptions()
# Twice the mask must be finite in fp16 (65504).
COREML = GraphOptions(mask=1e4, norm="mean")
