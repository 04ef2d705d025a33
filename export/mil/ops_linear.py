"""Matrix products, attention, convolutions and pooling."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from export.mil.errors import ExecutionError
from export.mil.registry import Call, Handlers

HANDLERS = Handlers()
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@HANDLERS.op("linear")
def _linear(call: Call) -> Tensor:
    return F.linear(call.operand("x"), call.operand("weight"), call.operand("bias", None))


@HANDLERS.op("matmul")
def _matmul(call: Call) -> Tensor:
    x, y = call.operand("x"), call.operand("y")
    if call.scalar("transpose_x", False):
        x = x.transpose(-1, -2)
    if call.scalar("transpose_y", False):
        y = y.transpose(-1, -2)
    return x @ y


@HANDLERS.op("einsum")
def _einsum(call: Call) -> Tensor:
    values = [value.float() if value.dtype == torch.float16 else value for value in call.many("values")]
    return torch.einsum(call.text("equation"), *values)


@HANDLERS.op("scaled_dot_product_attention")
def _attention(call: Call) -> Tensor:
    query, key, value = call.operand("query"), call.operand("key"), call.operand("value")
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        raise ExecutionError("query, key and value have different batch sizes")
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    mask = call.operand("attn_mask", None)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)  # true takes part
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ value


# -- convolutions


@HANDLERS.op("conv")
def _conv(call: Call) -> Tensor:
    x, weight = call.operand("x"), call.operand("weight")
    spatial = x.dim() - 2
    strides = call.ints("strides", [1] * spatial)
    dilations = call.ints("dilations", [1] * spatial)
    windows = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    x = _pad(x, _padding(call, x.shape[2:], windows, strides), 0.0)
    groups = call.scalar("groups", 1)
    return _CONV[spatial](x, weight, call.operand("bias", None), strides, 0, dilations, groups)


# -- pooling


@HANDLERS.op("max_pool")
def _max_pool(call: Call) -> Tensor:
    x, kernel, strides, padding = _pool_arguments(call)
    x = _pad(x, padding, -math.inf)
    return _MAX_POOL[x.dim() - 2](x, kernel, strides, 0, 1, call.scalar("ceil_mode", False))


@HANDLERS.op("avg_pool")
def _avg_pool(call: Call) -> Tensor:
    x, kernel, strides, padding = _pool_arguments(call)
    pool = _AVG_POOL[x.dim() - 2]
    ceil_mode = call.scalar("ceil_mode", False)
    count_padding = not call.scalar("exclude_padding_from_average", False)
    if all(before == after for before, after in padding):
        symmetric = [before for before, _ in padding]
        return pool(x, kernel, strides, symmetric, ceil_mode, count_padding)
    if ceil_mode:
        raise ExecutionError("ceil_mode with asymmetric padding")
    averages = pool(_pad(x, padding, 0.0), kernel, strides)
    return averages if count_padding else averages / pool(_pad(torch.ones_like(x), padding, 0.0), kernel, strides)


def _pool_arguments(call: Call) -> tuple[Tensor, list[int], list[int], list[tuple[int, int]]]:
    x = call.operand("x")
    kernel = call.ints("kernel_sizes")
    strides = call.ints("strides", [1] * (x.dim() - 2))
    padding = _padding(call, x.shape[2:], kernel, strides)
    # A window that lies wholly in the padding has no value; torch refuses such paddings, so do we.
    if any(max(pair) > k // 2 for pair, k in zip(padding, kernel, strict=True)):
        raise ExecutionError(f"the padding {padding} is more than half of the window {kernel}")
    return x, kernel, strides, padding


def _padding(call: Call, sizes: Sequence[int], windows: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(before, after) per spatial dimension. "same": ceil(size / stride) outputs, an odd one goes after."""
    kind = call.text("pad_type", "valid").lower()
    if kind == "valid":
        return [(0, 0)] * len(sizes)
    if kind == "custom":
        pad = call.ints("pad", [0] * 2 * len(sizes))
        return list(zip(pad[::2], pad[1::2], strict=True))
    if kind not in ("same", "same_lower"):
        raise ExecutionError(f"unknown pad_type '{kind}'")
    padding = []
    for size, window, stride in zip(sizes, windows, strides, strict=True):
        total = max(0, (math.ceil(size / stride) - 1) * stride + window - size)
        small, large = total // 2, total - total // 2
        padding.append((small, large) if kind == "same" else (large, small))
    return padding


def _pad(x: Tensor, padding: Sequence[tuple[int, int]], value: float) -> Tensor:
    if not any(before or after for before, after in padding):
        return x
    return F.pad(x, [size for pair in reversed(padding) for size in pair], value=value)
