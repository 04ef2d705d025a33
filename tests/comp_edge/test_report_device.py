"""The report's section on a device: what it shows, what it refuses, and pictures in which nothing is left out."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comp_edge.errors import InputError
from comp_edge.plan import Plan
from comp_edge.report import theme, times, words, write_report
from comp_edge.report.device import Conditions, Hardware, Settings, compared, described
from comp_edge.report.latency import target_of
from comp_edge.report.times import LayerTime, Run
from tests.comp_edge.test_report import HOSTILE, folder, made, read, stage  # noqa: F401 (fixtures among them)

CONDITIONS = {
    "time": 1_767_225_600.0, "when": "after whole-0.25", "kind": "linux", "cores": 8, "online": [0, 1, 2, 3],
    "load": [0.5, 0.25, 0.1], "missing": ["battery"],
    "clusters": [{"name": "policy0", "governor": "schedutil", "current_khz": 1_800_000, "max_khz": 2_400_000}],
    "temperatures": [{"name": "soc", "celsius": 51.2}, {"name": "gpu", "celsius": 63.9}],
    "coolers": [{"name": "fan", "state": 0}, {"name": "cpufreq-0", "state": 2}],
}  # fmt: skip


def layer(method: str, stream: str, index: int, *ms: float) -> dict[str, Any]:
    return dict(
        zip(("method", "stream", "layer", "attention", "ffn", "drop"), (method, stream, index, *ms), strict=True)
    )


DEVICE = {
    "device": {"address": "adb://SECRET", "name": "Board 5", "cpu": "Cortex-A76", "cores": 8, "memory_mb": 8192},
    "settings": {"preset": "quick", "agent": "native", "runtime": "executorch 1.5.1", "threads": 2, "cpus": [4, 5]},
    "conditions": [CONDITIONS], "decode_tokens": 4, "device_seconds": 290.4, "measurements": 24,
    "held_out": {"n": 3, "mape": 0.021, "within_10pct": 1.0, "spearman": 1.0, "saved_ms": {"median_error": 0.05}},
    "warnings": ["prefill: 2 drops; measured were 0 to 1."],
    "predicted_ms": {"dense": 12.5, "pruned": 5.0}, "uncertainty_ms": 0.25, "measured": [],
    "methods": {"dense": {"prefill": 8.0, "decode": 1.125}, "pruned": {"prefill": 3.0, "decode": 0.5}},
    "layers": {
        "dense": [layer("prefill", "language", 0, 2.0, 3.0, 0.0), layer("decode", "language", 0, 0.5, 0.25, 0.0)],
        "pruned": [layer("prefill", "language", 0, 1.0, 0.5, 0.25), layer("decode", "language", 0, 0.25, 0.0, 0.0)],
    },
}  # fmt: skip
MEASURED = [{"stage": 5, "predicted": 5.2, "measured": 5.9}, {"stage": 7, "predicted": 5.0, "measured": 5.25}]


@pytest.fixture
def on_device(folder: Path) -> Path:  # noqa: F811
    """A folder that was pruned to milliseconds of a device, and measured there."""
    change(folder / "metrics.json", device=DEVICE, measured=MEASURED)
    change(
        folder / "plan.json", budget={"latency_ms": 5.2}, cost={"name": "latency_ms:Board 5", "dense": 12, "pruned": 5}
    )
    lines = [stage(i, predicted_ms=12.5 - i) for i in range(1, 8)]
    (folder / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_section(on_device: Path) -> None:
    parsed = read(write_report(on_device))
    for expected in (
        "On the device", "Board 5", "Cortex-A76, 8 cores", "8.0 GiB", "2, on cores 4, 5", "native agent, preset quick",
        "Latency of a request", "12.5 ms", "5.00 ± 0.25 ms", "2.50× faster", "5.2 ms on Board 5",
        "each of 4 further tokens", "24 measurements, 290 s", "off by 2.1 % on average", "prefill: 2 drops; measured were",
        "after stage 5", "5.90 ms", "113.5 %", "✗", "after stage 7", "101.0 %", "✓",
        "after whole-0.25", "63.9 °C (gpu, hottest of 2)", "battery", "language in prefill", "feed-forward",
        "7.50 ms",  # what the fifth stage was predicted to take
    ):  # fmt: skip
        assert expected in parsed.text, expected
    assert "SECRET" not in parsed.text, "reports are passed on"
    assert [ref for ref in parsed.references if not ref.startswith("#")] == []


def test_section_is_the_same_every_time(on_device: Path, tmp_path: Path) -> None:
    first, second = (write_report(on_device, out=tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_a_device_that_was_not_attached(on_device: Path) -> None:
    change(
        on_device / "metrics.json",
        measured=[],
        device=DEVICE | {"held_out": {"n": 0, "mape": None, "within_10pct": None}},
    )
    text = read(write_report(on_device)).text
    assert "was not measured on the device" in text and "after stage 5" not in text
    assert "nothing is known of the errors" in text


def test_measured_costs_that_tell_of_no_device(folder: Path) -> None:  # noqa: F811
    change(folder / "metrics.json", measured=MEASURED)
    assert "On the device" not in read(write_report(folder)).text


def test_hostile_names_are_text(on_device: Path) -> None:
    value = copy.deepcopy(DEVICE)
    value["device"]["name"] = value["settings"]["agent"] = value["warnings"][0] = HOSTILE
    value["conditions"][0] |= {"when": HOSTILE, "missing": [HOSTILE], "temperatures": [{"name": HOSTILE, "celsius": 1}]}
    value["methods"]["dense"] = {HOSTILE: 1.0}
    value["layers"]["dense"] = [layer(HOSTILE, HOSTILE, 0, 0.5, 0.0, 0.0)]
    change(on_device / "metrics.json", device=value)
    parsed = read(write_report(on_device))
    assert "script" not in parsed.tags and "img" not in parsed.tags
    assert parsed.text.count(HOSTILE) >= 6


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("device", []),
        ("device.device", {}),
        ("device.device.cores", -1),
        ("device.settings.threads", "many"),
        ("device.conditions", [{"temperatures": [{"name": "a"}]}]),
        ("device.conditions", [{"time": 1e300}]),
        ("device.held_out.mape", math.nan),
        ("device.warnings", [1]),
        ("device.predicted_ms.dense", 0),
        ("device.uncertainty_ms", -1),
        ("device.methods.pruned", {"prefill": math.inf}),
        ("device.layers.dense", [layer("prefill", "language", -1, 1.0, 1.0, 0.0)]),
        ("device.layers.dense", [layer("prefill", "language", 10**9, 1.0, 1.0, 0.0)]),
        ("measured", [{"stage": 1, "predicted": 5.0}]),
        ("measured", [{"stage": 1, "predicted": 5.0, "measured": 0}]),
    ],
)
def test_malformed_values_are_named(on_device: Path, place: str, value: Any) -> None:
    metrics = json.loads((on_device / "metrics.json").read_text())
    *parents, last = place.split(".")
    part = metrics
    for name in parents:
        part = part[name]
    part[last] = value
    (on_device / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(InputError) as caught:
        write_report(on_device)
    assert "metrics.json" in str(caught.value) and place in str(caught.value)
    assert not (on_device / "report.html").exists()


def test_a_stage_that_takes_less_than_nothing(on_device: Path) -> None:
    (on_device / "trace.jsonl").write_text(json.dumps(stage(1, predicted_ms=-1)))
    with pytest.raises(InputError, match="line 1: predicted_ms"):
        write_report(on_device)


# ---- words


def test_what_is_not_known_is_not_said() -> None:
    measured = Settings(preset="report", agent="python", runtime="executorch 1.5.1", threads=1)
    terms = dict(described(Hardware(name="phone"), measured))
    assert terms == {
        "device": "phone", "runtime": "executorch 1.5.1", "measured by": "python agent, preset report", "threads": "1",
        "clocks": "left as they were",
    }  # fmt: skip
    assert compared([Conditions()]).rows == []


def test_conditions_side_by_side() -> None:
    begin = Conditions(when="begin", battery={"percent": 90, "status": "charging", "plugged": True}, throttle_events=0)
    jetson = {
        "temperatures": [{"name": "CPU@", "celsius": -1.5}],
        "rails": {"VDD_IN": {"now_mw": 5210}},
        "gpu_mhz": [612],
    }
    end = Conditions.model_validate(
        CONDITIONS | {"temperatures": [], "tegrastats": jetson, "thermal_status": 2, "power_mode": {"name": "MAXN"}}
    )
    table = compared([begin, end])
    assert table.columns == ["begin", "after whole-0.25"]
    assert dict(table.rows) == {
        "battery": ["90 %, charging, plugged in", ""], "throttled since boot": ["0 times", ""],
        "time": ["", "2026-01-01 00:00:00 UTC"], "cores online": ["", "4 of 8"],
        "load over 1, 5, 15 minutes": ["", "0.50, 0.25, 0.10"], "clock of policy0": ["", "schedutil, 1.80 of 2.40 GHz"],
        "power mode": ["", "MAXN"], "clock of the GPU": ["", "612 MHz"], "temperature": ["", "\u22121.5 °C (CPU@)"],
        "cooling at work": ["", "cpufreq-0"], "thermal status": ["", "2 of 6"], "power": ["", "VDD_IN 5.21 W"],
        "not readable": ["", "battery"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("budget", "target"),
    [({"latency_ms": 4.5}, 4.5), ({"speedup": 2.5}, 4.0), ({"macs": 0.3}, None), ({"latency_ms": HOSTILE}, None)],
)
def test_target(made: Path, budget: dict[str, Any], target: float | None) -> None:  # noqa: F811
    plan = Plan.load(made).model_copy(update={"budget": budget})
    assert target_of(plan, 10.0) == target


def test_milliseconds() -> None:
    assert [words.milliseconds(v) for v in (0.0421, 5.128, 48.21, 1234.5)] == [
        "0.042 ms",
        "5.13 ms",
        "48.2 ms",
        "1234 ms",
    ]
    assert words.milliseconds(5.128, 0.2149) == "5.13 ± 0.21 ms"
    assert words.ending("a/b/c/d", 5) == "\u2026/c/d" and words.ending("a/b", 5) == "a/b"


# ---- pictures

ms = st.floats(0, 100, allow_subnormal=False)
rows = st.builds(LayerTime, method=st.just("m"), stream=st.sampled_from(["vision", "cross", "other"]),
                 layer=st.integers(0, 40), attention=ms, ffn=ms, drop=ms)  # fmt: skip


@settings(max_examples=25)
@given(st.lists(rows, max_size=12), st.floats(1, 50))
def test_bars_of_a_method_add_up(layers: list[LayerTime], outside: float) -> None:
    """Whatever the layers leave is shown as well, so that a bar is as long as the method takes."""
    inside = sum(row.attention + row.ffn + row.drop for row in layers)
    with theme.style():
        figure = times.method_figure({"dense": {"m": inside + outside}}, {"dense": layers})
    (axes,) = figure.axes
    bars = axes.patches
    assert sum(bar.get_width() for bar in bars) == pytest.approx(inside + outside)
    assert max(bar.get_x() + bar.get_width() for bar in bars) == pytest.approx(inside + outside)


def test_layers_stand_above_each_other_on_one_scale() -> None:
    models = {name: [LayerTime.model_validate(row) for row in DEVICE["layers"][name]] for name in ("dense", "pruned")}
    assert times.runs(models) == [Run("prefill", "language"), Run("decode", "language")]
    with theme.style():
        figure = times.layer_figure(models, Run("prefill", "language"))
    dense, pruned = figure.axes
    assert dense.get_ylim() == pruned.get_ylim() and dense.get_ylim()[1] > 5.0
    assert [sum(bar.get_height() for bar in axes.patches) for axes in figure.axes] == [5.0, 1.75]
    assert dense.get_title(loc="left") == "dense, 5.00 ms" and pruned.get_title(loc="left") == "pruned, 1.75 ms"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["attention", "feed-forward", "drop of tokens"]
    with theme.style():
        figure = times.layer_figure(models, Run("decode", "language"))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["attention", "feed-forward"]
