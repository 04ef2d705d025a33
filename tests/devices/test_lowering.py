"""Programs lowered ahead by several processes: the same as by one, and what is left when one is killed."""

import os

import pytest

from comp_edge.plan import Plan
from devices.errors import DeviceError
from devices.lowering import Wanted, lowered_ahead
from devices.points import choose_points
from devices.programs import Subject


@pytest.fixture(scope="module")
def subject():
    return Subject.of("clip-digits")


@pytest.fixture(scope="module")
def wanted(subject):
    """Two small programs: the text encoder's blocks."""
    return [point.wanted for point in choose_points(subject) if point.id.startswith("language")][:2]


def contents(subject, wanted, folder, jobs):
    found = []
    with lowered_ahead(subject, wanted, folder, form="pte", jobs=jobs) as each:
        for (program,) in each:
            found.append(program.path.read_bytes())
            assert list(program.inputs) == ["text_encoder"]
            before = program.path
    assert not before.exists() and not list(folder.iterdir())
    return found


@pytest.mark.slow
def test_two_processes_write_what_one_writes(subject, wanted, tmp_path):
    one, two = (contents(subject, wanted, tmp_path, jobs) for jobs in (1, 2))
    assert one == two and len(set(one)) == 2


class Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (9,)


@pytest.mark.slow
def test_a_process_that_is_killed(subject, wanted, tmp_path):
    deadly = [Wanted(Plan.model_construct(), layers=Deadly())] * 2
    with pytest.raises(DeviceError, match="one of 2 processes that lower programs was killed.*fewer with --jobs"):
        contents(subject, deadly, tmp_path, 2)
