"""Gathers, scatters and sorting of saved programs against torch and numpy."""

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil.ops.defs._utils import compute_gather
from hypothesis import given, settings
from hypothesis import strategies as st
from mil_programs import assert_equal, build_package, run_cases

from export.mil import ExecutionError, Interpreter

_MODES = {
    "update": lambda old, new: new,
    "add": lambda old, new: old + new,
    "sub": lambda old, new: old - new,
    "mul": lambda old, new: old * new,
    "div": lambda old, new: old / new,
    "max": max,
    "min": min,
}


def _scattered(x: torch.Tensor, targets: list[tuple], updates: torch.Tensor, mode: str) -> torch.Tensor:
    """One value at a time, in plain Python."""
    result = x.numpy().copy()
    for target, value in zip(targets, updates.reshape(-1).tolist(), strict=True):
        result[target] = _MODES[mode](result[target], np.float32(value))
    return torch.from_numpy(result)


_ROWS = np.array([2, 0], np.int32)
_ALONG = np.array([[1, 0, 2, 2], [0, 2, 1, 0]], np.int32)  # no column twice in a row of targets
_ND = np.array([[2, 1], [0, 3], [1, 1]], np.int32)


def _scatter(mode: str):
    return (
        lambda m, two: mb.scatter(data=m, indices=_ROWS, updates=two, axis=0, mode=mode),
        lambda m, two: _scattered(m, [(row, col) for row in _ROWS for col in range(4)], two, mode),
    )


def _scatter_along(mode: str):
    return (
        lambda m, two: mb.scatter_along_axis(data=m, indices=_ALONG, updates=two, axis=0, mode=mode),
        lambda m, two: _scattered(m, [(_ALONG[r, c], c) for r in range(2) for c in range(4)], two, mode),
    )


def _scatter_nd(mode: str):
    return (
        lambda m, three: mb.scatter_nd(data=m, indices=_ND, updates=three, mode=mode),
        lambda m, three: _scattered(m, [tuple(at) for at in _ND], three, mode),
    )


