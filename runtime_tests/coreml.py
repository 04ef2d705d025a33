"""Core ML bundles on a machine without Core ML: the saved packages run in the interpreter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from export.bundle import Bundle, BundleError, MethodSpec
from export.mil import Interpreter, Package
from export.mil.errors import InputError as PackageError
from export.mil.errors import UnknownOpError


class MilEngine:
    """Executes the methods of a Core ML bundle; methods in the same package share one state.

    Everything is computed in fp32, whatever the package declares: that asks whether the program is right.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._interpreters: dict[str, Interpreter] = {}
        self._states: dict[str, Any] = {}
        packages: dict[str, Package] = {}
        for method in bundle.manifest.methods:
            try:
                package = packages.setdefault(method.file, Package(bundle.path(method.file)))
                self._interpreters[method.name] = Interpreter(package, function=method.function)
            except (PackageError, UnknownOpError) as error:
                raise BundleError(f"package {method.file!r}: {error}") from None
            if method.file not in self._states and self._interpreters[method.name].signature.states:
                self._states[method.file] = self._interpreters[method.name].make_state()

    def call(self, method: str, *inputs: Tensor) -> Tensor:
        """Run a method; its first output as fp32."""
        return self.call_all(method, *inputs)[0]

    def call_all(self, method: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run a method; all its outputs, floats as fp32."""
        spec = self.bundle.manifest.method(method)
        named = {port.name: value for port, value in zip(spec.inputs, inputs, strict=True)}
        stateful = self._interpreters[method].signature.states
        outputs = self._interpreters[method].run(named, self._states[spec.file] if stateful else None)
        found = (outputs[port.name] for port in spec.outputs)
        return tuple(value.to(torch.float32) if value.is_floating_point() else value for value in found)

    def signature_errors(self) -> list[str]:
        """Where the packages' signatures differ from the manifest."""
        wrong = []
        for method in self.bundle.manifest.methods:
            wrong += self._method_errors(method)
        return wrong

    def _method_errors(self, method: MethodSpec) -> list[str]:
        signature = self._interpreters[method.name].signature
        wrong = []
        for kind, specs, ports in (
            ("input", method.inputs, signature.inputs),
            ("output", method.outputs, signature.outputs),
            ("state", method.states, signature.states),
        ):
            expected = {spec.name: [list(spec.shape), spec.dtype] for spec in specs}
            actual = {port.name: [list(port.shape), DTYPES.get(port.dtype.name, port.dtype.name)] for port in ports}
            for name in sorted(set(expected) | set(actual)):
                if expected.get(name) != actual.get(name):
                    wrong.append(
                        f"{method.name} {kind} {name!r} is {actual.get(name, 'missing')}, the manifest says "
                        f"{expected.get(name, 'nothing')}"
                    )
        return wrong


# Names of MIL types as the manifest writes them.
DTYPES = {"fp32": "float32", "fp16": "float16"}
