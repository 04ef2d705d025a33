"""What can go wrong when a package is opened or run."""


class InputError(ValueError):
    """A package, a function name or a tensor that the caller gave is not usable; one sentence says why.

    Not `comp_edge.errors.InputError`, because `runtime_tests` runs packages too and must not import
    `comp_edge`. Both are ValueErrors with a message fit for a user.
    """


class UnknownOpError(RuntimeError):
    """The program uses an operation that the interpreter does not know, so nothing can be said about it."""

    def __init__(self, *, op: str, output: str, function: str) -> None:
        super().__init__(f"MIL op '{op}' (output '{output}', function '{function}') is not known to the interpreter")
        self.op = op
        self.output = output
        self.function = function


class ExecutionError(RuntimeError):
    """An operation could not be evaluated, or its result contradicts the type that the program declares."""
