"""Timing in turns, with a clock that the test moves."""

import pytest

from devices.timing import Timing, interleave, percentile


class Clock:
    """Seconds that pass only when `spend` says so; the anchor's own calls cost `anchor` each."""

    def __init__(self):
        self.now = 0.0
        self.slow = False
        self.reads = 0

    def __call__(self):
        # Every reading moves time a little, so that the anchor has a duration.
        self.reads += 1
        self.now += 0.002 if self.slow else 0.001
        return self.now

    def spend(self, seconds):
        self.now += seconds


def test_percentiles_are_nearest_rank():
    ordered = list(range(1, 101))
    assert [percentile(ordered, p) for p in (50, 90, 99)] == [50, 90, 99]
    assert percentile([7.0], 50) == 7.0


def test_summary():
    timing = Timing.of([[3.0, 9.0], [1.0, 2.0], [4.0, 5.0]])
    assert (timing.steady, timing.p50, timing.min, timing.mean, timing.calls) == (3.0, 3.0, 1.0, 4.0, 6)


def test_subjects_take_turns():
    clock, order = Clock(), []

    def subject(name, seconds):
        def run():
            order.append(name)
            clock.spend(seconds)

        return run

    result = interleave({"a": subject("a", 0.010), "b": subject("b", 0.030)}, rounds=3, calls=2, warmup=1, clock=clock)
    # One warm-up each, then per round one call that is not counted and two that are.
    assert "".join(order) == "ab" + "aaabbb" * 3
    assert result["a"].p50 == pytest.approx(11.0) and result["b"].p50 == pytest.approx(31.0)
    assert (result["a"].calls, result["a"].rounds, result["a"].rejected) == (6, 3, 0)


def test_disturbed_rounds_are_left_out():
    clock, calls = Clock(), []

    def run():
        calls.append(1)
        # The third round is disturbed: the work is slower, and so is the anchor after it.
        clock.slow = 8 <= len(calls) < 11
        clock.spend(0.1 if clock.slow else 0.01)

    result = interleave({"a": run}, rounds=6, calls=2, warmup=1, clock=clock)["a"]
    assert 1 <= result.rejected <= 2
    assert result.p99 < 50


def test_a_machine_that_is_never_quiet_still_gives_numbers():
    clock = Clock()
    level = iter(range(1, 1000))
    result = interleave(
        {"a": lambda: clock.spend(next(level))}, rounds=4, calls=1, clock=lambda: clock.now + next(level)
    )
    assert result["a"].rounds == 4 and result["a"].rejected == 0


def test_bad_numbers():
    with pytest.raises(ValueError, match="rounds 0"):
        interleave({}, rounds=0)
