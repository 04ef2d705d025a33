"""Reductions, normalisations, softmax and cumulative sums."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from export.mil.errors import ExecutionError
from export.mil.registry import Call, Handlers

HANDLERS = Handlers()


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keepdim=keep)
    mean = x.double().mean(axes, keepdim=keep)
    if bool((mean != mean.trunc()).any()):
        raise ExecutionError("a mean of integers is not whole; how Core ML rounds it is not specified")
    return mean.long()


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "reduce_l1_norm": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "reduce_l2_norm": lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt(),
    "reduce_log_sum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
    "reduce_log_sum_exp": lambda x, axes, keep: x.logsumexp(axes, keepdim=keep),
    "reduce_max": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "reduce_mean": _mean,
    "reduce_min": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "reduce_prod": _product,
    "reduce_sum": lambda x, axes, keep: x.sum(axes, keepdim=keep),
    "reduce_sum_square": lambda x, axes, keep: x.square().sum(axes, keepdim=keep),
}


@HANDLERS.op(*_REDUCTIONS)
def _reduce(call: Call) -> Tensor:
    x = call.operand("x")
    axes = call.ints("axes", None)
    return _REDUCTIONS[call.op](x, list(range(x.dim())) if axes is None else axes, call.scalar("keep_dims", False))


@HANDLERS.op("reduce_argmax", "reduce_argmin")
def _reduce_arg(call: Call) -> Tensor:
    # Which of several equal values wins is not specified; torch takes the first.
    x = call.operand("x")
    find = x.argmax if call.op == "reduce_argmax" else x.argmin
    return find(call.scalar("axis", -1), keepdim=call.scalar("keep_dims", False))


@HANDLERS.op("softmax")
def _softmax(call: Call) -> Tensor:
    return call.operand("x").softmax(call.scalar("axis", -1))


@HANDLERS.op("cumsum")
def _cumsum(call: Call) -> Tensor:
    x, axis = call.operand("x"), call.scalar("axis", 0)
    if call.scalar("reverse", False):
        x = x.flip(axis)
    if call.scalar("exclusive", False):
        first = torch.zeros_like(x.narrow(axis, 0, 1))
        x = torch.cat([first, x.narrow(axis, 0, x.shape[axis] - 1)], axis)
    y = x.cumsum(axis)
    return y.flip(axis) if call.scalar("reverse", False) else y


# -- normalisations


@HANDLERS.op("layer_norm")
def _layer_norm(call: Call) -> Tensor:
    x = call.operand("x")
    axes = sorted(axis % x.dim() for axis in call.ints("axes", list(range(x.dim()))))
    gamma, beta = call.operand("gamma", None), call.operand("beta", None)
    epsilon = call.epsilon(1e-5)
    if axes == list(range(x.dim() - len(axes), x.dim())):
        return F.layer_norm(x, x.shape[axes[0] :], gamma, beta, epsilon)
    centred = x - x.mean(axes, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + epsilon)
    return _affine(y, gamma, beta, [x.shape[d] if d in axes else 1 for d in range(x.dim())])


@HANDLERS.op("batch_norm")
def _batch_norm(call: Call) -> Tensor:
    x, mean, variance = call.operand("x"), call.operand("mean"), call.operand("variance")
    shape = [1, -1] + [1] * (x.dim() - 2)
    y = (x - mean.reshape(shape)) * torch.rsqrt(variance.reshape(shape) + call.epsilon(1e-5))
    return _affine(y, call.operand("gamma", None), call.operand("beta", None), shape)


@HANDLERS.op("instance_norm")
def _instance_norm(call: Call) -> Tensor:
    x = call.operand("x")
    axes = list(range(2, x.dim()))
    centred = x - x.mean(axes, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + call.epsilon(1e-5))
    return _affine(y, call.operand("gamma", None), call.operand("beta", None), [1, -1] + [1] * len(axes))


@HANDLERS.op("l2_norm")
def _l2_norm(call: Call) -> Tensor:
    x = call.operand("x")
    return x / torch.sqrt(x.square().sum((-3, -2, -1), keepdim=True) + call.epsilon(1e-6))


def _affine(y: Tensor, gamma: Tensor | None, beta: Tensor | None, shape: list[int]) -> Tensor:
    if gamma is not None:
        y = y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)
