"""Reductions and normalisations of saved programs against torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coremltools.converters.mil import Builder as mb
from mil_programs import assert_equal, build_package, run_cases

from export.mil import ExecutionError, Interpreter

_G3, _B3 = np.array([0.5, 1.0, 2.0], np.float32), np.array([1.0, 0.0, -1.0], np.float32)
_G4 = np.array([0.5, 1.0, 2.0, 3.0], np.float32)
_VARIANCE = np.array([0.1, 1.0, 4.0], np.float32)
_AXES = {"all": None, "one": [1], "last": [-1], "two": [0, 2]}


def _reference(op: str, x: torch.Tensor, axes: list[int] | None, keep: bool) -> torch.Tensor:
    axes = list(range(x.dim())) if axes is None else axes
    match op:
        case "reduce_l1_norm":
            return torch.linalg.vector_norm(x, 1, axes, keep)
        case "reduce_l2_norm":
            return torch.linalg.vector_norm(x, 2, axes, keep)
        case "reduce_log_sum":
            return x.sum(axes, keep).log()
        case "reduce_log_sum_exp":
            return x.exp().sum(axes, keep).log()
        case "reduce_max":
            return x.amax(axes, keep)
        case "reduce_min":
            return x.amin(axes, keep)
        case "reduce_mean":
            return x.sum(axes, keep) * x.sum(axes).numel() / x.numel()
        case "reduce_prod":
            return x.log().sum(axes, keep).exp()
        case "reduce_sum":
            return x.sum(axes, keep)
        case "reduce_sum_square":
            return (x * x).sum(axes, keep)
    raise ValueError(op)


def _reduction(op: str, axes: list[int] | None, keep: bool):
    return (
        lambda p: getattr(mb, op)(x=p, axes=axes, keep_dims=keep),
        lambda p: _reference(op, p, axes, keep),
    )


REDUCTIONS = (
    "reduce_l1_norm",
    "reduce_l2_norm",
    "reduce_log_sum",
    "reduce_log_sum_exp",
    "reduce_max",
    "reduce_mean",
    "reduce_min",
    "reduce_prod",
    "reduce_sum",
    "reduce_sum_square",
)
CASES = {
    f"{op}_{axes}_{'keep' if keep else 'drop'}": _reduction(op, _AXES[axes], keep)
    for op in REDUCTIONS
    for axes in _AXES
    for keep in (False, True)
} | {
    "int_sum": (
        (lambda i: mb.reduce_sum(x=i, axes=[1], keep_dims=False)),
        (lambda i: i.sum(1)),
    ),
    "argmax": ((lambda x: mb.reduce_argmax(x=x, axis=1)), (lambda x: x.argmax(1))),
    "argmax_keep": (
        (lambda x: mb.reduce_argmax(x=x, axis=-1, keep_dims=True, output_dtype="uint16")),
        (lambda x: x.argmax(-1, keepdim=True)),
    ),
    "argmin": ((lambda x: mb.reduce_argmin(x=x)), (lambda x: x.argmin(-1))),
    "argmax_tie": ((lambda i: mb.reduce_argmax(x=i)), (lambda i: torch.tensor([1, 0]))),
    "softmax": ((lambda x: mb.softmax(x=x)), (lambda x: x.softmax(-1))),
    "softmax_axis": ((lambda x: mb.softmax(x=x, axis=1)), (lambda x: x.softmax(1))),
    "cumsum": ((lambda x: mb.cumsum(x=x, axis=1)), (lambda x: x.cumsum(1))),
    "cumsum_exclusive": (
        (lambda x: mb.cumsum(x=x, axis=2, exclusive=True)),
        (lambda x: torch.cat([torch.zeros(2, 3, 1), x.cumsum(2)[..., :-1]], 2)),
    ),
    "cumsum_reverse": (
        (lambda x: mb.cumsum(x=x, axis=2, reverse=True)),
        (lambda x: x.sum(2, keepdim=True) - x.cumsum(2) + x),
    ),
    "cumsum_reverse_exclusive": (
        (lambda x: mb.cumsum(x=x, axis=2, reverse=True, exclusive=True)),
        (lambda x: x.sum(2, keepdim=True) - x.cumsum(2)),
    ),
    "layer_norm": (
        (lambda x: mb.layer_norm(x=x, axes=[-1], gamma=_G4, beta=_G4 + 1, epsilon=np.float32(1e-3))),
        (lambda x: F.layer_norm(x, (4,), torch.from_numpy(_G4), torch.from_numpy(_G4) + 1, 1e-3)),
    ),
    "layer_norm_middle": (
        (lambda x: mb.layer_norm(x=x, axes=[1], gamma=_G3, beta=_B3)),
        (lambda x: F.layer_norm(x.mT, (3,), torch.from_numpy(_G3), torch.from_numpy(_B3)).mT),
    ),
    "layer_norm_two": ((lambda x: mb.layer_norm(x=x, axes=[1, 2])), (lambda x: F.layer_norm(x, (3, 4)))),
    "batch_norm": (
        (lambda x: mb.batch_norm(x=x, mean=_B3, variance=_VARIANCE, gamma=_G3, beta=_B3)),
        (lambda x: F.batch_norm(x, *(torch.from_numpy(array) for array in (_B3, _VARIANCE, _G3, _B3)), training=False)),
    ),
    "instance_norm": (
        (lambda x: mb.instance_norm(x=x, gamma=_G3, beta=_B3)),
        (lambda x: F.instance_norm(x, weight=torch.from_numpy(_G3), bias=torch.from_numpy(_B3))),
    ),
    "l2_norm": (
        (lambda r: mb.l2_norm(x=r)),
        (lambda r: F.normalize(r.flatten(1), dim=1).reshape(r.shape)),
    ),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    torch.manual_seed(0)
    inputs = {
        "x": torch.randn(2, 3, 4),
        "p": torch.rand(2, 3, 4) + 0.5,
        "r": torch.randn(2, 3, 2, 2),
        "i": torch.tensor([[1, 5, 5, 2], [7, 7, 0, -3]], dtype=torch.int32),
    }
    return run_cases(CASES, inputs, tmp_path_factory.mktemp("reduction"))


@pytest.mark.parametrize("name", CASES)
def test_equals_torch(results, name):
    assert_equal(results[name], tolerance=1e-5)


def test_a_mean_of_integers_must_be_whole(tmp_path):
    values = {"i": torch.tensor([1, 2, 3], dtype=torch.int32)}
    interpreter = Interpreter(
        build_package(tmp_path, values, lambda i: [mb.reduce_mean(x=i, keep_dims=True, name="mean")])
    )
    assert interpreter.run(values)["mean"].item() == 2
    with pytest.raises(ExecutionError, match="mean of integers"):
        interpreter.run({"i": torch.tensor([1, 2, 5], dtype=torch.int32)})
