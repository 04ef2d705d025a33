"""LayerNorm and RMSNorm without their affine part, which is folded into the linear layer that follows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comp_edge.errors import InputError
from export.graph.options import GraphOptions


@dataclass(frozen=True)
class NormParts:
    """What a norm module is made of: `normalized(x) * weight + bias`."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    centered: bool

    @classmethod
    def of(cls, module: nn.Module) -> NormParts:
        """Take a LayerNorm or an RMSNorm apart.

        Raises:
            InputError: another kind of norm.
        """
        if isinstance(module, nn.LayerNorm):
            weight = module.weight if module.weight is not None else torch.ones(module.normalized_shape)
            return cls(weight=weight, bias=module.bias, eps=module.eps, centered=True)
        if hasattr(module, "variance_epsilon"):
            return cls(weight=module.weight, bias=None, eps=module.variance_epsilon, centered=False)
        raise InputError(f"norm {type(module).__name__!r} cannot be exported; supported: LayerNorm, RMSNorm.")


class Normalize(nn.Module):
    """[..., d] -> [..., d]: centre (LayerNorm only), then divide by the root mean square."""

    def __init__(self, parts: NormParts, options: GraphOptions) -> None:
        super().__init__()
        width = parts.weight.shape[0]
        self.centered = parts.centered
        self.form = options.norm
        self.register_buffer("eps", torch.tensor([parts.eps]), persistent=False)
        if self.form == "linear":
            self.register_buffer("average", torch.full((1, width), 1.0 / width), persistent=False)

    def mean(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., 1]"""
        return F.linear(x, self.average) if self.form == "linear" else x.mean(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.centered:
            x = x - self.mean(x)
        return x * torch.rsqrt(self.mean(x * x) + self.eps)


class AffineNorm(nn.Module):
    """A whole norm, where no linear layer follows that could take the affine part.

    Args:
        scale: what its output is multiplied by.
    """

    def __init__(self, module: nn.Module, options: GraphOptions, *, scale: float = 1.0) -> None:
        super().__init__()
        parts = NormParts.of(module)
        self.width = parts.weight.shape[0]
        self.normalize = Normalize(parts, options)
        self.register_buffer("weight", (parts.weight.detach() * scale).float().clone(), persistent=False)
        bias = None if parts.bias is None else (parts.bias.detach() * scale).float().clone()
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x) * self.weight
        return x if self.bias is None else x + self.bias
