"""Constants that a graph need not compute: scales, norms' affine parts and activations' inner factors go into weights.

Folding happens in float64 and is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comp_edge.errors import InputError
from comp_edge.families.base import Projection

QUICK_GELU = 1.702


def folded_linear(
    linear: Projection,
    *,
    input_scale: Tensor | float | None = None,
    input_shift: Tensor | None = None,
    output_scale: Tensor | float = 1.0,
) -> nn.Linear:
    """A linear layer that computes `output_scale * linear(input_scale * x + input_shift)`.

    Where there is nothing to fold it shares the memory of `linear`: large models are held once. So never change it in place.

    Args:
        input_scale, input_shift: [in features], the affine part of the norm before it.
        output_scale: one number, or [out features], a LayerScale.
    """
    weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    if input_scale is not None or input_shift is not None or isinstance(output_scale, Tensor) or output_scale != 1.0:
        weight, bias = weight.double(), None if bias is None else bias.double()
        if input_shift is not None:
            shift = weight @ input_shift.detach().double()
            bias = shift if bias is None else bias + shift
        if input_scale is not None:
            weight = weight * (input_scale.detach().double() if isinstance(input_scale, Tensor) else input_scale)
        scale = output_scale.detach().double() if isinstance(output_scale, Tensor) else output_scale
        weight = weight * (scale[:, None] if isinstance(scale, Tensor) else scale)
        bias = None if bias is None else bias * scale
    with torch.device("meta"):
        result = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    result.weight = nn.Parameter(weight.float(), requires_grad=False)
    if bias is not None:
        result.bias = nn.Parameter(bias.float(), requires_grad=False)
    return result


@dataclass(frozen=True)
class ActivationForm:
    """`act(u) == function(inner * u) / inner`, with `inner` folded into the layers around."""

    function: Callable[[Tensor], Tensor]
    inner: float = 1.0

    @property
    def outer(self) -> float | None:
        """The input scale of the layer behind the activation; None for none."""
        return None if self.inner == 1.0 else 1.0 / self.inner


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, as `x * sigmoid(...)`.

    Backends run the exact GELU for `approximate="tanh"` (off by 5e-4) without saying so; hence the explicit form. The
    constants are tensors because multiplying by a Python scalar leaves XNNPACK.
    """
    linear, cubic = (x.new_tensor([c]) for c in (1.5957691216057308, 0.07135481282728575))
    return x * torch.sigmoid(x * (x * x * cubic + linear))


def activation_form(act: Any) -> ActivationForm:
    """The deployment form of a transformers activation module.

    Raises:
        InputError: an activation that has no form here.
    """
    name = type(act).__name__
    if name == "QuickGELUActivation":
        return ActivationForm(F.silu, inner=QUICK_GELU)
    if name in ("SiLUActivation", "SiLU"):
        return ActivationForm(F.silu)
    if name == "GELUActivation" or (name == "GELU" and act.approximate == "none"):
        return ActivationForm(F.gelu)
    if name in ("PytorchGELUTanh", "GELUTanh", "NewGELUActivation") or name == "GELU":
        return ActivationForm(gelu_tanh)
    if name == "ReLU":
        return ActivationForm(F.relu)
    raise InputError(
        f"activation {name!r} cannot be exported; supported: quick_gelu, silu, gelu, gelu_pytorch_tanh, relu."
    )
