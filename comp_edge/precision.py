"""Half-precision weights on processors that multiply only in fp32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

HALVES = (torch.bfloat16, torch.float16)
LARGEST = 1 << 22  # elements of a weight that are converted at once: 16 MiB in fp32
CPU_INFO = Path("/proc/cpuinfo")
FLAGS = {"avx512_bf16", "amx_bf16", "bf16", "fphp"}  # x86's, then Arm's
PRODUCTS = (
    F.linear,
    F.conv2d,
    F.conv3d,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    F.scaled_dot_product_attention,
)


class Fp32Products(TorchFunctionMode):
    """Computes matrix products of half-precision tensors in fp32, one at a time, and rounds their results.

    A weight is converted when it is used and forgotten at once, so memory grows by the largest one only. Not for training:
    autograd would keep every converted weight.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and not kwargs and args[0].dtype in HALVES and args[1].numel() > LARGEST:
            return _linear_in_parts(*args)
        if func not in PRODUCTS or not isinstance(args[0], Tensor) or args[0].dtype not in HALVES:
            return func(*args, **kwargs)
        result = func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})
        return result.to(args[0].dtype)


def _linear_in_parts(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer with some output rows at a time: an output head's weight is too large to convert at once."""
    count = -(-weight.numel() // LARGEST)
    biases = [None] * count if bias is None else bias.tensor_split(count)
    parts = zip(weight.tensor_split(count), biases, strict=True)
    return torch.cat([F.linear(x.float(), w.float(), _wide(b)).to(x.dtype) for w, b in parts], -1)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALVES else value


def fast_products(model: Any) -> AbstractContextManager:
    """`Fp32Products` where the model's weights are halves and its processor has no instructions for their products.

    There, bf16 products take six times as long as fp32's and the conversion together.
    """
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype not in HALVES or _multiplies_halves():
        return nullcontext()
    return Fp32Products()


def _multiplies_halves() -> bool:
    """Whether the processor has instructions for half-precision products, as far as the kernel says."""
    try:
        words = set(CPU_INFO.read_text().split())
    except OSError:
        return True
    return bool(words & FLAGS)
