"""Running functions: precisions, inputs, states, control flow, traces, unknown ops, several functions."""

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools import proto
from coremltools.converters.mil import Builder as mb
from mil_programs import build_package, save_module

from export.mil import ExecutionError, InputError, Interpreter, Package, Trace, UnknownOpError
from export.mil.handlers import HANDLERS
from export.mil.registry import Handlers, merge


def _edit(package, change) -> None:
    path = package / "Data/com.apple.CoreML/model.mlmodel"
    spec = proto.Model_pb2.Model()
    spec.ParseFromString(path.read_bytes())
    change(spec.mlProgram.functions["main"].block_specializations["CoreML8"])
    path.write_bytes(spec.SerializeToString())


# -- unknown ops and contradictions


def test_an_unknown_op_is_named(tmp_path):
    package = build_package(tmp_path, {"x": torch.zeros(3)}, lambda x: [mb.relu(x=x, name="y")])

    def rename(block):
        next(op for op in block.operations if op.type == "relu").type = "frobnicate"

    _edit(package, rename)
    with pytest.raises(UnknownOpError, match=r"MIL op 'frobnicate' \(output 'y', function 'main'\)") as caught:
        Interpreter(package)
    assert (caught.value.op, caught.value.output) == ("frobnicate", "y")


def test_a_known_op_of_coremltools_without_a_handler_is_named(tmp_path):
    package = build_package(
        tmp_path,
        {"x": torch.zeros(1, 2, 4)},
        lambda x: [mb.conv_transpose(x=x, weight=np.ones((2, 3, 2), np.float32), name="y")],
    )
    with pytest.raises(UnknownOpError, match="'conv_transpose'.*'y'"):
        Interpreter(package)


def test_a_result_that_contradicts_its_declaration_is_refused(tmp_path):
    package = build_package(tmp_path, {"x": torch.zeros(2, 3)}, lambda x: [mb.relu(x=x, name="y")])

    def enlarge(block):
        next(op for op in block.operations if op.type == "relu").outputs[0].type.tensorType.dimensions[
            0
        ].constant.size = 4

    _edit(package, enlarge)
    with pytest.raises(ExecutionError, match=r"'relu' .*shape \[2, 3\], the program declares \[4, 3\]"):
        Interpreter(package).run({"x": torch.zeros(2, 3)})

    def retype(block):
        output = next(op for op in block.operations if op.type == "relu").outputs[0].type.tensorType
        output.dimensions[0].constant.size = 2
        output.dataType = proto.MIL_pb2.INT32

    _edit(package, retype)
    with pytest.raises(ExecutionError, match="is float, the program declares int32"):
        Interpreter(package).run({"x": torch.zeros(2, 3)})


def test_a_value_that_nothing_defines_is_refused(tmp_path):
    package = build_package(tmp_path, {"x": torch.zeros(3)}, lambda x: [mb.relu(x=x, name="y")])

    def rewire(block):
        next(op for op in block.operations if op.type == "relu").inputs["x"].arguments[0].name = "ghost"

    _edit(package, rewire)
    with pytest.raises(InputError, match="'relu'.*uses 'ghost', which nothing defines"):
        Interpreter(package)


def test_a_failing_op_is_named(tmp_path):
    values = {"i": torch.tensor([4], dtype=torch.int32), "j": torch.tensor([2], dtype=torch.int32)}
    package = build_package(tmp_path, values, lambda i, j: [mb.floor_div(x=i, y=j, name="q")])
    interpreter = Interpreter(package)
    assert interpreter.run(values)["q"].item() == 2
    with pytest.raises(ExecutionError, match=r"MIL op 'floor_div' \(output 'q'\): .*[Zz]ero"):
        interpreter.run({**values, "j": torch.tensor([0], dtype=torch.int32)})


def test_an_op_cannot_have_two_handlers():
    table = Handlers()
    table.op("relu")(HANDLERS["relu"])
    with pytest.raises(ValueError, match="'relu' has two handlers"):
        merge([HANDLERS, table])


# -- inputs


