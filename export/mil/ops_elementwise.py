"""Arithmetic, comparisons, logic, activations, casts: everything that works value by value."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from export.mil.dtypes import dtype_from_name, to_integer
from export.mil.errors import ExecutionError
from export.mil.registry import Call, Handlers

HANDLERS = Handlers()

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "acos": torch.acos,
    "asin": torch.asin,
    "atan": torch.atan,
    "atanh": torch.atanh,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "exp": torch.exp,
    "floor": torch.floor,
    "logical_not": torch.logical_not,
    "relu": torch.relu,
    "relu6": lambda x: x.clamp(0, 6),
    "round": torch.round,  # halves to the even neighbour, as numpy does
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "silu": F.silu,
    "sin": torch.sin,
    "sinh": torch.sinh,
    # Not F.softplus, which switches to the identity above 20.
    "softplus": lambda x: torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0),
    "softsign": F.softsign,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
}

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "equal": torch.eq,
    "floor_div": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.remainder,  # the sign of the divisor, as in Python
    "mul": torch.mul,
    "not_equal": torch.ne,
    "pow": torch.pow,
    "sub": torch.sub,
}


@HANDLERS.op(*_UNARY)
def _unary(call: Call) -> Tensor:
    return _UNARY[call.op](call.operand("x"))


@HANDLERS.op(*_BINARY)
def _binary(call: Call) -> Tensor:
    return _BINARY[call.op](call.operand("x"), call.operand("y"))


@HANDLERS.op("real_div")
def _real_div(call: Call) -> Tensor:
    x, y = call.operand("x"), call.operand("y")
    if x.is_floating_point():
        return x / y
    # The result is declared as an integer, and the specification does not say how it is rounded.
    if bool((y == 0).any()) or bool((torch.remainder(x, y) != 0).any()):
        raise ExecutionError("a division of integers leaves a remainder; how Core ML rounds it is not specified")
    return torch.div(x, y, rounding_mode="floor")


@HANDLERS.op("identity")
def _identity(call: Call) -> Tensor:
    return call.stored("x")


@HANDLERS.op("exp2")
def _exp2(call: Call) -> Tensor:
    x = call.operand("x")
    return torch.exp2(x) if x.is_floating_point() else torch.pow(torch.full_like(x, 2), x)


@HANDLERS.op("inverse")
def _inverse(call: Call) -> Tensor:
    return 1 / (call.operand("x") + call.epsilon(1e-4))


@HANDLERS.op("log")
def _log(call: Call) -> Tensor:
    return torch.log(call.operand("x") + call.epsilon(1e-45))


@HANDLERS.op("rsqrt")
def _rsqrt(call: Call) -> Tensor:
    return torch.rsqrt(call.operand("x") + call.epsilon(1e-12))


@HANDLERS.op("clip")
def _clip(call: Call) -> Tensor:
    return call.operand("x").clamp(call.scalar("alpha"), call.scalar("beta"))


@HANDLERS.op("threshold")
def _threshold(call: Call) -> Tensor:
    return call.operand("x").clamp(min=call.scalar("alpha"))


@HANDLERS.op("select")
def _select(call: Call) -> Tensor:
    return torch.where(call.stored("cond"), call.stored("a"), call.stored("b"))


@HANDLERS.op("cast")
def _cast(call: Call) -> Tensor:
    x, dtype = call.stored("x"), dtype_from_name(call.text("dtype"))
    if dtype.kind == "bool":
        return x != 0
    if dtype.kind == "int":
        return to_integer(x, dtype)
    # At precision "float32" every float is kept in fp32, so that a cast to fp16 changes nothing.
    return x.to(dtype.carrier) if call.rounds else x.to(torch.float32)


# -- activations with parameters


@HANDLERS.op("gelu")
def _gelu(call: Call) -> Tensor:
    x, mode = call.operand("x"), call.text("mode", "EXACT").upper()
    if mode == "EXACT":
        return F.gelu(x)
    if mode == "TANH_APPROXIMATION":
        return F.gelu(x, approximate="tanh")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    raise ExecutionError(f"unknown mode '{mode}'")


@HANDLERS.op("leaky_relu")
def _leaky_relu(call: Call) -> Tensor:
    return F.leaky_relu(call.operand("x"), call.scalar("alpha"))


@HANDLERS.op("elu")
def _elu(call: Call) -> Tensor:
    return F.elu(call.operand("x"), call.scalar("alpha"))


@HANDLERS.op("prelu")
def _prelu(call: Call) -> Tensor:
    x = call.operand("x")
    return x.clamp(min=0) + x.clamp(max=0) * _per_channel(call.operand("alpha"), x)


@HANDLERS.op("softplus_parametric")
def _softplus_parametric(call: Call) -> Tensor:
    x = call.operand("x")
    scaled = x * _per_channel(call.operand("beta"), x)
    return _per_channel(call.operand("alpha"), x) * _UNARY["softplus"](scaled)


@HANDLERS.op("clamped_relu")
def _clamped_relu(call: Call) -> Tensor:
    x, alpha, beta = call.operand("x"), call.scalar("alpha"), call.scalar("beta")
    return x.clamp(min=0).clamp(max=beta) + (x.clamp(max=0) * alpha).clamp(max=beta)


@HANDLERS.op("linear_activation")
def _linear_activation(call: Call) -> Tensor:
    return call.operand("x") * call.scalar("alpha") + call.scalar("beta")


@HANDLERS.op("scaled_tanh")
def _scaled_tanh(call: Call) -> Tensor:
    return call.scalar("alpha") * torch.tanh(call.operand("x") * call.scalar("beta"))


@HANDLERS.op("sigmoid_hard")
def _sigmoid_hard(call: Call) -> Tensor:
    return (call.operand("x") * call.scalar("alpha") + call.scalar("beta")).clamp(0, 1)


@HANDLERS.op("thresholded_relu")
def _thresholded_relu(call: Call) -> Tensor:
    x = call.operand("x")
    return torch.where(x >= call.scalar("alpha"), x, torch.zeros_like(x))


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """[C] -> [1, C, 1, ...], to broadcast over the second dimension of `x`."""
    if values.numel() != math.prod(x.shape[1:2]):
        raise ExecutionError(f"{values.numel()} values for {list(x.shape[1:2])} channels")
    return values.reshape([1, -1] + [1] * (x.dim() - 2))
