"""The pruner's cost: predicted from a profile, measured where the device is attached."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

import devices.loop
import devices.lowering
import devices.sitting
from comp_edge.correction import Described, Measurable
from comp_edge.cost import Cost, MacsCost
from comp_edge.errors import InputError
from comp_edge.structure import empty_model
from comp_edge.units import dense_plan
from devices.agent.protocol import Job
from devices.bench import Compared, ms_per_mac, summarize, whole_requests
from devices.bench_budget import _Bench
from devices.bench_budget import summarize as summarize_budgets
from devices.errors import DeviceError, DeviceGone
from devices.loop import DeviceCost, cost_of
from devices.profiles import Point
from devices.programs import Program
from tests.devices.latency_machine import RATE, TEXT, Machine, clip_config, llava_config, make_profile
from tests.devices.simulated import ANCHOR, SimulatedAgent, SimulatedDevice


@pytest.fixture(scope="module")
def profile():
    made = make_profile(llava_config(), Machine, blocks=4)
    return made.model_copy(
        update={
            "device": SimulatedDevice(SimulatedAgent(lambda job, number: 1.0)).info(),
            "model": made.model.model_copy(update={"name": "llava-digits"}),
            "settings": made.settings.model_copy(update={"runtime": "formula 1"}),
        }
    )


@pytest.fixture(scope="module")
def model():
    return empty_model(llava_config())


@pytest.fixture(scope="module")
def dense(model):
    return dense_plan(model, base="tests", prompt_tokens=TEXT["llava"])


@pytest.fixture
def attached(monkeypatch, model):
    """A device on which every plan takes 1.3 times what the machine behind the profile takes."""
    machine, plans = Machine(model, noise=0.0), []

    def takes(job: Job, number: int) -> float:
        return 1.3 * machine.ms(plans[-1])[job.method]

    device = SimulatedDevice(SimulatedAgent(takes))

    @contextmanager
    def connect(address: str):
        assert address == "host"
        yield device

    def write(subject, plan, folder, *, layers, methods, form):
        assert layers is None and subject.config.to_dict() == model.config.to_dict()
        plans.append(plan)
        return [Program(folder / "model.pte", {name: Path("none.bin") for name in machine.ms(plan)})]

    monkeypatch.setattr(devices.loop, "connect", connect)
    monkeypatch.setattr(devices.lowering, "write_programs", write)
    monkeypatch.setattr(devices.sitting, "write_anchor", lambda folder, **options: Job(folder / ANCHOR))
    return device


def test_it_predicts_measures_and_describes(profile, dense, attached):
    cost = DeviceCost(profile, decode_tokens=8)
    assert isinstance(cost, Cost) and isinstance(cost, Measurable) and isinstance(cost, Described)
    assert cost.predict(dense) == cost.model.predict(dense)
    measured = cost.measure(dense)
    assert measured == pytest.approx(1.3 * cost.predict(dense), rel=0.05), (
        "decode counts eight times, as in predictions"
    )
    told = json.loads(json.dumps(cost.describe(dense, dense)))
    assert told["measured"][0]["ms"] == measured and told["predicted_ms"]["dense"] == cost.predict(dense)
    assert {row["stream"] for row in told["layers"]["pruned"]} == {"vision", "language"}
    assert told["device"]["name"] == profile.device.name and told["decode_tokens"] == 8


def test_a_device_that_has_gone_is_not_asked_again(profile, dense, monkeypatch):
    asked = []

    def connect(address: str):
        asked.append(address)
        raise DeviceGone("unplugged")

    monkeypatch.setattr(devices.loop, "connect", connect)
    cost = DeviceCost(profile)
    assert cost.measure(dense) is None and cost.measure(dense) is None and len(asked) == 1
    assert "unplugged" in cost.describe(dense, dense)["warnings"][0]
    assert DeviceCost(profile, attached=False).measure(dense) is None and len(asked) == 1


def test_a_program_that_fails_there_is_the_users_error(profile, dense, attached):
    def fails(job):
        raise DeviceError("no operator aten::sort.values on the device.")

    attached._agent.fails = fails
    with pytest.raises(InputError, match="aten::sort"):
        DeviceCost(profile).measure(dense)


@pytest.mark.parametrize(
    ("there", "settings", "said"),
    [
        ({"cores": 8}, {}, "host is not asked.*: cores is 8 there, and 2 in the profile"),
        ({}, {"runtime": "formula 2"}, "it runs 'formula 1', the profile was measured with 'formula 2'"),
        ({}, {"clocks_set": True}, "measured with fixed clocks"),
    ],
)
def test_another_device_than_the_profiles_is_not_asked(
    profile, model, dense, attached, tmp_path, capsys, there, settings, said
):
    """A profile that was copied to another machine: what that one takes says nothing of the profile's device."""
    for name, value in there.items():
        setattr(attached, name, value)
    changed = {"settings": profile.settings.model_copy(update=settings)}
    profile.model_copy(update=changed).save(tmp_path / "p.json")
    cost = cost_of(str(tmp_path / "p.json"), model=model, decode_tokens=0, attached=True)
    assert re.search(said, capsys.readouterr().err)
    assert cost.measure(dense) is None and not attached._agent.jobs[1:]
    assert re.search(said, cost.describe(dense, dense)["warnings"][0])


