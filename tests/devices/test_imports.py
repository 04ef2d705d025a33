"""Results of others' programs: what is read of each format, and of files that are not as they should be."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devices.errors import DeviceError
from devices.imports import Imported, ImportedTiming, import_results, read
from devices.imports.model import MAX_TIMINGS

FIXTURES = Path(__file__).parent / "fixtures" / "imports"
FILES = sorted(
    path for path in FIXTURES.iterdir() if path.suffix in (".txt", ".json") and "not_loaded" not in path.name
)


def load(name):
    return import_results(FIXTURES / name)


def only(name):
    (timing,) = load(name).timings
    return timing


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_format_is_seen_from_its_content(path, tmp_path):
    copy = tmp_path / "results"  # no ending that could give it away
    copy.write_bytes(path.read_bytes())
    imported = import_results(copy)
    expected = {
        "xctest": "XCTest log",
        "minibench": "ExecuTorch benchmark_results.json",
        "observer": "PyTorchObserver",
        "coreml": "coremltools MLModelBenchmarker",
        "aihub": "Qualcomm AI Hub profile",
        "tflite": "TFLite benchmark_model",
    }
    assert imported.format == expected[path.name.partition("_")[0]]
    assert imported.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert Imported.model_validate_json(imported.model_dump_json()) == imported
    for timing in imported.timings:
        assert timing.unit == "ms" and (timing.samples is None or timing.count == len(timing.samples))


def test_xctest_of_executorch():
    imported = load("xctest_executorch_generic.txt")
    loaded, forward = imported.timings
    assert loaded.name == "load clip_vit_xnnpack_fp32" and loaded.load_ms is None
    assert forward.name == "forward clip_vit_xnnpack_fp32"
    assert forward.samples == pytest.approx((31.542, 30.881, 30.417, 30.560, 30.398, 30.655))
    assert (forward.min, forward.max) == pytest.approx((30.398, 31.542))
    assert forward.mean == pytest.approx(30.742, abs=1e-3) and forward.std == pytest.approx(0.3924, abs=1e-3)
    assert forward.percentiles == pytest.approx({"50": 30.56, "90": 31.542, "99": 31.542})
    assert forward.load_ms == loaded.mean == pytest.approx(124.592)
    assert forward.peak_memory_kb == 412394
    assert (imported.device.name, imported.device.system) == ("iPhone15,4", "iOS 18.0")


def test_xctest_of_a_language_model():
    imported = load("xctest_executorch_llm.txt")
    (timing,) = imported.timings
    assert timing.name == "generate smol_llm_xnnpack_8da4w"
    assert timing.other == {"tokens_per_second": pytest.approx(36.8876667)}
    assert (imported.device.name, imported.device.system) == ("iPad14,3", "iPadOS 17.5.1")


def test_xctest_of_others():
    timing = only("xctest_linux.txt")
    assert timing.name == "BenchTests.testForward" and timing.samples[0] == pytest.approx(5.643)
    assert timing.std / timing.mean == pytest.approx(0.17203, abs=1e-4), "as the log itself has it"
    assert load("xctest_linux.txt").device is None


def test_xctest_of_a_test_that_is_run_twice(tmp_path):
    text = (FIXTURES / "xctest_executorch_llm.txt").read_text()
    path = tmp_path / "log"
    path.write_text(text + text.replace("1.201884", "1.201885"))
    first, second = import_results(path).timings
    assert first.name == second.name and first.samples != second.samples and len(first.samples) == 3


def test_android():
    imported = load("minibench_generic.json")
    (timing,) = imported.timings
    assert (timing.name, timing.mean, timing.load_ms) == ("forward clip_vit_xnnpack_q8", 7.6231452, 38.112604)
    assert timing.samples is None and timing.min is None, "only the mean is in the file"
    assert timing.other == {"trimmed_mean_ms": 7.5120931, "pss_growth_mb": 112.40625}
    assert timing.peak_memory_kb is None, "growth is no peak"
    assert (imported.device.name, imported.device.system, imported.device.memory_mb) == (
        "samsung SM-S921B",
        "Android 14",
        None,
    )


def test_android_of_a_language_model():
    forward, generate = load("minibench_llm.json").timings
    assert (forward.load_ms, generate.load_ms) == (120.5, 540.25)
    assert generate.samples == (2301.75,) and generate.other == {"tokens_per_second": 41.7}


def test_android_model_that_was_not_loaded():
    with pytest.raises(DeviceError, match="model 'clip_vit_qnn_q8' was not loaded on the device .load_status 32."):
        load("minibench_not_loaded.json")


def test_android_layout_of_an_apple_device():
    timing = only("minibench_from_ios.json")
    assert (timing.mean, timing.load_ms, timing.peak_memory_kb) == (31.0, 125.0, round(402.5 * 1024))
    assert load("minibench_from_ios.json").device.name == "iPhone 15.4"


def test_android_results_of_two_phones(tmp_path):
    entries = json.loads((FIXTURES / "minibench_generic.json").read_text())
    others = [{**entry, "deviceInfo": {**entry["deviceInfo"], "arch": "other"}} for entry in entries]
    path = tmp_path / "both.json"
    path.write_text(json.dumps(entries + others))
    imported = import_results(path)
    assert len(imported.timings) == 2 and imported.device is None


def test_observer():
    timings = {timing.name: timing for timing in load("observer_runner.txt").timings}
    assert list(timings) == [
        "prefill of 271 tokens",
        "decode after 271 tokens",
        "answer to 271 tokens",
        "prefill of 14 tokens",
        "decode after 14 tokens",
        "answer to 14 tokens",
    ]
    long = timings["prefill of 271 tokens"]
    assert long.samples == (410, 390) and long.load_ms == 1277 and long.other == {"first_token_ms": 400.5}
    decode = timings["decode after 271 tokens"]
    assert decode.samples is None and decode.count == 100 and decode.mean == pytest.approx((1000 + 1510) / 100)
    assert timings["answer to 14 tokens"].samples == (1189,)
    assert timings["prefill of 14 tokens"].load_ms is None, "0 to 0 is no load"


def test_observer_of_other_units(tmp_path):
    path = tmp_path / "log"
    text = (FIXTURES / "observer_logcat_1_5.txt").read_text()
    path.write_text(text.replace('SECOND":1000', 'SECOND":1000000'))
    assert load("observer_logcat_1_5.txt").timings[0].samples == (100,)
    assert import_results(path).timings[0].samples == (0.1,)


def test_coreml():
    imported = load("coreml_functions.json")
    prefill, decode = imported.timings
    assert prefill.samples == (18.25, 18.5, 18.0, 19.25) and prefill.load_ms == 412.5
    assert (decode.name, decode.mean, decode.load_ms) == ("decode", 4.5, 201.0)
    assert (imported.device.name, imported.device.system) == ("iPad Pro", "18.1")


def test_coreml_measurement_alone(tmp_path):
    assert only("coreml_measurement.json").samples == (18.25, 18.5, 18.0, 19.25)
    measurement = json.loads((FIXTURES / "coreml_measurement.json").read_text())
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"load": {"samples": [7.0]}, "predict": measurement}))
    (timing,) = import_results(path).timings
    assert (timing.name, timing.load_ms, timing.mean) == ("predict", 7.0, 18.5)


def test_aihub():
    timing = only("aihub_profile.json")
    assert timing.samples == (10.003, 4.205, 3.652, 3.7) and timing.min == 3.652
    assert timing.load_ms == 277.823 and timing.peak_memory_kb == 38483
    assert timing.other == {
        "estimated_ms": 3.652,
        "first_load_ms": 1374.293,
        "compile_ms": 0,
        "layers on NPU": 2,
        "layers on CPU": 1,
    }
    assert load("aihub_profile.json").device is None


def test_aihub_of_old():
    timing = only("aihub_profile_old.json")
    assert timing.samples is None and timing.mean is None and timing.min == 3.652
    assert timing.load_ms == 1374.293 and timing.peak_memory_kb is None


def test_tflite():
    timing = only("tflite_2_19_android.txt")
    assert (timing.name, timing.count, timing.samples) == ("vision_encoder.tflite", 50, None)
    assert (timing.mean, timing.min, timing.max, timing.std) == (56.2839, 56.227, 56.707, 0.079)
    assert timing.percentiles == {"5": 56.23, "50": 56.279, "95": 56.48}
    assert (timing.load_ms, timing.first_ms, timing.peak_memory_kb) == (102.32, 67.008, round(61.25 * 1024))
    assert timing.other == {"threads": 4, "memory_growth_mb": 18.8164}


def test_tflite_of_old():
    timing = only("tflite_2_4.txt")
    assert (timing.mean, timing.min, timing.count, timing.percentiles) == (2950.34, 2727.568, 50, {})
    assert timing.peak_memory_kb == round(46.0859 * 1024)


def test_tflite_calls_of_equal_length_and_a_profile_of_kernels():
    timing = only("tflite_logcat_profiled.txt")
    assert (timing.count, timing.mean, timing.min, timing.max, timing.std) == (7, 140.99, 140.99, 140.99, 0)


def test_tflite_of_several_runs(tmp_path):
    path = tmp_path / "log"
    path.write_text((FIXTURES / "tflite_2_19_android.txt").read_text() + (FIXTURES / "tflite_2_4.txt").read_text())
    first, second = import_results(path).timings
    assert (first.name, second.name) == ("vision_encoder.tflite", "decoder.tflite")
    assert first.peak_memory_kb != second.peak_memory_kb


# Files that are not as they should be.


def refused(tmp_path, content, *said):
    path = tmp_path / "results"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DeviceError) as error:
        import_results(path)
    message = str(error.value)
    assert repr(str(path)) in message and message.endswith(".") and "\n" not in message
    for words in said:
        assert words in message
    return message


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\n",
        "hello",
        "{}",
        "[]",
        "[1, 2]",
        '{"a": 1}',
        "null",
        '"PyTorch"',
        "count=3",
        "Test Case 'x' passed",
        "[{}]",
    ],
)
def test_other_files(tmp_path, content):
    refused(tmp_path, content, "the format is not known; accepted: XCTest log, ")


def test_what_is_no_text(tmp_path):
    refused(tmp_path, b"\x89PNG\r\n\x1a\n\x00\xff", "no text in UTF-8 (byte 0)")


def test_a_file_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "SIZE_LIMIT", 2**20)
    refused(tmp_path, " " * (2**20 + 1), "larger than 1 MiB")


def test_no_file(tmp_path):
    with pytest.raises(DeviceError, match="do not exist"):
        import_results(tmp_path / "none")
    with pytest.raises(DeviceError, match="cannot be read"):
        import_results(tmp_path)


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        (
            "xctest_linux.txt",
            "average: 0.004",
            "average: fast",
            "line 2: expected 'measured [METRIC, UNIT] average: NUMBER",
        ),
        ("xctest_linux.txt", "0.005643, ", "0.005643, x", "line 2: expected"),
        ("xctest_linux.txt", "0.005643, ", "0.005643, 1.2.3, ", "line 2: values must be numbers"),
        (
            "xctest_linux.txt",
            "average: 0.004",
            "average: 0.400",
            "line 2: the average is 0.400, but that of the values is",
        ),
        ("xctest_linux.txt", "seconds]", "fortnights]", "line 2: a clock's unit must be s, not 'fortnights'"),
        (
            "xctest_linux.txt",
            "[Time, seconds]",
            "[Disk, kB]",
            "no test has a line 'measured [Clock Monotonic Time, s]'",
        ),
        (
            "minibench_generic.json",
            '"actualValue":7.6231452',
            '"actualValue":"7"',
            "entry 0: actualValue: input should be",
        ),
        (
            "minibench_generic.json",
            '"name":"clip_vit"',
            '"nom":"clip_vit"',
            "entry 0: benchmarkModel.name: field required",
        ),
        (
            "minibench_generic.json",
            "7.6231452",
            "-7.6231452",
            "model 'clip_vit_xnnpack_q8': mean: input should be greater",
        ),
        ("minibench_generic.json", "7.6231452", "1e400", "entry 0: actualValue: input should be"),
        ("minibench_generic.json", "7.6231452", "NaN", "entry 0: actualValue: input should be"),
        ("minibench_generic.json", "7.6231452", "1" + "0" * 400, "entry 0: actualValue: "),
        ("minibench_generic.json", "7.6231452", "1" * 5000, "JSON cannot be read"),
        (
            "minibench_generic.json",
            "avg_inference_latency(ms)",
            "other",
            "there is neither 'avg_inference_latency(ms)'",
        ),
        ("observer_runner.txt", '"prompt_tokens":271', '"prompts":271', "line 3: prompt_tokens: field required"),
        ("observer_runner.txt", '{"prompt_tokens":14', '{"prompt_tokens" 14', "line 8: a JSON object must follow"),
        ("observer_logcat_1_5.txt", '"prompt_eval_end_ms":17', '"prompt_eval_end_ms":99', "must follow one another"),
        ("observer_logcat_1_5.txt", '_SECOND":1000', '_SECOND":0', "SCALING_FACTOR_UNITS_PER_SECOND: input should be"),
        (
            "coreml_functions.json",
            '"samples": [',
            '"values": [',
            "file: functions.prefill.load.samples: field required",
        ),
        ("coreml_functions.json", "19.25\n", "-19.25\n", "the average is 18.5, but that of the samples is"),
        ("coreml_measurement.json", '"average": 18.5', '"average": 1.5', "the average is 1.5, but"),
        ("aihub_profile.json", "4205", '"4205"', "execution_summary.all_inference_times.1: input should be"),
        ("aihub_profile.json", "4205", "-1", "execution_summary.all_inference_times.1: input should be greater"),
        (
            "aihub_profile.json",
            '"estimated_inference_time"',
            '"time"',
            "execution_summary.estimated_inference_time: field",
        ),
        ("tflite_2_4.txt", "Init: 17187", "Init: soon", "line 15: expected 'Inference timings in us: Init: NUMBER"),
        (
            "tflite_2_4.txt",
            "(avg): 2.95034e+06",
            "(avg): 2.9",
            "line 15: Inference (avg) is 2.9, but the statistics before",
        ),
        ("tflite_2_4.txt", "count=50 first", "count=0 first", "line 15: the model was not called"),
        (
            "tflite_2_4.txt",
            "Inference timings",
            "Some timings",
            "the text ends before a line 'Inference timings in us:'",
        ),
        ("tflite_2_4.txt", "max=3189954", "max=3189954e60", "line 15: max: input should be less than"),
    ],
)
def test_malformed(tmp_path, name, old, new, said):
    text = (FIXTURES / name).read_text()
    assert old in text
    refused(tmp_path, text.replace(old, new, 1), said)


def test_brackets_without_end(tmp_path):
    refused(tmp_path, "[" * 100_000, "JSON")


def test_too_many_timings(tmp_path):
    line = (FIXTURES / "observer_logcat_1_5.txt").read_text()
    lines = [line.replace('"prompt_tokens":5', f'"prompt_tokens":{count}') for count in range(MAX_TIMINGS // 2 + 1)]
    refused(tmp_path, "".join(lines), "timings")


@pytest.mark.parametrize(
    "name",
    [
        "xctest_linux.txt",
        "observer_logcat_1_5.txt",
        "coreml_measurement.json",
        "aihub_profile_old.json",
        *[
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "xctest_executorch_llm.txt",
                "minibench_generic.json",
                "tflite_2_4.txt",
                "tflite_logcat_profiled.txt",
            )
        ],
    ],
)
def test_truncated_at_every_byte(tmp_path, name):
    """A half-written file gives one sentence or, where whole results are before the cut, these."""
    content = (FIXTURES / name).read_bytes()
    whole = import_results(FIXTURES / name)
    path = tmp_path / "results"
    for end in range(len(content)):
        path.write_bytes(content[:end])
        try:
            cut = import_results(path)
        except DeviceError:
            continue
        if cut.format != whole.format:
            continue  # of another program, whose output the log has in it
        # Nothing that looks whole has got another value by the cut.
        known = {(timing.name, timing.mean, timing.samples) for timing in whole.timings}
        assert {(timing.name, timing.mean, timing.samples) for timing in cut.timings} <= known, end


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_anywhere(tmp_path, data):
    """Bytes changed, left out or put in: a sentence or results, nothing else."""
    content = bytearray(data.draw(st.sampled_from(FILES)).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(start + 8, len(content))))
        content[start:end] = data.draw(
            st.one_of(st.binary(max_size=6), st.sampled_from([b"", b"-", b"9" * 30, b"1e999", b"null"]))
        )
    path = tmp_path / "results"
    path.write_bytes(content)
    try:
        imported = import_results(path)
    except DeviceError as error:
        assert "\n" not in str(error)
    else:
        assert Imported.model_validate_json(imported.model_dump_json()) == imported


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_KEYS = (
    "metric",
    "functions",
    "predict",
    "samples",
    "execution_summary",
    "benchmarkModel",
    "actualValue",
    "statistics",
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=st.dictionaries(st.sampled_from(_KEYS), _JSON, min_size=1)
    | st.lists(st.dictionaries(st.sampled_from(_KEYS), _JSON))
)
def test_any_json_under_known_names(tmp_path, value):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(value))
    try:
        import_results(path)
    except DeviceError:
        pass


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=50))
def test_core_ml_samples_come_back_as_they_were(samples):
    from devices.imports import coreml

    (timing,) = coreml.parse({"samples": samples}).timings
    assert timing.samples == tuple(samples)
    assert timing.min - 1e-9 <= timing.mean <= timing.max + 1e-9 and timing.std >= 0
    assert ImportedTiming.model_validate(timing.model_dump()) == timing
