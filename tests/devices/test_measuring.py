"""Rounds, anchors, and what becomes of disturbed rounds."""

from pathlib import Path

import pytest

from devices.agent.protocol import Job
from devices.errors import DeviceError
from devices.measuring import PRESETS, Drift, Preset, Stopwatch, measure, preset_named
from tests.devices.simulated import ANCHOR, SimulatedAgent

THREE = Preset("three", rounds=3, iterations=4, min_seconds=0.0, patience=0.5)
ANCHOR_JOB = Job(Path(ANCHOR), iterations=5)
JOBS = {"fast": Job(Path("a.pte"), "fast"), "slow": Job(Path("a.pte"), "slow")}


def take(agent, preset=THREE, drift=None):
    return measure(agent, JOBS, anchor=ANCHOR_JOB, preset=preset, drift=drift or Drift())


def test_jobs_take_turns_between_anchors():
    agent = SimulatedAgent(lambda job, number: {"fast": 1.0, "slow": 7.0}[job.method])
    found = take(agent)
    turn = [ANCHOR, "a.pte", "a.pte"]
    assert [job.program.name for job in agent.jobs] == turn * 3 + [ANCHOR]
    assert [job.method for job in agent.jobs if job.program.name != ANCHOR] == ["fast", "slow"] * 3
    assert found["fast"].steady == 1.0 and found["slow"].steady == 7.0
    assert found["slow"].rejected == 0 and found["slow"].settled and len(found["slow"].rounds) == 3
    calls = sum(job.iterations for job in agent.jobs if job.method == "slow")
    assert found["slow"].taken_ms == 7.0 * calls + 3 * (1.0 + 14.0), (
        "each round loads, and warms up with a call that takes twice as long"
    )
    assert found["slow"].peak_rss_kb > 1000 and found["slow"].first_ms == 14.0


def test_a_disturbed_round_is_repeated():
    # The second and the third anchor see a device that something else keeps busy; a third of all calls take twice as long.
    busy = (2, 3)
    agent = SimulatedAgent(
        lambda job, number: 2.0 if number // 2 in (1, 2, 3) else 1.0,
        anchor=lambda number: 12.0 if number in busy else 10.0,
    )
    found = take(agent)
    assert found["fast"].steady == 1.0, "only quiet rounds count"
    assert found["fast"].rejected == 3 and found["fast"].settled
    assert all(anchor == 10.0 for anchor in found["fast"].anchor_ms)


def test_a_device_that_never_settles_is_measured_all_the_same_and_says_so():
    agent = SimulatedAgent(lambda job, number: 1.0, anchor=lambda number: 10.0 + 3.0 * (number % 2))
    found = take(agent)
    assert not found["fast"].settled and len(found["fast"].rounds) == 3
    assert 3 < found["fast"].rejected < 20 and found["fast"].disturbed


def test_a_disturbance_that_no_anchor_sees():
    # Four rounds of five are slow between anchors that are quick; then all are as the first.
    agent = SimulatedAgent(lambda job, number: 1.5 if 2 <= number < 10 else 1.0)
    found = take(agent, Preset("five", rounds=5, iterations=4, min_seconds=0.0, patience=0.5))
    assert found["fast"].settled and found["fast"].steady == 1.0
    assert len(found["fast"].rounds) == 7, "until three of the fastest agree"


def test_only_calls_beside_quiet_beats_count():
    # Every second call is slowed, and so is the beat behind it, which is the one before the call that follows: one of four.
    agent = SimulatedAgent(lambda job, number: 4.0, slow=lambda number, call: 1.6 if call % 4 in (1, 2) else 1.0)
    found = take(agent)
    assert found["fast"].rounds == ((4.0,),) * 3 and found["fast"].settled and found["fast"].rejected == 0


def test_percentiles_are_of_all_calls():
    """A device that throttles does so to whoever uses it: what the filter leaves out is in the tail."""
    agent = SimulatedAgent(lambda job, number: 4.0, slow=lambda number, call: 2.0 if call >= 60 else 1.0)
    found = take(agent, Preset("long", rounds=3, iterations=64, min_seconds=0.0, patience=0.5))["fast"]
    assert found.steady == 4.0 and found.noise == 0.0 and found.settled
    assert found.percentile(50) == 4.0 and found.percentile(99) == 8.0
    assert len(found.samples) == sum(job.iterations for job in agent.jobs if job.method == "fast")


