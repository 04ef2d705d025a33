"""Profiling on a device that is a formula: what is measured, saved, taken up again and refused."""

import json

import pytest

import devices.lowering
import devices.sitting
from devices.agent.protocol import Job
from devices.errors import DeviceError, DeviceGone
from devices.latency import LatencyModel
from devices.points import choose_points
from devices.profiles import Profile
from devices.profiling import doubts, profile
from devices.programs import Program, Subject
from tests.devices.simulated import ANCHOR, SimulatedAgent, SimulatedDevice


@pytest.fixture(scope="module")
def subject():
    return Subject.of("clip-digits")


@pytest.fixture
def lowered(monkeypatch):
    """Lowering, which takes seconds, replaced: an empty program whose folder says which point it is."""
    found = []

    def write_programs(subject, plan, folder, *, layers=None, methods=(), form):
        folder.mkdir()
        name = next(point.id for point in choose_points(subject) if point.plan == plan and point.methods == methods)
        (folder / name).touch()
        found.append(name)
        names = methods or ("image_encoder", "text_encoder")
        return [Program(folder / name, {method: folder / f"{method}.bin" for method in names})]

    monkeypatch.setattr(devices.lowering, "write_programs", write_programs)
    monkeypatch.setattr(devices.sitting, "write_anchor", lambda folder, **options: Job(folder / ANCHOR))
    return found


def device(**options):
    takes = {"image_encoder": 8.0, "text_encoder": 3.0}
    return SimulatedDevice(SimulatedAgent(lambda job, number: takes.get(job.method, 10.0), **options))


def test_every_point_is_measured_and_saved(subject, lowered, tmp_path):
    out, seen = tmp_path / "profile.json", []
    one = device()
    found = profile(one, subject, out=out, on_progress=lambda done, total, text: seen.append((done, total)))
    points = choose_points(subject)
    assert [point.id for point in found.points] == [point.id for point in points] == lowered
    assert Profile.load(out) == found and found.complete
    assert [name for name in one._agent.forgotten if not name.endswith(".bin")] == lowered, (
        "nothing is left on the device"
    )
    assert len(one._agent.forgotten) == len(lowered) + found.measurements, "nor are inputs"
    assert seen[-1] == (len(points), len(points)) and seen == sorted(seen)
    assert found.conditions[0]["when"] == "begin" and len(found.conditions) == 1 + len(points)
    assert all(entry["missing"] == ["cpufreq"] for entry in found.conditions), "what is not there is said"
    assert found.measurements == sum(len(point.methods) for point in found.points) <= 24
    assert doubts(found) == []


def test_a_device_that_goes_away_leaves_what_was_measured_and_the_rest_follows(subject, lowered, tmp_path):
    out = tmp_path / "profile.json"

    def fails(job):
        if job.program.name == "language-1":
            raise DeviceGone("unplugged")

    with pytest.raises(DeviceGone, match="unplugged"):
        profile(device(fails=fails), subject, out=out)
    half = Profile.load(out)
    assert not half.complete and half.points
    before = list(lowered)
    whole = profile(device(), subject, out=out)
    again = lowered[len(before) :]
    assert again[0] == "language-1" and not set(again) & {point.id for point in half.points}
    assert whole.complete and whole.points[: len(half.points)] == half.points
    assert whole.seconds >= half.seconds
    assert [point.id for point in whole.points] == [point.id for point in choose_points(subject)]
    idle = device()
    nothing = profile(idle, subject, out=out)
    assert not idle._agent.installed and nothing.points == whole.points and lowered == before + again, (
        "a complete profile is not measured again"
    )


def test_what_happened_in_the_middle_is_said(subject, lowered):
    """A device that throttled and had cooled down again at the end; each sentence once, and the load is the profile's own."""
    made = profile(device(), subject)

    def at(celsius, load):
        return {"kind": "linux", "cores": 4, "load": [load] * 3, "temperatures": [{"name": "soc", "celsius": celsius}]}

    conditions = (at(40.0, 0.1), at(61.5, 3.0), at(61.5, 3.0), at(40.0, 3.0), at(61.5, 3.0), at(41.0, 3.0))
    assert doubts(made.model_copy(update={"conditions": conditions})) == ["soc rose by 21.5 °C, from 40.0 to 61.5."]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda subject: {"threads": 2}, "threads"),
        (lambda subject: {"preset": "report"}, "preset"),
        (lambda subject: {"model": Subject.of("blip-digits")}, "'blip-digits'"),
        (lambda subject: {"points": choose_points(subject, seed=1)}, "another plan as point"),
        (lambda subject: {"device": SimulatedDevice(SimulatedAgent(lambda job, n: 1.0), name="other")}, "'other'"),
    ],
)
def test_a_profile_of_something_else_is_left_alone(subject, lowered, tmp_path, change, named):
    out = tmp_path / "profile.json"
    profile(device(), subject, out=out)
    before = out.read_bytes()
    given = {"device": device(), "model": subject, "out": out} | change(subject)
    with pytest.raises(DeviceError, match=named):
        profile(**given)
    assert out.read_bytes() == before


def test_it_is_an_error_to_measure_by_an_unknown_preset(subject, tmp_path):
    with pytest.raises(DeviceError, match="'careful'"):
        profile(device(), subject, out=tmp_path / "p.json", preset="careful")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 2}', '{"schema": 1}', "[" * 100_000])
def test_a_file_that_is_no_profile(tmp_path, content):
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(DeviceError, match="profile"):
        LatencyModel.fit(path)
    with pytest.raises(DeviceError, match="does not exist"):
        LatencyModel.fit(tmp_path / "none.json")


def test_each_damaged_value_is_named(subject, lowered, tmp_path):
    out = tmp_path / "profile.json"
    profile(device(), subject, out=out)
    value = json.loads(out.read_text())
    damages = [
        (("points", 0, "methods", "image_encoder", "rounds"), [], "rounds"),
        (("points", 0, "methods", "image_encoder", "rounds"), [[float("nan")]], "rounds"),
        (("points", 0, "methods", "image_encoder", "rounds"), [[-1.0]], "rounds"),
        (("points", 1, "layers", "vision"), 7, "vision"),
        (("points", 1, "plan", "streams", "vision", "tokens"), [1, 2], "tokens"),
        (("settings", "threads"), 0, "threads"),
        (("device", "name"), "x" * 1000, "name"),
        (("surprise",), 1, "surprise"),
    ]
    for path, bad, named in damages:
        damaged = json.loads(json.dumps(value))
        place = damaged
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = bad
        with pytest.raises(DeviceError, match=named):
            Profile.parse(damaged)


def test_the_shipped_schema_is_that_of_the_code():
    from importlib.resources import files

    shipped = json.loads(files("devices").joinpath("profile.schema.json").read_text())
    assert shipped == Profile.model_json_schema(by_alias=True), "write it anew: python -m devices.profiles"
