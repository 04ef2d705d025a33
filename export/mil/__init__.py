"""Runs a saved Core ML ML Program (`.mlpackage`) on any machine, to verify what a converter really wrote.

Nothing in here imports `comp_edge` (`runtime_tests` uses this package and must not) and nothing needs a Mac:
the program is read from the package's protobuf and weight files and evaluated with torch.
"""

from export.mil.errors import ExecutionError, InputError, UnknownOpError
from export.mil.interpreter import Interpreter, State
from export.mil.package import FunctionSignature, Package, Port
from export.mil.program import OpRecord, Trace

__all__ = [
    "ExecutionError",
    "FunctionSignature",
    "InputError",
    "Interpreter",
    "OpRecord",
    "Package",
    "Port",
    "State",
    "Trace",
    "UnknownOpError",
]
