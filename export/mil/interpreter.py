"""Evaluates a function of a package with torch."""

from collections import ChainMap, Counter
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from export.mil.dtypes import DType, kind_of, to_integer
from export.mil.errors import ExecutionError, InputError
from export.mil.handlers import HANDLERS
from export.mil.ops_control import StateSlot
from export.mil.package import FunctionSignature, Package, Port, Shape
from export.mil.program import Block, Instruction, OpRecord, Output, Ref, Trace, compile_function
from export.mil.registry import Call
from export.mil.weights import Constant

Precision = Literal["float32", "declared"]


class State:
    """The values of a stateful function's states between runs; zeros at first. Runs replace them.

    Functions of one package that name the same states (prefill and decode, say) can share one `State`, as
    long as they are evaluated at the same precision.

    Attributes:
        tensors: value by name of the state.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    def copy(self) -> "State":
        """An independent state with the same values, to branch off from."""
        return State({name: tensor.clone() for name, tensor in self.tensors.items()})


class Interpreter:
    """One function of a saved package, ready to run on the host.

    precision "float32": every float is computed and stored in fp32, whatever the program declares. Answers
    "is
        this the right program?": all that differs from the source model is the rounding of the stored
        weights.
    precision "declared": each op is computed in fp32 from inputs of the declared types, and its result is
    rounded
        to the declared type. Answers "what does fp16 cost?"; how a device accumulates may differ from it.

    Example:
        interpreter = Interpreter("model.mlpackage", function="prefill")
        state = interpreter.make_state()
        logits = interpreter.run({"token": token}, state)["logits"]
    """

    def __init__(
        self, package: str | Path | Package, function: str | None = None, precision: Precision = "float32"
    ) -> None:
        """Opens and prepares a function.

        Args:
            package: an `.mlpackage` folder, or a `Package`: share one between interpreters to read weights
            once. function: its name; by default the package's default function.

        Raises:
            InputError: the package is damaged, or has no such function.
            UnknownOpError: the function uses an op that the interpreter does not know.
        """
        if precision not in ("float32", "declared"):
            raise InputError(f"precision is '{precision}'; expected 'float32' or 'declared'")
        self.package = package if isinstance(package, Package) else Package(package)
        self.precision = precision
        self.signature: FunctionSignature = self.package.signature(function)
        self._block = compile_function(
            self.package,
            self.signature.name,
            handlers=HANDLERS,
            store_constant=self._store_constant,
            fold=self._fold,
        )

    def run(
        self, inputs: Mapping[str, Tensor], state: State | None = None, *, trace: Trace | None = None
    ) -> dict[str, Tensor]:
        """Evaluates the function.

        Args:
            inputs: a tensor for every input of the signature. Any integer type will do whose values fit.
            state: required when the function has states; updated by the run.
            trace: collects what chosen ops take and give.

        Returns: outputs by name, in the order of the signature, independent of inputs, state and each other.

        Raises:
            InputError: inputs or state do not match the signature.
            ExecutionError: an op cannot be evaluated, or breaks its declared type.
        """
        env: dict[str, Any] = self._bind_inputs(inputs)
        slots = self._bind_state(state)
        env.update(slots)
        with torch.no_grad():
            outputs = self._run_block(self._block, env, trace)
        for name, slot in slots.items():
            state.tensors[name] = slot.value
        return {port.name: value.clone() for port, value in zip(self.signature.outputs, outputs, strict=True)}

    def make_state(self) -> State:
        """A fresh state: zeros for each state of the function (none for a stateless one)."""
        return State({p.name: torch.zeros(_fixed(p), dtype=self._carrier(p.dtype)) for p in self.signature.states})

    def op_counts(self) -> Counter[str]:
        """How often each op type occurs in the function, constants and weight decompression not counted."""
        return self._block.op_counts()

    # -- inputs and state

    def _bind_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        expected = {port.name: port for port in self.signature.inputs}
        wrong = [f"'{name}' is not an input" for name in inputs if name not in expected]
        wrong += [f"'{name}' is missing" for name in expected if name not in inputs]
        if wrong:
            names = ", ".join(expected) or "no inputs"
            raise InputError(f"function '{self.signature.name}' takes {names}: {'; '.join(wrong)}")
        return {name: self._bind_input(port, inputs[name]) for name, port in expected.items()}

    def _bind_input(self, port: Port, value: Tensor) -> Tensor:
        if not isinstance(value, Tensor):
            raise InputError(f"input '{port.name}' is a {type(value).__name__}; expected a torch.Tensor")
        if not _fits(value.shape, port.shape):
            raise InputError(f"input '{port.name}' has shape {list(value.shape)}; expected {_show(port.shape)}")
        if kind_of(value) != port.dtype.kind:
            raise InputError(f"input '{port.name}' is {value.dtype}; expected {port.dtype.name}")
        value = value.detach().cpu()
        if port.dtype.kind == "int":
            try:
                return to_integer(value, port.dtype)
            except ExecutionError as error:
                raise InputError(f"input '{port.name}': {error}") from error
        return value.to(self._carrier(port.dtype))

    def _bind_state(self, state: State | None) -> dict[str, StateSlot]:
        if not self.signature.states:
            return {}
        names = ", ".join(port.name for port in self.signature.states)
        if state is None:
            raise InputError(f"function '{self.signature.name}' has the states {names}; give run() a make_state()")
        slots = {}
        for port in self.signature.states:
            tensor = state.tensors.get(port.name)
            if tensor is None:
                raise InputError(f"the state given lacks '{port.name}'; function '{self.signature.name}' has {names}")
            if tuple(tensor.shape) != _fixed(port) or tensor.dtype != self._carrier(port.dtype):
                raise InputError(
                    f"state '{port.name}' is {tensor.dtype} {list(tensor.shape)}; expected "
                    f"{self._carrier(port.dtype)} {list(_fixed(port))}"
                )
            slots[port.name] = StateSlot(tensor)
        return slots

    # -- evaluation

    def _run_block(self, block: Block, env: MutableMapping[str, Any], trace: Trace | None) -> list[Tensor]:
        for instruction in block.instructions:
            try:
                results = self._evaluate(instruction, env, trace)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                if isinstance(error, ExecutionError) and str(error).startswith("MIL op"):
                    raise  # already says which op, from a nested block
                raise ExecutionError(f"{instruction.label}: {error}") from error
            for output, result in zip(instruction.outputs, results, strict=True):
                env[output.name] = result
            for name in instruction.last_use_of:
                del env[name]
        return [block.constants[name] if name in block.constants else env[name] for name in block.outputs]

    def _evaluate(self, instruction: Instruction, env: MutableMapping[str, Any], trace: Trace | None) -> list[Tensor]:
        values = {
            name: [env[value.name] if isinstance(value, Ref) else value for value in items]
            for name, items in instruction.arguments.items()
        }

        def run_block(index: int, arguments: Sequence[Tensor]) -> list[Tensor]:
            inner = instruction.blocks[index]
            scope = ChainMap(dict(zip(inner.inputs, arguments, strict=True)), env)
            return self._run_block(inner, scope, trace)

        result = instruction.handler(
            Call(instruction, values, rounds=self.precision == "declared", run_block=run_block)
        )
        results = [] if result is None else [result] if isinstance(result, Tensor) else list(result)
        if len(results) != len(instruction.outputs):
            raise ExecutionError(f"gives {len(results)} results, the program takes {len(instruction.outputs)}")
        results = [self._conform(value, output) for value, output in zip(results, instruction.outputs, strict=True)]
        if trace is not None and trace.wants(instruction):
            inputs = {name: items[0] if len(items) == 1 else items for name, items in values.items()}
            outputs = dict(zip((output.name for output in instruction.outputs), results, strict=True))
            trace.records.append(OpRecord(instruction.op, inputs, outputs))
        return results

    def _conform(self, value: Tensor, output: Output) -> Tensor:
        """Checks a result against its declared type and stores it as this precision wants."""
        if not _fits(value.shape, output.shape):
            raise ExecutionError(
                f"the result '{output.name}' has shape {list(value.shape)}, the program declares {_show(output.shape)}"
            )
        kind = kind_of(value)
        if kind != output.dtype.kind:
            raise ExecutionError(f"the result '{output.name}' is {kind}, the program declares {output.dtype.name}")
        if kind == "int":
            # int32 in int32 is by far the most common and cannot be out of range.
            return (
                value
                if value.dtype == torch.int32 and output.dtype.name == "int32"
                else to_integer(value, output.dtype)
            )
        return value.to(self._carrier(output.dtype))

    def _carrier(self, dtype: DType) -> torch.dtype:
        return torch.float32 if dtype.kind == "float" and self.precision == "float32" else dtype.carrier

    def _store_constant(self, value: Constant) -> Constant:
        if isinstance(value, Tensor) and value.is_floating_point() and self.precision == "float32":
            return value.to(torch.float32)
        return value

    def _fold(self, instruction: Instruction) -> list[Tensor]:
        if any(isinstance(value, Ref) for values in instruction.arguments.values() for value in values):
            raise InputError(f"{instruction.label} has an argument that is not constant")
        try:
            with torch.no_grad():
                return self._evaluate(instruction, {}, None)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise InputError(f"{instruction.label}: the compressed weight is inconsistent: {error}") from error


def _fits(shape: Sequence[int], declared: Shape) -> bool:
    return len(shape) == len(declared) and all(d is None or d == s for s, d in zip(shape, declared, strict=True))


def _show(shape: Shape) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def _fixed(port: Port) -> tuple[int, ...]:
    if any(size is None for size in port.shape):
        raise InputError(f"state '{port.name}' has no fixed shape: {_show(port.shape)}")
    return tuple(size for size in port.shape if size is not None)
