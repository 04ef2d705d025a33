"""A strategy as it is given on the command line: its name, and what differs from the common configuration."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from comp_edge import strategy
from comp_edge.errors import InputError
from comp_edge.settings import PruneConfig
from comp_edge.strategy import MPSConfig

# What other options say: how many steps there are in all, and the constants of MPS by their own names.
RESERVED = ("total_steps", "final_steps", "mps")
NONE = "none"


@dataclass(frozen=True)
class Method:
    """A strategy with its configuration.

    Attributes:
        label: as it was given, `STRATEGY[:NAME=VALUE,...]`.
        strategy: one of `comp_edge.strategy.STRATEGIES`.
    """

    label: str
    strategy: str
    config: PruneConfig


def parse_method(label: str, *, base: PruneConfig) -> Method:
    """The method behind a label.

    Args:
        base: what holds where the label says nothing.

    Raises:
        InputError: unknown strategy, unknown option, or a value of the wrong kind.
    """
    name, _, options = label.partition(":")
    if name not in strategy.STRATEGIES:
        raise InputError(f"unknown strategy {name!r}; give one of {', '.join(strategy.STRATEGIES)}.")
    return Method(label=label, strategy=name, config=with_options(base, options, where=label))


def named_options(label: str) -> list[str]:
    """The options that a label gives."""
    return [name for name, _ in _pairs(label.partition(":")[2])]


def with_options(config: PruneConfig, text: str, *, where: str) -> PruneConfig:
    """A configuration with `NAME=VALUE,...` changed; NAME is a field of it or of its `mps`.

    Values are read as the field's type says: yes or no, numbers, one of a choice, `none` where that is allowed, and
    several names joined by `+`.

    Args:
        where: names the text in errors.

    Raises:
        InputError: see `parse_method`.
    """
    kinds = option_kinds()
    found: dict[str, Any] = {}
    for name, value in _pairs(text):
        if name not in kinds:
            raise InputError(f"{where!r} has unknown option {name!r}; options are {', '.join(kinds)}.")
        if name in found:
            raise InputError(f"{where!r} gives {name!r} twice; give it once.")
        try:
            found[name] = _convert(value, kinds[name])
        except ValueError:
            *most, last = _wanted(kinds[name])
            wanted = f"{', '.join(most)} or {last}" if most else last
            raise InputError(f"{where!r} gives {name!r} as {value!r}; it takes {wanted}.") from None
    inner = {field.name for field in dataclasses.fields(MPSConfig)} & set(found)
    mps = dataclasses.replace(config.mps, **{name: found.pop(name) for name in inner})
    changed = dataclasses.replace(config, **found, mps=mps)
    # As many steps between the stages in all as before, where nobody has said how many each of them takes.
    shared = config.total_steps is not None and config == config.sharing(config.total_steps)
    return changed.sharing(config.total_steps) if shared and "stage_steps" not in found else changed


def option_kinds() -> dict[str, Any]:
    """The options that a label may give, with their types."""
    kinds = get_type_hints(PruneConfig) | get_type_hints(MPSConfig)
    return {name: kind for name, kind in kinds.items() if name not in RESERVED}


def flat(config: PruneConfig) -> dict[str, Any]:
    """A configuration as JSON, the fields of its `mps` beside its own; `total_steps` is called steps."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    steps = values.pop("total_steps")
    return {"steps": steps, **{k: v for k, v in values.items() if k not in RESERVED}, **values["mps"]}


def _pairs(text: str) -> list[tuple[str, str]]:
    parts = [part.partition("=") for part in text.split(",") if part]
    return [(name, value) for name, _, value in parts]


def _convert(text: str, kind: Any) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        inner = [k for k in get_args(kind) if k is not types.NoneType]
        return None if text == NONE and len(inner) < len(get_args(kind)) else _convert(text, inner[0])
    if origin is Literal:
        return _one_of({str(choice): choice for choice in get_args(kind)}, text)
    if origin is tuple:
        if not all(parts := text.split("+")):
            raise ValueError
        return tuple(parts)
    if kind is bool:
        return _one_of({"yes": True, "no": False}, text)
    if kind is int:
        return int(text)
    if kind is float and math.isfinite(value := float(text)):
        return value
    raise ValueError


def _one_of(choices: dict[str, Any], text: str) -> Any:
    if text not in choices:
        raise ValueError
    return choices[text]


def _wanted(kind: Any) -> list[str]:
    """What `_convert` takes, for people."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return [*(text for k in get_args(kind) if k is not types.NoneType for text in _wanted(k)), NONE]
    if origin is Literal:
        return list(map(str, get_args(kind)))
    if origin is tuple:
        return ["names joined by '+'"]
    return {bool: ["yes", "no"], int: ["an integer"], float: ["a number"]}[kind]
