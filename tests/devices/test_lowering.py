"""Programs lowered ahead by several processes: the same as by one, and what is left when one is killed."""

import threading
import time

import psutil
import pytest

from devices.errors import DeviceError
from devices.lowering import lowered_ahead
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


def kill_a_worker(known):
    """Kill one of the two processes that this one starts for work, as the kernel does when memory ends.

    When both are there: Python's pool waits for ever for one that it starts after it has seen that another one is dead.
    """
    while True:
        children = [child for child in psutil.Process().children() if child not in known]
        workers = [child for child in children if any("spawn_main" in word for word in child.cmdline())]
        if len(workers) == 2:
            time.sleep(0.5)  # so that the pool knows of both
            workers[0].kill()
            return
        time.sleep(0.01)


def test_a_process_that_is_killed(subject, wanted, tmp_path):
    killer = threading.Thread(target=kill_a_worker, args=(psutil.Process().children(),), daemon=True)
    killer.start()
    with pytest.raises(DeviceError, match="one of 2 processes that lower programs was killed.*fewer with --jobs"):
        contents(subject, wanted, tmp_path, 2)
    killer.join(timeout=60)