def test_a_device_that_cannot_be_asked_is_known_before_the_first_stage(profile, model, attached, monkeypatch, tmp_path):
    profile.save(tmp_path / "p.json")
    options = {"model": model, "decode_tokens": 0, "attached": True}
    assert cost_of(str(tmp_path / "p.json"), **options).attached and attached._agent.jobs

    @contextmanager
    def no_compiler(kind: str = "native"):
        raise DeviceError("there is no compiler g++ here; install it.")
        yield

    monkeypatch.setattr(attached, "agent", no_compiler)
    with pytest.raises(InputError, match=r"no compiler g\+\+ here; install it. Or .* --no-measure"):
        cost_of(str(tmp_path / "p.json"), **options)
    assert not cost_of(str(tmp_path / "p.json"), **options | {"attached": False}).attached


def test_what_the_command_line_asks_for(profile, model, tmp_path):
    path = tmp_path / "p.json"
    profile.save(path)
    options = {"decode_tokens": 2, "attached": False}
    assert cost_of(str(path), model=model, **options).model.decode_tokens == 2
    with pytest.raises(InputError, match="other sizes"):
        cost_of(str(path), model=empty_model(clip_config()), **options)
    with pytest.raises(InputError, match="does not exist"):
        cost_of(str(tmp_path / "none.json"), model=model, **options)


def test_a_plan_of_another_model_is_refused(profile):
    other = empty_model(clip_config())
    with pytest.raises(InputError, match="measured model has"):
        DeviceCost(profile).predict(dense_plan(other, base="x", prompt_tokens=8))


def test_errors_of_a_benchmark(profile, dense):
    cost = DeviceCost(profile).model
    rows = [
        Compared(
            dense, macs=m, measured=float(m), predicted=1.02 * m, proportional=1.2 * m, uncertainty=0.1, dense=10.0
        )
        for m in (2, 4, 6, 8)
    ]
    found = summarize({"a": (cost, rows)})
    assert found["whole_model"]["n"] == 4 and found["whole_model"]["mape"] == pytest.approx(0.02)
    assert found["whole_model"]["within_10pct"] == 1.0 and found["whole_model"]["spearman"] == pytest.approx(1.0)
    # Saved are 8, 6, 4, 2 ms of ten; predictions are off by 0.04, 0.08, 0.12, 0.16.
    assert found["saved_ms"]["median_error"] == pytest.approx((0.08 / 6 + 0.12 / 4) / 2)
    assert found["macs_proportional"]["whole_model"]["mape"] == pytest.approx(0.2)
    assert found["measurements"] == profile.measurements and not found["warnings"]
    rows = [Compared(dense, m, float(m), 1.15 * m, 1.2 * m, 0.1, 10.0) for m in (2, 4)]
    assert "not 2 times better" in summarize({"a": (cost, rows)})["warnings"][0]


