"""The page of a profile, and pictures of what predictions are worth."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from comp_edge.errors import InputError
from comp_edge.report import theme
from comp_edge.report.latency import OnDevice
from comp_edge.structure import empty_model
from comp_edge.units import dense_plan
from devices.__main__ import main
from devices.bench import Compared, summarize
from devices.errors import DeviceError
from devices.latency import LatencyModel
from devices.loop import DeviceCost
from devices.page import left_out, page_context, predicted, write_page
from devices.pictures import by_driver, latency_png, predicted_against_measured, steered, steered_png
from tests.comp_edge.test_report import HOSTILE, read
from tests.devices.latency_machine import TEXT, Machine, llava_config, make_profile, random_plan

BEGIN = {
    "time": 1_767_225_600.0, "when": "begin", "kind": "linux", "cores": 4, "online": [0, 1, 2, 3], "load": [0.1, 0.1, 0.1],
    "temperatures": [{"name": "soc", "celsius": 40.0}], "missing": ["cpufreq"],
}  # fmt: skip
END = BEGIN | {"when": "after whole-3", "temperatures": [{"name": "soc", "celsius": 61.5}]}
BOARD = {"address": "ssh://me@secret", "name": "Board 5", "cpu": "Cortex-A76", "machine": "aarch64", "cores": 4}


@pytest.fixture(scope="module")
def profile():
    # One that is between the two does not count.
    conditions = [BEGIN, BEGIN | {"when": "after whole-0"}, END]
    return make_profile(llava_config(), Machine, blocks=4, device=BOARD, conditions=conditions)


@pytest.fixture(scope="module")
def latency(profile):
    return LatencyModel.fit(profile).with_decode_tokens(4)


@pytest.fixture(scope="module")
def plan():
    return random_plan(empty_model(llava_config()), np.random.default_rng(5), keep=0.4)


# ---- the page


def test_page(latency, plan, tmp_path):
    path = write_page(latency, {"some/pruned": predicted(latency, plan)}, tmp_path / "new" / "page.html")
    parsed = read(path)
    assert parsed.references == [ref for ref in parsed.references if ref.startswith("#")], "it needs nothing else"
    for expected in (
        "tests on Board 5", "Cortex-A76, aarch64, 4 cores", "24 methods of 12 programs, 60 s in all",
        "soc rose by 21.5 °C, from 40.0 to 61.5.", "whole requests", "some/pruned", "a request decodes 4 further",
        "per million multiply-accumulates of feed-forwards", "Whole models take", "2026-01-01 00:00:00 UTC",
        "after whole-3", "61.5 °C (soc)", "not readable", "cpufreq", "language in decode", "vision in vision_encoder",
        f"{latency.predict(plan):.2f} ± {latency.uncertainty(plan):.2f} ms",
    ):  # fmt: skip
        assert expected in parsed.text, expected
    assert "after whole-0" not in parsed.text and "secret" not in parsed.text
    for point in latency.profile.points:
        assert parsed.text.count(point.id) >= len(point.methods)
    text = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text
    assert text == write_page(latency, {"some/pruned": predicted(latency, plan)}, path).read_text(encoding="utf-8")


def test_without_plans_it_is_about_the_dense_model(latency):
    context = page_context(latency, {})
    dense = dense_plan(empty_model(llava_config()), base="tests", prompt_tokens=TEXT["llava"])
    (request,) = context["requests"]
    assert request["name"] == "dense" and request["ms"].startswith(f"{latency.predict(dense):.2f} ± ")
    # What a unit takes times how many there are is what the model takes, before whole models' own scale.
    spent = sum(float(line["dense"].split()[0]) for line in context["coefficients"][0]["lines"] if line["dense"] != "–")
    method = context["coefficients"][0]["method"]
    assert spent == pytest.approx(latency.parts(dense)[method], rel=0.05)


def test_a_plan_that_was_not_measured_is_said_to_be(latency, plan, tmp_path):
    longer = plan.with_tokens("language", (400,) * 4)
    parsed = read(write_page(latency, {"long": predicted(latency, longer)}, tmp_path / "p.html"))
    assert "Of long, this is outside what was measured" in parsed.text and "measured were" in parsed.text


def test_disturbed_measurements_are_marked(profile, tmp_path):
    value = profile.to_json()
    value["points"][0]["methods"]["decode"] |= {"rejected": 7, "settled": False}
    parsed = read(write_page(LatencyModel.fit(profile.parse(value)), {}, tmp_path / "p.html"))
    assert "7, still disturbed" in parsed.text and "1 measurements were still disturbed" in parsed.text


def test_hostile_names_are_text(profile, plan, tmp_path):
    value = profile.to_json()
    value["device"] |= {"name": HOSTILE, "cpu": HOSTILE, "system": HOSTILE}
    value["model"]["name"], value["settings"]["agent"], value["points"][0]["id"] = HOSTILE, HOSTILE, HOSTILE
    for entry in value["conditions"]:
        entry |= {"when": HOSTILE, "missing": [HOSTILE]}
    latency = LatencyModel.fit(profile.parse(value))
    parsed = read(write_page(latency, {HOSTILE: predicted(latency, plan)}, tmp_path / "p.html"))
    assert "script" not in parsed.tags and "img" not in parsed.tags and parsed.text.count(HOSTILE) >= 8


def test_a_profile_without_sensors(profile, tmp_path):
    bare = profile.parse(profile.to_json() | {"conditions": []})
    assert "Conditions" not in read(write_page(LatencyModel.fit(bare), {}, tmp_path / "p.html")).text


def test_conditions_that_are_none_are_refused(profile, tmp_path):
    wrong = profile.parse(profile.to_json() | {"conditions": [BEGIN | {"temperatures": [{"name": "soc"}]}]})
    with pytest.raises(DeviceError, match="conditions of the profile: temperatures.0.celsius: Field required"):
        write_page(LatencyModel.fit(wrong), {}, tmp_path / "p.html")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written(latency, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        write_page(latency, {}, tmp_path / "file" / "p.html")


def test_command_line(profile, plan, tmp_path, capsys):
    profile.save(tmp_path / "board.json")
    plan.save(tmp_path / "plan.json")
    out = tmp_path / "page.html"
    argv = ["fit", str(tmp_path / "board.json"), "--plan", str(tmp_path / "plan.json"), "--report", str(out), "--json"]
    assert main(argv) == 0
    assert str(tmp_path / "plan.json") in json.loads(capsys.readouterr().out)["plans"]
    assert str(tmp_path / "plan.json") in read(out).text


def test_what_was_left_out(latency):
    found = left_out(latency)
    assert list(found) == list(latency.data)
    for method, rows in found.items():
        assert [row["measured_ms"] for row in rows] == latency.data[method].ms.tolist()
        ours, plain = (
            np.mean([abs(row[name] / row["measured_ms"] - 1) for row in rows])
            for name in ("predicted_ms", "proportional_ms")
        )
        assert ours < 0.05 < plain, "the machine counts more than multiply-accumulates"


def test_what_a_cost_tells_is_what_the_report_reads(profile, plan):
    """The one place where both sides of metrics.json are known."""
    cost = DeviceCost(profile, decode_tokens=2, attached=False)
    dense = dense_plan(empty_model(llava_config()), base="tests", prompt_tokens=TEXT["llava"])
    told = OnDevice.model_validate(json.loads(json.dumps(cost.describe(dense, plan))))
    assert told.device.name == "Board 5" and told.settings.runtime == "tests" and told.decode_tokens == 2
    assert told.predicted_ms.pruned == cost.predict(plan) and told.conditions[-1].when == "after whole-3"
    inside = sum(row.attention + row.ffn + row.drop for row in told.layers.pruned if row.method == "prefill")
    assert 0 < inside < told.methods.pruned["prefill"]


# ---- pictures


def rows_of(*measured: float, **more: Any) -> list[dict[str, float]]:
    return [{"measured_ms": ms, "predicted_ms": 1.1 * ms, **more} for ms in measured]


@pytest.mark.parametrize(
    ("measured", "scale"), [((4.0, 20.0), "linear"), ((4.0, 60.0), "log"), ((3.0,), "linear"), ((), "linear")]
)
def test_axes_are_logarithmic_where_the_range_is_wide(measured, scale):
    with theme.style():
        (axes,) = predicted_against_measured(rows_of(*measured)).axes
    assert axes.get_xscale() == axes.get_yscale() == scale
    assert axes.get_xlim() == axes.get_ylim(), "the diagonal is where predictions are right"


def test_errors_and_error_bars_are_shown():
    def labels(rows):
        with theme.style():
            (axes,) = predicted_against_measured(rows).axes
        (bars,) = axes.containers
        return [text.get_text() for text in axes.get_legend().get_texts()], bars

    names, bars = labels(rows_of(5.0, 6.0))
    assert names == ["within 10 %", "predicted, off by 10.0 %"] and not (bars.has_xerr or bars.has_yerr)
    names, bars = labels(rows_of(5.0, 6.0, uncertainty_ms=0.2, proportional_ms=5.5))
    assert names[1].startswith("in proportion to MACs, off by 9.2 %") and bars.has_yerr and not bars.has_xerr
    (vertical,) = bars.lines[2]
    assert [np.ptp(segment[:, 1]) for segment in vertical.get_segments()] == pytest.approx([0.4, 0.4])


def test_the_picture_of_a_benchmark(latency, plan):
    rows = [
        Compared(plan, macs=ms, measured=ms, predicted=1.02 * ms, proportional=0.8 * ms, uncertainty=0.1, dense=70.0)
        for ms in (2.0, 4.0, 60.0)
    ]
    results = json.loads(json.dumps(summarize({"a": (latency, rows), "b": (latency, rows)})))
    with Image.open(io.BytesIO(latency_png(results))) as image:
        assert image.format == "PNG" and image.width > 1.9 * image.height, "two panels"


def steering(driver: str, seed: int, budget: float, ms: float | None, score: float) -> dict[str, Any]:
    return {"seed": seed, "driven_by": driver, "budget_ms": budget, "measured_ms": ms, "score": score}


STEERED = [
    steering("latency", 0, 8.0, 7.8, 0.8), steering("latency", 1, 8.0, 8.0, 0.9), steering("latency", 0, 4.0, 4.0, 0.5),
    steering("macs", 0, 8.0, 8.0, 0.7), steering("macs", 1, 8.0, None, 0.1), steering("macs", 0, 4.0, 4.1, 0.4),
]  # fmt: skip


def test_what_each_way_to_steer_reached():
    found = by_driver(STEERED)
    tight, loose = found["latency"]
    assert tight == (4.0, 4.0, 0.0, 0.5, 0.0, 1)
    assert loose == pytest.approx((8.0, 7.9, math.sqrt(0.02), 0.85, math.sqrt(0.005), 2))
    assert [one.count for one in found["macs"]] == [1, 1], "a pass that was not measured does not count"
    assert by_driver([]) == {"macs": [], "latency": []}


@settings(max_examples=30)
@given(st.permutations(STEERED))
def test_the_order_of_passes_does_not_matter(rows):
    assert json.dumps(by_driver(rows)) == json.dumps(by_driver(STEERED))


def test_lines_of_both_ways_to_steer():
    with theme.style():
        figure = steered(STEERED)
    (axes,) = figure.axes
    lines = {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in axes.containers}
    assert lines == {
        "driven by MACs": [[4.1, 0.4], [8.0, 0.7]],
        "driven by predicted latency": [[4.0, 0.5], pytest.approx([7.9, 0.85])],
    }
    assert {text.get_text() for text in axes.texts} == {"budget 4.00 ms", "budget 8.00 ms"}
    with Image.open(io.BytesIO(steered_png(STEERED[:1]))) as image:
        assert image.format == "PNG" and np.asarray(image.convert("L")).std() > 5