CASES = (
    {
        "gather": ((lambda x, i: mb.gather(x=x, indices=i, axis=1)), (lambda x, i: x[:, i.long()])),
        "gather_rank_2": (
            (lambda x: mb.gather(x=x, indices=np.array([[0, 1], [2, 2]], np.int32), axis=-2)),
            (lambda x: x[:, [[0, 1], [2, 2]]]),
        ),
        "gather_scalar": ((lambda x: mb.gather(x=x, indices=np.int32(1), axis=2)), (lambda x: x[:, :, 1])),
        "gather_batch": (
            (lambda x, j: mb.gather(x=x, indices=j, axis=2, batch_dims=1)),
            (lambda x, j: torch.from_numpy(compute_gather(x.numpy(), j.numpy(), 2, 1))),
        ),
        "gather_batch_same_axis": (
            (lambda x, j: mb.gather(x=x, indices=j, axis=1, batch_dims=1)),
            (lambda x, j: torch.stack([x[b][j[b].long()] for b in range(2)])),
        ),
        "gather_along_axis": (
            (lambda m: mb.gather_along_axis(x=m, indices=_ALONG, axis=0)),
            (lambda m: m.gather(0, torch.from_numpy(_ALONG).long())),
        ),
        "gather_nd": ((lambda m: mb.gather_nd(x=m, indices=_ND)), (lambda m: m[[2, 0, 1], [1, 3, 1]])),
        "gather_nd_slices": (
            (lambda x: mb.gather_nd(x=x, indices=np.array([[[1, 2]], [[0, 0]]], np.int32))),
            (lambda x: torch.stack([x[1, 2][None], x[0, 0][None]])),
        ),
        "gather_nd_batch": (
            (lambda x: mb.gather_nd(x=x, indices=np.array([[[2, 3]], [[0, 1]]], np.int32), batch_dims=1)),
            (lambda x: torch.stack([x[0, 2, 3][None], x[1, 0, 1][None]])),
        ),
        "scatter_add_twice": (
            (lambda m, two: mb.scatter(data=m, indices=np.array([1, 1], np.int32), updates=two, mode="add")),
            (lambda m, two: m + torch.stack([torch.zeros(4), two.sum(0), torch.zeros(4)])),
        ),
        "scatter_nd_rows": (
            (lambda m, two: mb.scatter_nd(data=m, indices=_ROWS[:, None], updates=two, mode="update")),
            (lambda m, two: torch.stack([two[1], m[1], two[0]])),
        ),
        "topk": ((lambda x: mb.topk(x=x, k=2, axis=1)), (lambda x: tuple(x.topk(2, dim=1)))),
        "topk_ascending": (
            (lambda x: mb.topk(x=x, k=3, ascending=True, output_indices_dtype="uint16")),
            (lambda x: tuple(x.topk(3, largest=False))),
        ),
        "topk_values": (
            (lambda x: mb.topk(x=x, k=1, return_indices=False)),
            (lambda x: x.amax(-1, keepdim=True)),
        ),
        "topk_ties": (
            (lambda t: mb.topk(x=t, k=4)),
            (lambda t: (torch.tensor([3.0, 3, 3, 2]), torch.tensor([1, 3, 4, 2]))),
        ),
        "topk_int": ((lambda i: mb.topk(x=i, k=1)), (lambda i: (torch.tensor([2]), torch.tensor([1])))),
        "argsort": ((lambda x: mb.argsort(x=x, axis=1)), (lambda x: x.argsort(1, descending=True))),
        "argsort_ascending": ((lambda x: mb.argsort(x=x, ascending=True)), (lambda x: x.argsort())),
        "non_zero": ((lambda t: mb.non_zero(x=t)), (lambda t: t.nonzero())),
        "one_hot": (
            (lambda i: mb.one_hot(indices=i, one_hot_vector_size=4, axis=0, on_value=2.0, off_value=-1.0)),
            (lambda i: torch.nn.functional.one_hot(i.long(), 4).T * 3.0 - 1),
        ),
    }
    | {f"scatter_{mode}": _scatter(mode) for mode in _MODES}
    | {f"scatter_along_axis_{mode}": _scatter_along(mode) for mode in _MODES}
    | {f"scatter_nd_{mode}": _scatter_nd(mode) for mode in _MODES}
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    torch.manual_seed(0)
    inputs = {
        "x": torch.randn(2, 3, 4),
        "m": torch.randn(3, 4),
        "two": torch.randn(2, 4),
        "three": torch.randn(3),
        "t": torch.tensor([0.0, 3, 2, 3, 3]),
        "i": torch.tensor([0, 2, 1], dtype=torch.int32),
        "j": torch.tensor([[0, 2], [1, 1]], dtype=torch.int32),
    }
    return run_cases(CASES, inputs, tmp_path_factory.mktemp("index"))


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(results, name):
    assert_equal(results[name])


@pytest.fixture(scope="module")
def gathering(tmp_path_factory):
    """A program per opset that gathers rows by an index that is an input."""
    values = {"x": torch.arange(20.0).reshape(5, 4), "i": torch.zeros(3, dtype=torch.int32)}

    # In iOS 17 coremltools guards a gather against negative indices; gather_along_axis is left as it is.
    def build(x, i):
        rows = mb.tile(x=mb.expand_dims(x=i, axes=[1]), reps=[1, 4])
        return [mb.gather_along_axis(x=x, indices=rows, axis=0, name="rows")]

    return {
        target: Interpreter(build_package(tmp_path_factory.mktemp("gather"), values, build, target=target))
        for target in (ct.target.iOS15, ct.target.iOS18)
    }


@settings(max_examples=60, deadline=None)
@given(indices=st.lists(st.integers(-8, 8), min_size=3, max_size=3))
def test_indices_out_of_bounds_are_refused(gathering, indices):
    x = torch.arange(20.0).reshape(5, 4)
    for target, interpreter in gathering.items():
        lowest = -5 if target == ct.target.iOS15 else 0
        values = {"x": x, "i": torch.tensor(indices, dtype=torch.int32)}
        if all(lowest <= index < 5 for index in indices):
            assert torch.equal(interpreter.run(values)["rows"], x[indices])
        else:
            with pytest.raises(ExecutionError, match="out of bounds for 5 values"):
                interpreter.run(values)


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_gathers_equal_the_definition(tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    x = torch.arange(float(np.prod(shape))).reshape(shape)
    cases = []
    for _ in range(8):
        axis = data.draw(st.integers(0, len(shape) - 1))
        batch_dims = data.draw(st.integers(0, min(axis, 1)))
        own = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=5 - len(shape))))
        size = shape[:batch_dims] + own
        indices = data.draw(
            st.lists(st.integers(0, shape[axis] - 1), min_size=int(np.prod(size)), max_size=int(np.prod(size)))
        )
        cases.append((np.array(indices, np.int32).reshape(size), axis, batch_dims))

    def build(x):
        return [
            mb.gather(x=x, indices=indices, axis=axis, batch_dims=batch_dims, name=f"gather_{n}")
            for n, (indices, axis, batch_dims) in enumerate(cases)
        ]

    given_values = Interpreter(build_package(tmp_path_factory.mktemp("gathers"), {"x": x}, build)).run({"x": x})
    for (indices, axis, batch_dims), value in zip(cases, given_values.values(), strict=True):
        assert np.array_equal(value.numpy(), compute_gather(x.numpy(), indices, axis, batch_dims))


def test_updating_one_value_twice_is_refused(tmp_path):
    values = {"m": torch.zeros(3, 2), "i": torch.tensor([0, 2], dtype=torch.int32)}
    updates = np.ones((2, 2), np.float32)
    interpreter = Interpreter(
        build_package(
            tmp_path,
            values,
            lambda m, i: [mb.scatter(data=m, indices=i, updates=updates, mode="update", name="out")],
        )
    )
    assert interpreter.run(values)["out"][:, 0].tolist() == [1, 0, 1]
    with pytest.raises(ExecutionError, match="updated twice"):
        interpreter.run({**values, "i": torch.tensor([2, 2], dtype=torch.int32)})
