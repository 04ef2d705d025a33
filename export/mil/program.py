"""A function of a package made ready to run: names resolved, constants decoded, handlers looked up."""

from collections import ChainMap, Counter
from collections.abc import Callable, Collection, MutableMapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from coremltools import proto
from torch import Tensor

from export.mil.dtypes import STRING, DType
from export.mil.errors import InputError, UnknownOpError
from export.mil.package import Package, Shape, tensor_type
from export.mil.registry import Handler, Handlers
from export.mil.weights import Constant, decode


class Ref(NamedTuple):
    """An argument that another operation, or the caller, provides at run time."""

    name: str


@dataclass(frozen=True)
class Output:
    """A result of an operation and the type that the program declares for it."""

    name: str
    dtype: DType
    shape: Shape


@dataclass(eq=False)
class Instruction:
    """One operation. `last_use_of`: values that nothing after it in its block needs."""

    op: str
    ios: int
    handler: Handler
    arguments: dict[str, list]
    outputs: tuple[Output, ...]
    blocks: tuple["Block", ...]
    last_use_of: tuple[str, ...] = ()
    constant_arguments: frozenset[str] = frozenset()
    memo: dict[tuple[str, str], Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """How messages name the operation."""
        outputs = ", ".join(f"'{output.name}'" for output in self.outputs)
        return f"MIL op '{self.op}' (output {outputs or 'none'})"


@dataclass(frozen=True)
class Block:
    """A sequence of operations. `constants`: those of its outputs that are known beforehand."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    constants: dict[str, Constant]

    def op_counts(self) -> Counter[str]:
        """How often each op type occurs, nested blocks included, `const` and folded `constexpr_` ops not."""
        counts = Counter(instruction.op for instruction in self.instructions)
        for instruction in self.instructions:
            for block in instruction.blocks:
                counts += block.op_counts()
        return counts


@dataclass(frozen=True)
class OpRecord:
    """What one evaluation of an operation took and gave. Arguments with several values are lists."""

    op: str
    inputs: dict[str, Any]
    outputs: dict[str, Tensor]


class Trace:
    """Collects what chosen operations take and give during a run, in the order of evaluation.

    Attributes:
        records: one entry per evaluation; tensors are shared with the run, so they must not be changed.
    """

    def __init__(self, *, ops: Collection[str] = (), outputs: Collection[str] = ()) -> None:
        """Selects operations by op type (`ops={"topk"}`) or by the name of one of their outputs."""
        self._ops = frozenset(ops)
        self._outputs = frozenset(outputs)
        self.records: list[OpRecord] = []

    def wants(self, instruction: Instruction) -> bool:
        """Whether the operation was selected."""
        return instruction.op in self._ops or any(output.name in self._outputs for output in instruction.outputs)


FoldConstant = Callable[[Instruction], list[Tensor]]


def compile_function(
    package: Package,
    function: str,
    *,
    handlers: Handlers,
    store_constant: Callable[[Constant], Constant],
    fold: FoldConstant,
) -> Block:
    """Prepares a function.

    Args:
        store_constant: applied to every constant of a `const` op (to widen floats, say).
        fold: evaluates a `constexpr_` op, whose arguments are all constant.

    Raises:
        UnknownOpError: an op type has no handler.
        InputError: the program uses a value that nothing defines, or a type that is not supported.
    """
    signature = package.signature(function)
    opset = signature.opset
    if not opset.startswith("CoreML") or not opset[6:].isdigit():
        raise InputError(f"function '{function}' has the opset '{opset}'; expected CoreML5 or later")
    compiler = _Compiler(
        package=package,
        function=function,
        ios=int(opset[6:]) + 10,
        handlers=handlers,
        store_constant=store_constant,
        fold=fold,
    )
    known = {port.name for port in (*signature.inputs, *signature.states)}
    return compiler.block(package.block(function), constants={}, known=known)


@dataclass(frozen=True)
class _Compiler:
    package: Package
    function: str
    ios: int
    handlers: Handlers
    store_constant: Callable[[Constant], Constant]
    fold: FoldConstant

    def block(
        self, block: "proto.MIL_pb2.Block", *, constants: MutableMapping[str, Constant], known: set[str]
    ) -> Block:
        """`constants` and `known`: values of the enclosing scope; what this block defines stays its own."""
        constants = ChainMap({}, constants)
        inputs = tuple(value.name for value in block.inputs)
        self._check_new(inputs, constants=constants, known=known)
        known = known | set(inputs)
        instructions = []
        for op in block.operations:
            if op.type == "const":
                if len(op.outputs) != 1:
                    raise InputError(
                        f"a constant of function '{self.function}' has {len(op.outputs)} names, expected 1"
                    )
                output = _output(op.outputs[0])
                self._check_new((output.name,), constants=constants, known=known)
                constants[output.name] = self._const(op, output)
                continue
            instruction = self._instruction(op, constants=constants, known=known)
            names = tuple(output.name for output in instruction.outputs)
            self._check_new(names, constants=constants, known=known)
            if op.type.startswith("constexpr_"):
                folded = self.fold(instruction)
                constants.update(zip(names, folded, strict=True))
                continue
            known |= set(names)
            instructions.append(instruction)
        outputs = tuple(block.outputs)
        for name in outputs:
            if name not in known and name not in constants:
                raise InputError(f"function '{self.function}' returns '{name}', which nothing computes")
        _mark_last_uses(instructions, keep=set(outputs))
        fixed = {name: constants[name] for name in outputs if name in constants}
        return Block(inputs, outputs, tuple(instructions), fixed)

    def _check_new(self, names: tuple[str, ...], *, constants: MutableMapping[str, Constant], known: set[str]) -> None:
        for name in names:
            if name in constants or name in known:
                raise InputError(f"function '{self.function}' defines '{name}' twice")

    def _const(self, op: "proto.MIL_pb2.Operation", output: Output) -> Constant:
        if "val" not in op.attributes:
            raise InputError(f"the constant '{output.name}' has no value")
        value = decode(op.attributes["val"], self.package.weights)
        if isinstance(value, Tensor) and (tuple(value.shape) != output.shape or value.dtype != output.dtype.carrier):
            raise InputError(
                f"the constant '{output.name}' is declared {output.dtype.name} {list(output.shape)} "
                f"and stores {value.dtype} {list(value.shape)}"
            )
        return self.store_constant(value)

    def _instruction(
        self, op: "proto.MIL_pb2.Operation", *, constants: MutableMapping[str, Constant], known: set[str]
    ) -> Instruction:
        handler = self.handlers.get(op.type)
        if handler is None:
            output = op.outputs[0].name if op.outputs else "none"
            raise UnknownOpError(op=op.type, output=output, function=self.function)
        # Compressed weights keep their arguments in attributes up to iOS 17 and in inputs from iOS 18 on.
        arguments: dict[str, list] = {
            name: [decode(value, self.package.weights)] for name, value in op.attributes.items() if name != "name"
        }
        for name, argument in op.inputs.items():
            arguments[name] = [
                self._binding(b, op=op.type, constants=constants, known=known) for b in argument.arguments
            ]
        constant_arguments = frozenset(
            name for name, values in arguments.items() if not any(isinstance(value, Ref) for value in values)
        )
        blocks = tuple(self.block(inner, constants=constants, known=known) for inner in op.blocks)
        return Instruction(
            op=op.type,
            ios=self.ios,
            handler=handler,
            arguments=arguments,
            outputs=tuple(_output(output) for output in op.outputs),
            blocks=blocks,
            constant_arguments=constant_arguments,
        )

    def _binding(
        self,
        binding: "proto.MIL_pb2.Argument.Binding",
        *,
        op: str,
        constants: MutableMapping[str, Constant],
        known: set[str],
    ) -> Constant | Ref:
        if binding.WhichOneof("binding") == "value":
            value = decode(binding.value, self.package.weights)
            return value if op.startswith("constexpr_") else self.store_constant(value)
        if binding.name in constants:
            return constants[binding.name]
        if binding.name not in known:
            raise InputError(
                f"MIL op '{op}' of function '{self.function}' uses '{binding.name}', which nothing defines"
            )
        return Ref(binding.name)


def _output(value: "proto.MIL_pb2.NamedValueType") -> Output:
    if value.type.WhichOneof("type") == "listType":
        # Only lists of strings and the like occur, as constants; they have no shape to check.
        return Output(value.name, STRING, ())
    dtype, shape = tensor_type(value.type)
    return Output(value.name, dtype, shape)


def _used(instruction: Instruction) -> set[str]:
    names = {value.name for values in instruction.arguments.values() for value in values if isinstance(value, Ref)}
    for block in instruction.blocks:
        names |= set(block.outputs)
        for inner in block.instructions:
            names |= _used(inner)
    return names


def _mark_last_uses(instructions: list[Instruction], *, keep: set[str]) -> None:
    """Lets the interpreter free values early. Only values that these instructions define are ever freed."""
    defined = {output.name for instruction in instructions for output in instruction.outputs}
    seen = set(keep)
    for instruction in reversed(instructions):
        candidates = _used(instruction) | {output.name for output in instruction.outputs}
        instruction.last_use_of = tuple(sorted((candidates & defined) - seen))
        seen |= candidates