def test_inputs_are_checked(tmp_path):
    values = {"x": torch.zeros(2, 3), "i": torch.zeros(2, dtype=torch.int32)}
    interpreter = Interpreter(
        build_package(tmp_path, values, lambda x, i: [mb.relu(x=x, name="y"), mb.identity(x=i, name="j")])
    )
    assert interpreter.run({**values, "i": torch.tensor([1, 2])})["j"].tolist() == [1, 2]  # int64 that fits
    for bad, message in (
        ({"x": values["x"]}, "takes x, i: 'i' is missing"),
        ({**values, "z": values["x"]}, "'z' is not an input"),
        ({**values, "x": torch.zeros(3, 2)}, r"'x' has shape \[3, 2\]; expected \[2, 3\]"),
        ({**values, "x": torch.zeros(2, 3, dtype=torch.int32)}, "'x' is torch.int32; expected fp32"),
        ({**values, "i": torch.zeros(2)}, "'i' is torch.float32; expected int32"),
        ({**values, "i": torch.tensor([1, 2**31])}, "'i': values in .* exceed int32"),
        ({**values, "x": np.zeros((2, 3))}, "'x' is a ndarray; expected a torch.Tensor"),
    ):
        with pytest.raises(InputError, match=message):
            interpreter.run(bad)


def test_outputs_are_independent_of_inputs_and_constants(tmp_path):
    weight = np.ones(12, np.float32)

    def build(x):
        return [mb.identity(x=x, name="y"), mb.const(val=weight, name="w")]

    interpreter = Interpreter(build_package(tmp_path, {"x": torch.zeros(3)}, build))
    x = torch.zeros(3)
    outputs = interpreter.run({"x": x})
    for value in outputs.values():
        value += 5
    assert x.abs().max() == 0
    assert interpreter.run({"x": x})["w"].tolist() == weight.tolist()


# -- precision


def test_precisions(tmp_path):
    values = {"x": torch.full((1, 3000), 1.0)}
    weight = np.full((1, 3000), 0.1, np.float32)

    def build(x):
        return [mb.linear(x=x, weight=weight, name="y")]

    package = Package(build_package(tmp_path, values, build, fp16=True))
    rounded = torch.tensor(0.1).half().float()
    exact = Interpreter(package).run(values)
    declared = Interpreter(package, precision="declared").run(values)
    # Only the stored weights are rounded, the sum is not: 3000 * fp16(0.1) has no fp16 neighbour this close.
    torch.testing.assert_close(exact["y"], 3000 * rounded.reshape(1, 1), atol=1e-3, rtol=0)
    assert declared["y"].item() == (3000 * rounded).half().item() != exact["y"].item()
    assert exact["y"].dtype == declared["y"].dtype == torch.float32


def test_values_overflow_at_declared_precision_only(tmp_path):
    values = {"x": torch.tensor([300.0])}
    package = build_package(tmp_path, values, lambda x: [mb.sqrt(x=mb.square(x=x), name="y")], fp16=True)
    assert Interpreter(package).run(values)["y"].item() == 300
    assert Interpreter(package, precision="declared").run(values)["y"].isinf().all()


# -- states and functions