def test_calls_of_seconds_are_few():
    """The calls of a round fit into a second, or are one; the first round says how long they take."""
    agent = SimulatedAgent(lambda job, number: {"fast": 300.0, "slow": 3000.0}[job.method])
    found = take(agent, PRESETS["quick"])
    assert [len(samples) for samples in found["fast"].rounds] == [1, 3, 3, 3, 3]
    assert [len(samples) for samples in found["slow"].rounds] == [1] * 5 and found["slow"].settled


def test_patience_alone_ends_it():
    """Calls of three seconds, always disturbed: five rounds, and no further ones."""
    agent = SimulatedAgent(lambda job, number: 3000.0, slow=lambda number, call: 1.5 + number / 100)
    found = take(agent, PRESETS["quick"], Drift(anchors=[10.0] * 20, beats=[1.0] * 1000))
    assert not found["slow"].settled and found["slow"].rejected == 5


def test_a_round_without_a_quiet_call_is_repeated():
    agent = SimulatedAgent(lambda job, number: 4.0, slow=lambda number, call: 2.0 if 2 <= number < 6 else 1.0)
    found = take(agent)
    assert found["fast"].rejected == 2 and found["slow"].rejected == 2 and found["slow"].settled
    assert all(set(samples) == {4.0} for samples in found["slow"].rounds)


def test_a_job_that_has_settled_is_not_run_again():
    agent = SimulatedAgent(lambda job, number: 4.0, slow=lambda number, call: 2.0 if number in (1, 3) else 1.0)
    found = take(agent)
    assert found["slow"].rejected == 2 and found["slow"].settled
    assert [job.method for job in agent.jobs if job.program.name != ANCHOR] == ["fast", "slow"] * 3 + ["slow"] * 2


def test_an_anchor_without_a_quiet_call_says_nothing():
    drift = Drift(anchors=[10.0] * 4)
    assert not drift.disturbed(None, None) and not drift.disturbed(None, 10.2) and drift.disturbed(None, 11.0)


def test_calls_that_never_agree():
    agent = SimulatedAgent(lambda job, number: 1.1**number)
    found = take(agent)
    assert not found["fast"].settled and found["fast"].rejected == 0
    assert 3 < len(found["fast"].rounds) < 20, "until there is no patience left"


def test_patience_waits_for_a_quiet_moment():
    # After a first quiet round the machine, which is quiet as a rule, is busy for thirteen others of half a second.
    agent = SimulatedAgent(
        lambda job, number: 1.5 if 2 <= number < 28 else 1.0, anchor=lambda number: 15.0 if 1 < number <= 13 else 10.0
    )
    patient = Preset("patient", rounds=3, iterations=4, min_seconds=0.25, patience=10.0)
    found = take(agent, patient, Drift(anchors=[10.0] * 20))
    assert found["fast"].settled and found["fast"].steady == 1.0 and found["fast"].rejected == 13


def test_the_anchors_usual_time_outlives_a_measurement():
    drift = Drift()
    take(SimulatedAgent(lambda job, number: 1.0), drift=drift)
    later = take(SimulatedAgent(lambda job, number: 2.0, anchor=lambda number: 14.0), drift=drift)
    assert not later["fast"].settled, "throttled since: seen by the anchor of before"


def test_a_report_goes_on_until_there_are_samples_enough_or_time_enough():
    short = take(SimulatedAgent(lambda job, number: 0.5), PRESETS["report"])
    assert all(len(found.samples) >= 1024 for found in short.values())
    long = take(SimulatedAgent(lambda job, number: 400.0), PRESETS["report"])
    assert all(sum(found.samples) >= 60_000 or len(found.samples) >= 1024 for found in long.values())


def test_a_failing_job_stops_the_measurement():
    def fails(job):
        if job.method == "slow":
            raise DeviceError("no such operator on the device")

    with pytest.raises(DeviceError, match="no such operator"):
        take(SimulatedAgent(lambda job, number: 1.0, fails=fails))


def test_the_stopwatch_counts_what_the_device_does_and_nothing_else():
    times = iter([0.0, 1.5, 10.0, 10.25, 20.0, 21.0])
    watch = Stopwatch(SimulatedAgent(lambda job, number: 1.0), clock=lambda: next(times))
    for _ in range(2):
        watch.run(ANCHOR_JOB, timeout=1.0)
    with watch.running():
        pass
    assert watch.seconds == 2.75


def test_an_unknown_preset_is_named():
    with pytest.raises(DeviceError, match="'fast'.*quick, report"):
        preset_named("fast")
