"""The script of a Core ML bundle that times its functions: coremltools' own classes, over stand-ins for what is in macOS.

Nothing here has seen a Mac. The stand-ins run the saved packages in the interpreter; where they replace Python they must
have its signatures, and all other Python of coremltools is the real one, so that another coremltools fails these tests.
"""

import asyncio
import hashlib
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.models import MLModel
from coremltools.models import model as native
from coremltools.models.ml_program.experimental import async_wrapper, remote_device
from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker
from coremltools.models.ml_program.experimental.remote_device import AppSigningCredentials, Device, DeviceState
from mil_programs import build_package
from safetensors.torch import save_file

from devices.imports import import_results
from export.bundle import Bundle, finish_bundle, sha256
from export.coreml.build import BENCHMARK_FILE, write_benchmark
from export.coreml.functions import ONLY_FUNCTION
from export.manifest import ImageSpec, MethodSpec, TensorSpec, TextSpec
from export.mil import Interpreter, State

TEAM = "ABCDE12345"
PIXELS = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4) / 100
METHODS = ("vision_encoder", "prefill", "decode")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A bundle of a plain package and of one with two functions that share a state."""
    folder, parts = tmp_path_factory.mktemp("bundle"), tmp_path_factory.mktemp("parts")
    weight = np.random.default_rng(0).normal(size=(2, 48)).astype(np.float32)

    def see(pixel_values):
        return [mb.linear(x=mb.reshape(x=pixel_values, shape=(1, 48)), weight=weight, name="image_features")]

    def count(step):
        def build(token, scale, cache):
            old = mb.read_state(input=cache)
            new = mb.coreml_update_state(state=cache, value=mb.add(x=old, y=np.float16(step)))
            held = mb.mul(x=mb.cast(x=new, dtype="fp32"), y=scale)
            return [mb.linear(x=held, weight=weight[:, :4], name="logits"), mb.add(x=token, y=np.int32(1), name="next")]

        return build

    def package(name, inputs, build, **options):
        (parts / name).mkdir()
        return build_package(parts / name, inputs, build, **options)

    shutil.copytree(package("vision", {"pixel_values": PIXELS[:1]}, see), folder / "vision_fp16.mlpackage")
    inputs = {"token": torch.zeros(1, 1, dtype=torch.int32), "scale": torch.zeros(1, 4)}
    descriptor = ct.utils.MultiFunctionDescriptor()
    for name, step in (("prefill", 2), ("decode", 1)):
        path = package(name, inputs, count(step), states={"cache": (1, 4)})
        descriptor.add_function(str(path), src_function_name=ONLY_FUNCTION, target_function_name=name)
    descriptor.default_function_name = "decode"
    ct.utils.save_multifunction(descriptor, str(folder / "language_fp16.mlpackage"))

    tokens = torch.tensor([7, 8, 9])
    golden = {"pixel_values": PIXELS, "tokens": tokens, "scale": torch.zeros(2, 5)}
    save_file(golden, folder / "golden.safetensors", metadata={"questions": '["a", "b"]'})
    write_benchmark(folder)
    spec = TensorSpec(name="scale", shape=(1, 4), dtype="float32", layout="any", range=(2, 3))
    language = {
        "file": "language_fp16.mlpackage",
        "inputs": (TensorSpec(name="token", shape=(1, 1), dtype="int32", layout="any", range=(3, 5)), spec),
        "outputs": (spec.model_copy(update={"name": "logits"}),),
        "states": (TensorSpec(name="cache", shape=(1, 4), dtype="float16", layout="any"),),
    }
    vision = MethodSpec(
        name="vision_encoder",
        file="vision_fp16.mlpackage",
        function=ONLY_FUNCTION,
        # The script gives the manifest's type, whatever the golden file has.
        inputs=(TensorSpec(name="pixel_values", shape=(1, 3, 4, 4), dtype="float16", layout="any"),),
        outputs=(TensorSpec(name="image_features", shape=(1, 2), dtype="float32", layout="any"),),
    )
    finish_bundle(
        folder,
        backend="coreml",
        profile="scheduled",
        model_type="tiny",
        base="tiny",
        precision="float16",
        methods=(vision, *(MethodSpec(name=name, function=name, **language) for name in ("prefill", "decode"))),
        image=ImageSpec(height=4, width=4, resample="bilinear", center_crop=False, rescale=1, mean=(0,), std=(1,)),
        text=TextSpec(max_tokens=1, prefix=(), suffix=(), pad_token_id=0),
        tokens={},
    )
    return folder


@pytest.fixture
def bundle(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "bundle")


@pytest.fixture
def script(bundle, monkeypatch):
    """The bundle's copy of the script as a module, on what takes itself for a Mac."""
    spec = importlib.util.spec_from_file_location("bundle_benchmark", bundle / BENCHMARK_FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(module.platform, "mac_ver", lambda: ("15.3", ("", "", ""), "arm64"))
    answer = subprocess.CompletedProcess([], 0, "Mac14,9\nApple M2 Pro\n", "")
    monkeypatch.setattr(module.subprocess, "run", lambda *args, **options: answer)
    return module


class Proxy:
    """Stands for the compiled `_MLModelProxy` of macOS: a loaded function, run by the interpreter.

    A call takes 10 ms plus the number of calls before it; loading takes 250 ms.
    """

    made = []

    def __init__(self, path, compute_units, function, hints, asset):
        assert hints == {} and asset is None
        self.units, self.function, self.calls, self.states = compute_units, function, [], []
        self.interpreter = Interpreter(path, function=function or None)
        self.made.append(self)

    @staticmethod
    def maximum_supported_specification_version():
        return 9

    def newState(self):
        self.states.append(self.interpreter.make_state())
        return self.states[-1]

    def predict(self, inputs, state):
        assert isinstance(state, State if self.interpreter.signature.states else type(None))
        self.calls.append({name: value.copy() for name, value in inputs.items()})
        values = {name: torch.from_numpy(value) for name, value in inputs.items()}
        return {name: value.numpy() for name, value in self.interpreter.run(values, state).items()}

    def get_load_duration_in_nano_seconds(self):
        return 250_000_000

    def get_last_predict_duration_in_nano_seconds(self):
        return (9 + len(self.calls)) * 1_000_000


@pytest.fixture
def mac(script, monkeypatch):
    """The script where coremltools has its compiled part."""
    monkeypatch.setattr(native, "_MLModelProxy", Proxy)
    monkeypatch.setattr(native, "_is_macos", lambda: True)
    monkeypatch.setattr(native, "_macos_version", lambda: (15, 3))
    monkeypatch.setattr(Proxy, "made", [])
    return script


def replace(monkeypatch, owner, name, stand_in):
    """Replace a function by one that must have its parameters: names, order, kinds and defaults."""
    real = inspect.getattr_static(owner, name)
    function = real.__func__ if isinstance(real, staticmethod) else real
    assert [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()] == [
        (p.name, p.kind, p.default) for p in inspect.signature(stand_in).parameters.values()
    ]
    assert inspect.iscoroutinefunction(function) == inspect.iscoroutinefunction(stand_in)
    monkeypatch.setattr(owner, name, staticmethod(stand_in) if isinstance(real, staticmethod) else stand_in)


class Service:
    """Stands for coremltools' app on a device with a loaded function; it takes 3 ms a call and 40 ms to load."""

    load_duration_in_nano_seconds = 40_000_000
    last_predict_duration_in_nano_seconds = 3_000_000

    def __init__(self, package, function):
        self.interpreter, self.calls = Interpreter(package, function=function), 0
        self.state = self.interpreter.make_state()

    async def predict(self, inputs):
        self.calls += 1
        values = {name: torch.from_numpy(value) for name, value in inputs.items()}
        stateful = bool(self.interpreter.signature.states)
        return {k: v.numpy() for k, v in self.interpreter.run(values, self.state if stateful else None).items()}


@pytest.fixture
def phone(mac, monkeypatch):
    """The script with two devices attached; what was asked of them."""
    asked = {"services": []}

    def device(name, identifier):
        rest = {"os_build_number": "22B83", "developer_mode_state": "enabled", "session": None}
        kind = remote_device.DeviceType.IPHONE
        return Device(name, kind, identifier, f"U-{identifier}", "18.1", state=DeviceState.CONNECTED, **rest)

    def get_devices():
        return [device("Phone", "A1"), device("Phone", "A2"), device("Tablet", "A3")]

    async def prepare_for_model_debugging(self, credentials=None, working_directory=None, clean=False):
        asked["prepared"] = (self.identifier, credentials)
        return self

    def compile_model(model, destination_path=None):
        shutil.copytree(model, destination_path)
        return destination_path

    async def load_on_device(device, compiled_model_path, compute_units, function_name=None, optimization_hints=None):
        service = Service(shutil.copytree(compiled_model_path, f"{compiled_model_path}.mlpackage"), function_name)
        asked["services"].append((device.name, compute_units, function_name, service))
        return service

    replace(monkeypatch, Device, "get_devices", get_devices)
    replace(monkeypatch, Device, "prepare_for_model_debugging", prepare_for_model_debugging)
    replace(monkeypatch, async_wrapper, "compile_model", compile_model)
    replace(monkeypatch, remote_device._RemoteMLModelService, "load_on_device", load_on_device)
    return mac, asked


def options(signature):
    return {name: p.default for name, p in inspect.signature(signature).parameters.items() if name != "self"}


def test_what_the_script_calls_is_there():
    empty = inspect.Parameter.empty
    given = {"model": empty, "compute_units": ct.ComputeUnit.ALL, "function_name": None, "skip_model_load": False}
    assert given.items() <= options(MLModel.__init__).items()
    assert options(MLModel.make_state) == {}
    assert list(options(MLModel.predict)) == ["data", "state"]
    for name in ("load_duration_in_nano_seconds", "last_predict_duration_in_nano_seconds"):
        assert isinstance(inspect.getattr_static(MLModel, name), property)
    assert options(MLModelBenchmarker.__init__) == {"model": empty, "device": None}
    assert options(MLModelBenchmarker.benchmark_load) == {"iterations": 1}
    assert options(MLModelBenchmarker.benchmark_predict) == {"inputs": None, "iterations": 1, "warmup": False}
    assert options(MLModelBenchmarker.Measurement.from_samples) == {"samples": empty}
    assert {unit.name for unit in ct.ComputeUnit} == {"ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY"}
    assert "development_team" in options(AppSigningCredentials)


def test_a_mac_is_measured_and_imported(mac, bundle, tmp_path, capsys):
    out = tmp_path / "mac.json"
    assert mac.main(["-o", str(out), "--iterations", "4", "--compute-units", "cpu_and_ne"]) == 0
    assert "decode: median 14.500 ms, least 13.000 ms, loaded in 250 ms" in capsys.readouterr().out

    imported = import_results(out)
    assert imported.format == "coremltools MLModelBenchmarker"
    assert (imported.device.name, imported.device.system) == ("Mac14,9, Apple M2 Pro", "macOS 15.3")
    assert tuple(timing.name for timing in imported.timings) == METHODS
    for timing in imported.timings:
        # Three calls came before these.
        assert timing.samples == (13.0, 14.0, 15.0, 16.0) and timing.load_ms == 250
    said = json.loads(out.read_text())
    assert (said["compute_units"], said["coremltools"]) == ("cpu_and_ne", ct.__version__)
    assert said["bundle"]["manifest_sha256"] == hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
    # Neither the bundle nor the folder of the file has anything new in it.
    assert Bundle.open(bundle).hash_errors() == [] and {one.name for one in tmp_path.iterdir()} == {
        "bundle",
        "mac.json",
    }


def test_functions_get_their_inputs_and_one_state(mac, tmp_path):
    assert mac.main(["-o", str(tmp_path / "out.json"), "--iterations", "2"]) == 0
    vision, prefill, decode = Proxy.made
    assert [(one.function, one.units) for one in Proxy.made] == [("", "ALL"), ("prefill", "ALL"), ("decode", "ALL")]
    (pixels,) = vision.calls[0].values()
    # fp16 as the manifest says, widened by coremltools.
    np.testing.assert_array_equal(pixels, PIXELS[:1].half().float().numpy())
    assert vision.states == [] and len(decode.calls) == 3 + 2
    for one, step in ((prefill, 2), (decode, 1)):
        (state,) = one.states
        assert state.tensors["cache"].tolist() == [[step * len(one.calls)] * 4]
    scale, token = decode.calls[-1]["scale"], decode.calls[-1]["token"]
    # The golden file has a 'scale' of another shape: not this input.
    assert scale.shape == (1, 4) and 2 <= scale.min() < scale.max() < 3
    assert (token.dtype, token.shape) == (np.int32, (1, 1)) and 3 <= token.item() <= 5


def test_why_the_script_has_a_loop_of_its_own(mac, bundle):
    """When this fails, coremltools can do it: see `_time_here`."""
    model = MLModel(str(bundle / "language_fp16.mlpackage"), function_name="decode")
    with pytest.raises(AttributeError, match="'list' object has no attribute 'state'"):
        asyncio.run(MLModelBenchmarker(model).benchmark_predict(inputs={}))


def test_a_device_is_measured_and_imported(phone, tmp_path):
    script, asked = phone
    out = tmp_path / "tablet.json"
    assert script.main(["-o", str(out), "--iterations", "4", "--device", "Tablet", "--team", TEAM]) == 0
    assert asked["prepared"] == ("A3", AppSigningCredentials(development_team=TEAM))
    assert [entry[:3] for entry in asked["services"]] == [
        ("Tablet", ct.ComputeUnit.ALL, function) for function in (None, "prefill", "decode")
    ]
    assert [service.calls for *_, service in asked["services"]] == [5, 5, 5]
    assert Proxy.made == []  # Nothing was loaded on the Mac.
    imported = import_results(out)
    assert (imported.device.name, imported.device.system) == ("Tablet", "18.1")
    assert tuple(timing.name for timing in imported.timings) == METHODS
    assert all(timing.samples == (3.0,) * 4 and timing.load_ms == 40 for timing in imported.timings)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [("Phone", "2 devices are called 'Phone'; known: 'Phone' (A1), 'Phone' (A2), "), ("Watch", "0 devices are called")],
)
def test_devices_that_are_not_one(phone, tmp_path, capsys, wanted, said):
    script, asked = phone
    assert script.main(["-o", str(tmp_path / "out.json"), "--device", wanted, "--team", TEAM]) == 2
    assert said in capsys.readouterr().err and "prepared" not in asked
    assert script.main(["-o", str(tmp_path / "out.json"), "--device", "U-A2", "--team", TEAM]) == 0
    assert asked["prepared"][0] == "A2"