def test_macs_alone_are_given_all_whole_models():
    """A dense model that was disturbed is one of five: it does not decide what a MAC takes."""
    made = make_profile(clip_config(), lambda model: Machine(model, plain=True, noise=0.0), whole=5)
    dense = made.points[0].model_dump(mode="json")
    for method in dense["methods"].values():
        method["rounds"] = [[2 * ms for ms in samples] for samples in method["rounds"]]
    slow = made.model_copy(update={"points": (Point(**dense), *made.points[1:])})
    cost, fitted = MacsCost(empty_model(clip_config())), DeviceCost(made).model
    assert ms_per_mac(whole_requests(made, fitted), cost) == pytest.approx(1e-6 / RATE, rel=0.15)
    assert ms_per_mac(whole_requests(slow, fitted), cost) < 1.25 * ms_per_mac(whole_requests(made, fitted), cost)


def test_overhead_is_what_raw_measurements_do_not_take(profile):
    assert profile.overhead is None, "what they took was not counted"
    point = profile.points[0]
    counted = {name: m.model_copy(update={"taken_ms": 1000.0}) for name, m in point.methods.items()}
    one = profile.model_copy(update={"points": (point.model_copy(update={"methods": counted}),), "seconds": 4.5})
    assert one.overhead == pytest.approx(0.5)


def test_a_benchmark_says_what_was_never_quiet(profile, dense):
    rows = [Compared(dense, m, float(m), 1.01 * m, 1.2 * m, 0.1, 10.0, settled=m < 6) for m in (2, 4, 6)]
    (warning,) = summarize({"a": (DeviceCost(profile).model, rows)})["warnings"]
    assert "never quiet enough to measure 1 of 3 plans; the error of the others is 1.0%" in warning


def test_a_budget_benchmark_without_its_device_writes_nothing(profile, dense, tmp_path):
    """A part that was kept without milliseconds would be no part of any later summary."""
    cost = DeviceCost(profile)
    cost._detach("unplugged")
    bench = _Bench("llava-digits", "digit_vqa", cost, tmp_path, steps=None)
    with pytest.raises(InputError, match="unplugged. Attach it and give the same command again"):
        bench._again(SimpleNamespace(metrics={"measured": []}, plan=dense))


def test_pairs_of_a_budget_benchmark():
    parts = [{"kind": "budget", "budget_ms": 10.0, "measured_ms": ms} for ms in (9.9, 10.2, 10.4)]
    for driver, budget, score in (
        ("latency", 4.0, 0.88),
        ("latency", 5.0, 0.92),
        ("macs", 5.0, 0.90),
        ("macs", 4.0, 0.8),
    ):
        parts.append(
            {
                "kind": "steered",
                "driven_by": driver,
                "seed": 1,
                "budget_ms": budget,
                "score": score,
                "measured_ms": budget,
            }
        )
    found = summarize_budgets(parts)
    assert found["budgets"] == {"n": 3, "met": 2, "worst": pytest.approx(1.04)}
    assert found["steered"]["score"] == pytest.approx((0.02 + 0.08) / 2)
    # 0.90 is half way between the two that milliseconds steered: 4.5 ms against 5. Nothing is known of 0.8.
    assert found["steered"]["faster"] == pytest.approx(5.0 / 4.5 - 1) and found["steered"]["faster_error"] is None
    assert found["steered"]["score_error"] == pytest.approx(0.03) and found["steered"]["met"] == {
        "latency": 2,
        "macs": 2,
    }