class _Accumulator(torch.nn.Module):
    """Adds each chunk's sum to a running total."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(1, 4))
        self.weight = torch.nn.Parameter(torch.arange(64.0).reshape(16, 4) / 64)

    def forward(self, chunk):
        self.total.add_((chunk @ self.weight).sum(0, keepdim=True))
        return self.total * 2


@pytest.fixture(scope="module")
def two_functions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("functions")
    torch.manual_seed(0)
    module = _Accumulator()
    descriptor = ct.utils.MultiFunctionDescriptor()
    for name, rows in (("prefill", 5), ("decode", 1)):
        (folder / name).mkdir()
        path = save_module(module, (torch.zeros(rows, 16),), folder / name, fp16=True)
        descriptor.add_function(str(path), src_function_name="main", target_function_name=name)
    descriptor.default_function_name = "decode"
    ct.utils.save_multifunction(descriptor, str(folder / "both.mlpackage"))
    return Package(folder / "both.mlpackage"), module


def test_functions_share_weights_and_state(two_functions):
    package, module = two_functions
    assert sorted(package.functions) == ["decode", "prefill"]
    assert package.signature().name == "decode"
    prefill, decode = Interpreter(package, "prefill"), Interpreter(package, "decode")
    (state_name,) = (port.name for port in prefill.signature.states)
    state = prefill.make_state()
    assert state.tensors[state_name].shape == (1, 4)
    torch.manual_seed(1)
    chunk, token = torch.randn(5, 16), torch.randn(1, 16)
    with torch.no_grad():
        module.total.zero_()
        wanted = [module(chunk).clone(), module(token).clone(), module(token).clone()]
    branch = None
    for step, (interpreter, value) in enumerate(((prefill, chunk), (decode, token), (decode, token))):
        (output,) = interpreter.run({"chunk": value}, state).values()
        torch.testing.assert_close(output, wanted[step], atol=1e-5, rtol=1e-5)
        branch = branch or state.copy()
    # The copy was taken after the prefill and has not moved since.
    (output,) = decode.run({"chunk": token}, branch).values()
    torch.testing.assert_close(output, wanted[1], atol=1e-5, rtol=1e-5)


def test_state_is_checked(two_functions):
    package, _ = two_functions
    decode = Interpreter(package, "decode")
    (name,) = (port.name for port in decode.signature.states)
    inputs = {"chunk": torch.zeros(1, 16)}
    with pytest.raises(InputError, match=f"has the states {name}; give run"):
        decode.run(inputs)
    state = decode.make_state()
    del state.tensors[name]
    with pytest.raises(InputError, match=f"lacks '{name}'"):
        decode.run(inputs, state)
    declared = Interpreter(package, "decode", "declared")
    with pytest.raises(InputError, match="is torch.float32.*expected torch.float16"):
        declared.run(inputs, decode.make_state())
    state = declared.make_state()
    declared.run(inputs, state)
    assert state.tensors[name].dtype == torch.float16


def test_a_failed_run_leaves_the_state_alone(tmp_path):
    values = {"i": torch.tensor([1], dtype=torch.int32)}

    def build(i, cache):
        old = mb.read_state(input=cache)
        new = mb.coreml_update_state(state=cache, value=mb.add(x=old, y=np.float16(1)))
        row = mb.gather_along_axis(x=new, indices=i, axis=0, name="row")
        return [row]

    interpreter = Interpreter(build_package(tmp_path, values, build, states={"cache": (3,)}))
    state = interpreter.make_state()
    assert interpreter.run(values, state)["row"].item() == 1
    with pytest.raises(ExecutionError, match="out of bounds"):
        interpreter.run({"i": torch.tensor([3], dtype=torch.int32)}, state)
    assert state.tensors["cache"].tolist() == [1, 1, 1]
    assert interpreter.run(values, state)["row"].item() == 2


# -- control flow and traces


def test_control_flow(tmp_path):
    values = {"x": torch.tensor([3.0]), "n": torch.tensor([5], dtype=torch.int32)}

    def build(x, n):
        count = mb.squeeze(x=n, axes=[0])

        def body(step, value):
            return mb.add(x=step, y=1), mb.mul(x=value, y=np.float32(2))

        _, looped = mb.while_loop(
            _cond=lambda step, value: mb.less(x=step, y=count), _body=body, loop_vars=(np.int32(0), x)
        )
        chosen = mb.cond(
            pred=mb.greater(x=count, y=3),
            _true_fn=lambda: mb.add(x=x, y=np.float32(100)),
            _false_fn=lambda: mb.sub(x=x, y=np.float32(100)),
        )
        return [mb.identity(x=looped, name="looped"), mb.identity(x=chosen, name="chosen")]

    interpreter = Interpreter(build_package(tmp_path, values, build))
    assert {name: v.item() for name, v in interpreter.run(values).items()} == {"looped": 96, "chosen": 103}
    outputs = interpreter.run({**values, "n": torch.tensor([0], dtype=torch.int32)})
    assert {name: v.item() for name, v in outputs.items()} == {"looped": 3, "chosen": -97}
    counts = interpreter.op_counts()
    assert counts["while_loop"] == counts["cond"] == counts["less"] == counts["mul"] == 1
    assert "const" not in counts


def test_traces_tell_what_topk_kept(tmp_path):
    values = {"scores": torch.tensor([[0.1, 0.7, 0.2, 0.9, 0.4]])}

    def build(scores):
        _, best = mb.topk(x=scores, k=3, name="best")
        kept, _ = mb.topk(x=mb.cast(x=best, dtype="fp32"), k=3, ascending=True, name="ordered")
        return [mb.add(x=kept, y=np.float32(1), name="out")]

    interpreter = Interpreter(build_package(tmp_path, values, build))
    trace = Trace(ops={"topk"}, outputs={"out"})
    interpreter.run(values, trace=trace)
    assert [record.op for record in trace.records] == ["topk", "topk", "add"]
    first, second, last = trace.records
    assert first.outputs["best_1"].tolist() == [[3, 1, 4]]
    assert second.outputs["ordered_0"].tolist() == [[1, 3, 4]]
    assert torch.equal(first.inputs["x"], values["scores"])
    assert last.outputs["out"].tolist() == [[2, 4, 5]]
    # Without a trace nothing is kept.
    interpreter.run(values)
    assert len(trace.records) == 3
