"""Element-wise ops of saved programs against torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coremltools.converters.mil import Builder as mb
from mil_programs import assert_equal, build_package, run_cases

from export.mil import ExecutionError, Interpreter


def _unary(op: str, function):
    return (lambda x: getattr(mb, op)(x=x)), (lambda x: function(x))


def _positive(op: str, function):
    return (lambda p: getattr(mb, op)(x=p)), (lambda p: function(p))


def _unit(op: str, function):
    return (lambda u: getattr(mb, op)(x=u)), (lambda u: function(u))


def _binary(op: str, function):
    return (lambda x, y: getattr(mb, op)(x=x, y=y)), (lambda x, y: function(x, y))


def _integers(op: str, function):
    return (lambda i, j: getattr(mb, op)(x=i, y=j)), (lambda i, j: function(i, j))


def _logical(op: str, function):
    return (lambda b, c: getattr(mb, op)(x=b, y=c)), (lambda b, c: function(b, c))


_CHANNEL = np.array([0.5, 1.0, 2.0], np.float32)

CASES = {
    "abs": _unary("abs", torch.abs),
    "acos": _unit("acos", torch.acos),
    "asin": _unit("asin", torch.asin),
    "atan": _unary("atan", torch.atan),
    "atanh": _unit("atanh", torch.atanh),
    "ceil": _unary("ceil", torch.ceil),
    "cos": _unary("cos", torch.cos),
    "cosh": _unary("cosh", torch.cosh),
    "erf": _unary("erf", torch.erf),
    "exp": _unary("exp", torch.exp),
    "exp2": _unary("exp2", torch.exp2),
    "exp2_int": ((lambda j: mb.exp2(x=j)), (lambda j: 2**j)),
    "floor": _unary("floor", torch.floor),
    "log": _positive("log", torch.log),
    "relu": _unary("relu", torch.relu),
    "relu6": ((lambda x: mb.relu6(x=x)), F.relu6),
    "round": ((lambda h: mb.round(x=h)), (lambda h: torch.tensor([-2.0, -2.0, 0.0, 0.0, 2.0, 2.0]))),
    "rsqrt": _positive("rsqrt", torch.rsqrt),
    "rsqrt_epsilon": (
        (lambda p: mb.rsqrt(x=p, epsilon=np.float32(0.5))),
        (lambda p: torch.rsqrt(p + 0.5)),
    ),
    "inverse": ((lambda p: mb.inverse(x=p)), (lambda p: 1 / (p + 1e-4))),
    "sigmoid": _unary("sigmoid", torch.sigmoid),
    "sign": _unary("sign", torch.sign),
    "silu": ((lambda x: mb.silu(x=x)), F.silu),
    "sin": _unary("sin", torch.sin),
    "sinh": _unary("sinh", torch.sinh),
    "softplus": ((lambda x: mb.softplus(x=x)), F.softplus),
    "softsign": ((lambda x: mb.softsign(x=x)), F.softsign),
    "sqrt": _positive("sqrt", torch.sqrt),
    "square": _unary("square", torch.square),
    "tan": _unary("tan", torch.tan),
    "tanh": _unary("tanh", torch.tanh),
    "clip": (
        (lambda x: mb.clip(x=x, alpha=np.float32(-0.5), beta=np.float32(1))),
        (lambda x: x.clamp(-0.5, 1)),
    ),
    "threshold": ((lambda x: mb.threshold(x=x, alpha=np.float32(0.2))), (lambda x: x.clamp(min=0.2))),
    "add": _binary("add", torch.add),
    "sub": _binary("sub", torch.sub),
    "mul": _binary("mul", torch.mul),
    "real_div": _binary("real_div", torch.div),
    "floor_div": _binary("floor_div", lambda x, y: torch.floor(x / y)),
    "mod": _binary("mod", torch.remainder),
    "maximum": _binary("maximum", torch.maximum),
    "minimum": _binary("minimum", torch.minimum),
    "pow": ((lambda p, x: mb.pow(x=p, y=x)), (lambda p, x: p**x)),
    "greater": _binary("greater", torch.gt),
    "greater_equal": _binary("greater_equal", torch.ge),
    "less": _binary("less", torch.lt),
    "less_equal": _binary("less_equal", torch.le),
    "equal": _integers("equal", torch.eq),
    "not_equal": _integers("not_equal", torch.ne),
    "int_add": _integers("add", torch.add),
    "int_mul": _integers("mul", torch.mul),
    "int_floor_div": _integers("floor_div", lambda i, j: torch.div(i, j, rounding_mode="floor")),
    "int_mod": _integers("mod", torch.remainder),
    "logical_and": _logical("logical_and", torch.logical_and),
    "logical_or": _logical("logical_or", torch.logical_or),
    "logical_xor": _logical("logical_xor", torch.logical_xor),
    "logical_not": ((lambda b: mb.logical_not(x=b)), (lambda b: ~b)),
    "select": ((lambda b, x, y: mb.select(cond=b, a=x, b=y)), (lambda b, x, y: torch.where(b, x, y))),
    "cast_int": ((lambda x: mb.cast(x=x, dtype="int32")), (lambda x: x.trunc().int())),
    "cast_bool": ((lambda i: mb.cast(x=i, dtype="bool")), (lambda i: i != 0)),
    "cast_float": ((lambda b: mb.cast(x=b, dtype="fp32")), (lambda b: b.float())),
    "gelu": ((lambda x: mb.gelu(x=x)), F.gelu),
    "gelu_tanh": (
        (lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION")),
        (lambda x: F.gelu(x, approximate="tanh")),
    ),
    "gelu_sigmoid": (
        (lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION")),
        (lambda x: x * torch.sigmoid(1.702 * x)),
    ),
    "leaky_relu": ((lambda x: mb.leaky_relu(x=x, alpha=np.float32(0.1))), (lambda x: F.leaky_relu(x, 0.1))),
    "elu": ((lambda x: mb.elu(x=x, alpha=np.float32(0.7))), (lambda x: F.elu(x, 0.7))),
    "prelu": ((lambda r: mb.prelu(x=r, alpha=_CHANNEL)), (lambda r: F.prelu(r, torch.from_numpy(_CHANNEL)))),
    "softplus_parametric": (
        (lambda x: mb.softplus_parametric(x=x, alpha=_CHANNEL, beta=_CHANNEL)),
        (lambda x: torch.from_numpy(_CHANNEL)[:, None] * F.softplus(x * torch.from_numpy(_CHANNEL)[:, None])),
    ),
    "clamped_relu": (
        (lambda x: mb.clamped_relu(x=x, alpha=np.float32(0.3), beta=np.float32(0.8))),
        (lambda x: torch.where(x > 0, x.clamp(max=0.8), x * 0.3)),
    ),
    "linear_activation": (
        (lambda x: mb.linear_activation(x=x, alpha=np.float32(2), beta=np.float32(1))),
        (lambda x: 2 * x + 1),
    ),
    "scaled_tanh": (
        (lambda x: mb.scaled_tanh(x=x, alpha=np.float32(2), beta=np.float32(3))),
        (lambda x: 2 * torch.tanh(3 * x)),
    ),
    "sigmoid_hard": (
        (lambda x: mb.sigmoid_hard(x=x, alpha=np.float32(0.2), beta=np.float32(0.5))),
        (lambda x: (0.2 * x + 0.5).clamp(0, 1)),
    ),
    "thresholded_relu": (
        (lambda x: mb.thresholded_relu(x=x, alpha=np.float32(0.5))),
        (lambda x: torch.where(x >= 0.5, x, 0.0)),
    ),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 4), torch.randn(1, 3, 1)
    inputs = {
        "x": x,
        "y": y,
        "r": torch.randn(2, 3, 2, 2),
        "p": torch.rand(2, 3, 4) + 0.1,
        "u": torch.rand(2, 3, 4) * 1.8 - 0.9,
        "h": torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]),
        "i": torch.randint(-7, 8, (2, 5), dtype=torch.int32),
        "j": torch.randint(1, 5, (2, 5), dtype=torch.int32),
        "b": torch.rand(2, 3, 4) > 0.5,
        "c": torch.rand(2, 3, 4) > 0.5,
    }
    return run_cases(CASES, inputs, tmp_path_factory.mktemp("elementwise"))


@pytest.mark.parametrize("name", CASES)
def test_equals_torch(results, name):
    assert_equal(results[name], tolerance=2e-6)


def test_integer_division_with_a_remainder_is_refused(tmp_path):
    values = {"i": torch.tensor([6, 8], dtype=torch.int32), "j": torch.tensor([3, 4], dtype=torch.int32)}
    package = build_package(tmp_path, values, lambda i, j: [mb.real_div(x=i, y=j, name="quotient")])
    interpreter = Interpreter(package)
    assert interpreter.run(values)["quotient"].tolist() == [2, 2]
    with pytest.raises(ExecutionError, match="'real_div' .*'quotient'.*remainder"):
        interpreter.run({**values, "j": torch.tensor([4, 4], dtype=torch.int32)})


@pytest.mark.parametrize("value", [70000.0, float("nan"), float("-inf"), -1.0])
def test_a_cast_out_of_range_is_refused(tmp_path, value):
    values = {"x": torch.tensor([1.0, 65535.0])}
    interpreter = Interpreter(build_package(tmp_path, values, lambda x: [mb.cast(x=x, dtype="uint16", name="small")]))
    assert interpreter.run(values)["small"].tolist() == [1, 65535]
    with pytest.raises(ExecutionError, match="uint16"):
        interpreter.run({"x": torch.tensor([1.0, value])})
