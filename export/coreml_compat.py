"""Corrections to the torch front end of coremltools 9.0, which translates some operators into something else.

Found by converting operators one by one and running the saved packages. Without these corrections the
conversion succeeds, and the program that it writes computes something else:

* `gelu(approximate="tanh")` becomes the exact GELU (off by 5e-4): keyword arguments are not looked at;
* `add` and `sub` forget `alpha`, for the same reason;
* `rms_norm` adds its epsilon after dividing the input by its largest value, so that small inputs come out far
too
  small.

`tests/export/test_coreml_compat.py` proves both that each is wrong and that its correction is right, so that
a release of coremltools that fixes one shows up there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.frontend.torch import ops
from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY
from coremltools.converters.mil.mil import types

Translation = Callable[[Any, Any], None]


class UnsupportedOperatorError(ValueError):
    """A torch graph uses an operator in a way that Core ML conversion would get wrong."""


@contextmanager
def corrected_frontend() -> Iterator[None]:
    """Corrects the torch front end of coremltools while the context is open; use it around
    `coremltools.convert`.

    The corrections are global to the process while they last, as coremltools' registry is. They cover
    programs from `torch.export`, which is the only front end that is used here.

    Raises (from the conversion):
        UnsupportedOperatorError: `add` or `sub` with an `alpha` other than 1.
    """
    table = _TORCH_OPS_REGISTRY.name_to_func_mapping
    original = dict(table)
    table.update(
        {
            "gelu": _gelu,
            "rms_norm": _rms_norm,
            "add": _without_alpha(original["add"]),
            "sub": _without_alpha(original["sub"]),
        }
    )
    try:
        yield
    finally:
        table.clear()
        table.update(original)


def _gelu(context: Any, node: Any) -> None:
    x, *rest = ops._get_inputs(context, node, expected=[1, 2])
    approximate = rest[0].val if rest else _keyword(context, node, "approximate", "none")
    if approximate not in ("none", "tanh"):
        raise UnsupportedOperatorError(f"gelu(approximate={approximate!r}); expected 'none' or 'tanh'")
    mode = "TANH_APPROXIMATION" if approximate == "tanh" else "EXACT"
    context.add(mb.gelu(x=x, mode=mode, name=node.name))


def _rms_norm(context: Any, node: Any) -> None:
    """x / sqrt(mean(x²) + eps) * weight, written so that x² does not overflow in fp16.

    With m = max(1, max|x|) and y = x / m this is y / sqrt(mean(y²) + eps / m²): y² is at most 1, and eps / m²
    is at most eps.
    """
    x, shape, *rest = ops._get_inputs(context, node, expected=[2, 3, 4])
    weight = rest[0] if rest else None
    epsilon = rest[1].val if len(rest) > 1 and rest[1] is not None else None
    if epsilon is None:
        # What torch takes for an input of this type, which is fp32 before coremltools converts it.
        epsilon = np.finfo(types.nptype_from_builtin(x.dtype)).eps
    axes = list(range(-len(shape.val), 0))
    largest = mb.reduce_max(x=mb.abs(x=x), axes=axes, keep_dims=True)
    scale = mb.maximum(x=largest, y=_like(x, 1.0))
    y = mb.real_div(x=x, y=scale)
    mean = mb.reduce_mean(x=mb.square(x=y), axes=axes, keep_dims=True)
    inverse = mb.inverse(x=scale, epsilon=_like(x, 0.0))
    offset = mb.mul(x=mb.square(x=inverse), y=_like(x, epsilon))
    # The epsilon of rsqrt itself, 1e-12 by default, is below what is already added.
    normalized = mb.mul(x=y, y=mb.rsqrt(x=mb.add(x=mean, y=offset), epsilon=_like(x, 0.0)))
    if weight is not None:
        normalized = mb.mul(x=normalized, y=weight)
    context.add(mb.identity(x=normalized, name=node.name))


def _without_alpha(translate: Translation) -> Translation:
    def checked(context: Any, node: Any) -> None:
        alpha = _keyword(context, node, "alpha", 1)
        if alpha != 1:
            raise UnsupportedOperatorError(
                f"{node.kind}(alpha={alpha}) would lose its alpha in Core ML; multiply the second operand instead"
            )
        translate(context, node)

    return checked


def _keyword(context: Any, node: Any, name: str, default: Any) -> Any:
    """The value of a constant keyword argument."""
    bound = ops._get_kwinputs(context, node, name, default=[None])[0]
    value = getattr(bound, "val", bound)
    return default if value is None else value


def _like(x: Any, value: float) -> np.generic:
    """A scalar constant of the type of `x`."""
    return types.nptype_from_builtin(x.dtype)(value)
