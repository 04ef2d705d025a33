"""Handlers of MIL operations, and the view of one operation that a handler gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from export.mil.errors import ExecutionError

if TYPE_CHECKING:
    from export.mil.program import Instruction

Result = Tensor | Sequence[Tensor] | None
Handler = Callable[["Call"], Result]
_MISSING: Any = object()


class Handlers(dict[str, Handler]):
    """Handlers by op type. A name can be given once only."""

    def op(self, *names: str) -> Callable[[Handler], Handler]:
        """Decorator: the function handles these op types."""

        def add(handler: Handler) -> Handler:
            for name in names:
                if name in self:
                    raise ValueError(f"MIL op '{name}' has two handlers")
                self[name] = handler
            return handler

        return add


def merge(tables: Iterable[Handlers]) -> Handlers:
    """One table of all of them. Raises: ValueError when two of them handle the same op."""
    merged = Handlers()
    for table in tables:
        for name, handler in table.items():
            merged.op(name)(handler)
    return merged


class Call:
    """One evaluation of one operation: its arguments by name, with the types that a handler wants.

    Tensors are shared with whoever else uses them: a handler never changes one in place.
    """

    __slots__ = ("instruction", "_run_block", "_values", "rounds")

    def __init__(
        self,
        instruction: Instruction,
        values: dict[str, list],
        *,
        rounds: bool,
        run_block: Callable[[int, Sequence[Tensor]], list[Tensor]],
    ) -> None:
        self.instruction = instruction
        self.rounds = rounds
        """Whether results are rounded to the declared types (and defaults must be, too)."""
        self._values = values
        self._run_block = run_block

    @property
    def op(self) -> str:
        """The op type."""
        return self.instruction.op

    @property
    def ios(self) -> int:
        """The opset as the iOS version that brought it: 15, 16, 17, 18."""
        return self.instruction.ios

    @property
    def outputs(self) -> int:
        """How many results the program takes."""
        return len(self.instruction.outputs)

    def has(self, name: str) -> bool:
        """Whether the program gives this argument."""
        return name in self._values

    def stored(self, name: str, default: Any = _MISSING) -> Any:
        """An argument as it is stored: for ops that move values and do not compute."""
        values = self._values.get(name)
        if values is None:
            if default is _MISSING:
                raise ExecutionError(f"the argument '{name}' is missing")
            return default
        if len(values) != 1:
            raise ExecutionError(f"the argument '{name}' has {len(values)} values, expected 1")
        return values[0]

    def operand(self, name: str, default: Any = _MISSING) -> Any:
        """An argument to compute with: half precision is widened to fp32, everything else as stored."""
        value = self.stored(name, default)
        if isinstance(value, Tensor) and value.dtype == torch.float16:
            return self._memo(("wide", name), lambda: value.float(), name)
        return value

    def many(self, name: str) -> list[Tensor]:
        """An argument with any number of values, as stored."""
        if name not in self._values:
            raise ExecutionError(f"the argument '{name}' is missing")
        return self._values[name]

    def ints(self, name: str, default: Any = _MISSING) -> Any:
        """An argument as a list of Python ints (a scalar gives a list of one)."""
        value = self.stored(name, default)
        if not isinstance(value, Tensor):
            return value
        return self._memo(("ints", name), lambda: [int(v) for v in value.reshape(-1).tolist()], name)

    def flags(self, name: str, default: Any = _MISSING) -> Any:
        """An argument as a list of Python bools."""
        value = self.stored(name, default)
        if not isinstance(value, Tensor):
            return value
        return self._memo(("flags", name), lambda: [bool(v) for v in value.reshape(-1).tolist()], name)

    def scalar(self, name: str, default: Any = _MISSING) -> Any:
        """An argument as a Python number or bool."""
        value = self.stored(name, default)
        if not isinstance(value, Tensor):
            return value
        if value.numel() != 1:
            raise ExecutionError(f"the argument '{name}' has shape {list(value.shape)}, expected a scalar")
        return self._memo(("scalar", name), value.item, name)

    def epsilon(self, default: float, *, like: str = "x") -> float:
        """The argument `epsilon`. By definition a default has the type of `like`: 1e-12 is 0 in fp16."""
        if self.has("epsilon"):
            return self.scalar("epsilon")
        if self.rounds and self.stored(like).dtype == torch.float16:
            return torch.tensor(default, dtype=torch.float16).item()
        return default

    def text(self, name: str, default: Any = _MISSING) -> str:
        """An argument as a string."""
        value = self.stored(name, default)
        if not isinstance(value, str):
            raise ExecutionError(f"the argument '{name}' is not a string")
        return value

    def run_block(self, index: int, arguments: Sequence[Tensor] = ()) -> list[Tensor]:
        """Runs a nested block of the operation and returns its outputs."""
        return self._run_block(index, arguments)

    def _memo(self, key: tuple[str, str], compute: Callable[[], Any], name: str) -> Any:
        # Constant arguments are converted once per program, not once per run.
        if name not in self.instruction.constant_arguments:
            return compute()
        memo = self.instruction.memo
        if key not in memo:
            memo[key] = compute()
        return memo[key]