def test_a_device_that_is_not_ready(phone, monkeypatch, tmp_path, capsys):
    async def refuse(self, credentials=None, working_directory=None, clean=False):
        raise ValueError("The device cannot be used for model debugging.\nCurrent state: DISCONNECTED.")

    monkeypatch.setattr(Device, "prepare_for_model_debugging", refuse)
    assert phone[0].main(["-o", str(tmp_path / "out.json"), "--device", "Tablet", "--team", TEAM]) == 2
    assert capsys.readouterr().err == (
        "error: device 'Tablet' cannot be used: The device cannot be used for model debugging. Current state: "
        "DISCONNECTED.\n"
    )


def refused(capsys, tmp_path, script, *more, out="out.json"):
    """What the script says when it writes nothing."""
    assert script.main(["-o", str(tmp_path / out), *more]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.endswith(".\n") and text.count("\n") == 1
    assert not (tmp_path / out).is_file() and not list(tmp_path.glob("*.part"))
    return text


def test_core_ml_refuses_a_package(mac, monkeypatch, tmp_path, capsys):
    def refuse(self, *args):
        raise RuntimeError("Error compiling model:\nnot today")

    monkeypatch.setattr(Proxy, "__init__", refuse)
    text = refused(capsys, tmp_path, mac)
    assert "vision_encoder cannot be timed: " in text and "Error compiling model: not today" in text


def test_a_coremltools_without_core_ml(script, tmp_path, capsys):
    assert "vision_encoder cannot be timed: coremltools could not reach" in refused(capsys, tmp_path, script)


def test_a_call_that_fails(mac, monkeypatch, tmp_path, capsys):
    def fail(self, inputs, state):
        if self.function == "decode":
            raise RuntimeError("out of memory.")
        return {}

    monkeypatch.setattr(Proxy, "predict", fail)
    assert refused(capsys, tmp_path, mac) == "error: decode cannot be timed: out of memory.\n"


def test_what_is_refused_before_measuring(mac, bundle, monkeypatch, tmp_path, capsys):
    assert "belong together" in refused(capsys, tmp_path, mac, "--device", "Phone")
    assert "does not exist" in refused(capsys, tmp_path, mac, out="none/out.json")
    assert "is a folder" in refused(capsys, tmp_path, mac, out="bundle")
    golden = bundle / "golden.safetensors"
    golden.write_bytes(golden.read_bytes()[:-400])
    assert "is not a whole bundle" in refused(capsys, tmp_path, mac)
    (bundle / "manifest.json").unlink()
    assert "leave this file in its bundle" in refused(capsys, tmp_path, mac)
    monkeypatch.setitem(sys.modules, "coremltools", None)
    assert "pip install" in refused(capsys, tmp_path, mac)
    assert Proxy.made == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--iterations", "0"], "'0' is no number of calls from 1 to 100000"),
        (["--iterations", "many"], "'many' is no number of calls"),
        (["--compute-units", "gpu"], "cpu_and_gpu"),
        (["--device", "Phone", "--team", "$(true)"], r"'\$\(true\)' is no team"),
    ],
)
def test_bad_options(script, capsys, more, said):
    with pytest.raises(SystemExit, match="2"):
        script.main(["-o", "out.json", *more])
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.skipif(sys.platform == "darwin", reason="says what it says elsewhere")
def test_alone_on_another_system(bundle, tmp_path):
    """The script as a user starts it, without what a Python may have beside its standard library."""

    def run(*arguments):
        command = [sys.executable, "-I", "-S", str(bundle / BENCHMARK_FILE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    shown = run("--help")
    assert shown.returncode == 0 and "python benchmark.py -o mac.json" in shown.stdout
    done = run("-o", "out.json")
    assert (done.returncode, done.stdout) == (2, "") and not (tmp_path / "out.json").exists()
    assert done.stderr.startswith("error: Core ML is a part of macOS, and this is ") and done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llava", "clip"])
def test_the_exporter_adds_the_script(kind, folders, mac, monkeypatch, tmp_path):
    from export.coreml.__main__ import main
    from tests.export.encoder_models import pruned_folder

    source = folders["pruned"] if kind == "llava" else pruned_folder("clip")
    command = [str(source), "-o", str(tmp_path / "exported"), "--precision", "fp16", "--verify", "8"]
    with monkeypatch.context() as without:  # The exporter is on no Mac.
        without.setattr(native, "_MLModelProxy", None)
        assert main(command) == 0
    made = Bundle.open(tmp_path / "exported" / "fp16")
    template = Path(inspect.getsourcefile(write_benchmark)).with_name(BENCHMARK_FILE)
    assert made.manifest.files[BENCHMARK_FILE] == sha256(made.path(BENCHMARK_FILE)) == sha256(template)

    monkeypatch.setattr(mac, "BUNDLE", made.folder)
    assert mac.main(["-o", str(tmp_path / "out.json"), "--iterations", "1"]) == 0
    timings = import_results(tmp_path / "out.json").timings
    assert [timing.name for timing in timings] == [method.name for method in made.manifest.methods]
