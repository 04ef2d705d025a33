"""States and control flow."""

from dataclasses import dataclass

from torch import Tensor

from export.mil.errors import ExecutionError
from export.mil.registry import Call, Handlers

HANDLERS = Handlers()


@dataclass
class StateSlot:
    """Where a run keeps the current value of a state. Tensors in it are replaced, never changed in place."""

    value: Tensor

    def write(self, value: Tensor) -> None:
        """Replaces the value. Raises: ExecutionError when shape or type differ."""
        if value.shape != self.value.shape or value.dtype != self.value.dtype:
            raise ExecutionError(
                f"a {value.dtype} {list(value.shape)} is written to a state of {self.value.dtype} "
                f"{list(self.value.shape)}"
            )
        self.value = value


@HANDLERS.op("read_state")
def _read_state(call: Call) -> Tensor:
    return call.stored("input").value


@HANDLERS.op("write_state")
def _write_state(call: Call) -> None:
    call.stored("input").write(call.stored("data"))


@HANDLERS.op("coreml_update_state")
def _update_state(call: Call) -> Tensor:
    slot = call.stored("state")
    slot.write(call.stored("value"))
    return slot.value


@HANDLERS.op("cond")
def _cond(call: Call) -> list[Tensor]:
    return call.run_block(0 if call.scalar("pred") else 1)


@HANDLERS.op("while_loop")
def _while_loop(call: Call) -> list[Tensor]:
    values = call.many("loop_vars")
    while bool(call.run_block(0, values)[0]):
        values = call.run_block(1, values)
    return values
