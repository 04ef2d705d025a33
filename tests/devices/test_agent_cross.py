"""The agent for aarch64: built here, run under qemu, brought to a real sshd and a real adbd. Correctness only, no latency."""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from pathlib import Path

import agent_programs
import pytest
from real_adbd import phone, run_inside
from real_sshd import board

from devices.agent import Answer, Job, NativeAgent
from devices.agent.build import build, requirements
from devices.errors import DeviceError
from devices.transports import AdbTransport, HostTransport, SshTransport, Transport

TIMEOUT = 300
SYSROOT = Path("/usr/aarch64-linux-gnu")  # of Debian's cross compiler
QEMU = ("qemu-aarch64", "-cpu", "cortex-a76")
INSIDE_SECONDS = 600
JOBS = {
    "mixed": Job(Path("mixed.pte"), inputs=Path("mixed.bin"), iterations=3),
    "made up": Job(Path("mixed.pte"), method="again", iterations=1, threads=2),
    "narrow": Job(Path("narrow.pte"), iterations=1),
    "shared": Job(Path("shared.pte"), method="read", iterations=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs, and in `built` the agents."""
    for program, package in ((QEMU[0], "qemu-user"), ("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} here (Debian: apt-get install {package})")
    made = tmp_path_factory.mktemp("cross")
    try:
        build("aarch64", cache=made / "built")
    except DeviceError as error:
        if "cannot be downloaded" not in str(error):
            raise
        pytest.skip(str(error))
    for name in ("mixed", "shared", "narrow"):
        agent_programs.write_program(made, name)
    (made / "mixed.bin").write_bytes(agent_programs.raw(agent_programs.mixed_inputs()))
    return made


def run_all(transport: Transport, folder: Path, *, launcher: tuple[str, ...], machine: str | None) -> dict[str, Answer]:
    with transport.workspace() as workspace:
        agent = NativeAgent(transport, workspace, machine=machine, launcher=launcher, cache=folder / "built")
        agent.install()
        answers = {}
        for name, job in JOBS.items():
            inputs = job.inputs and folder / job.inputs
            fields = vars(job) | {"program": folder / job.program, "inputs": inputs}
            answers[name] = agent.run(Job(**fields), timeout=TIMEOUT)
        return answers


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Answer]:
    """What this machine's own agent says."""
    return run_all(HostTransport(), folder, launcher=(), machine=None)


def check_same(answers: dict[str, Answer], expected: dict[str, Answer]) -> None:
    assert answers.keys() == expected.keys() == JOBS.keys()
    for name, wanted in expected.items():
        for found, reference in zip(answers[name].outputs, wanted.outputs, strict=True):
            assert found.shape == reference.shape and reference.abs > 0
            assert found.abs == pytest.approx(reference.abs, rel=1e-4)
            assert found.sum == pytest.approx(reference.sum, abs=1e-4 * reference.abs)


@pytest.mark.slow
def test_aarch64_with_the_libraries_of_the_device(folder, expected):
    check_same(run_all(HostTransport(), folder, launcher=(*QEMU, "-L", str(SYSROOT)), machine="aarch64"), expected)


@pytest.mark.slow
def test_aarch64_with_the_libraries_that_are_brought_along(folder, expected):
    """There is no loader for aarch64 here, as on Android."""
    if Path("/lib/ld-linux-aarch64.so.1").exists():
        pytest.skip("this machine has libraries for aarch64")
    check_same(run_all(HostTransport(), folder, launcher=QEMU, machine="aarch64"), expected)


@pytest.mark.slow
def test_aarch64_without_an_emulator(folder):
    done = HostTransport().run([f"{build('aarch64', cache=folder / 'built')}/agent", "--version"])
    if done.exit_code == 0:
        pytest.skip("this machine runs programs for aarch64")
    transport = HostTransport()
    with transport.workspace() as place, pytest.raises(DeviceError, match="agent for aarch64 does not run on host"):
        NativeAgent(transport, place, machine="aarch64", cache=folder / "built").install()


@pytest.mark.slow
def test_what_old_boards_need(folder):
    """JetPack 5 has glibc 2.31: the agent itself needs a newer one there, ExecuTorch's libraries do not."""
    built = build("aarch64", cache=folder / "built")
    needed = {name: tuple(map(int, version.split("."))) for name, version in requirements(built).items()}
    assert (2, 17) <= needed["GLIBC"] < (3,) and needed["GLIBCXX"] <= (3, 4, 30)
    assert {path.name for path in (built / "system").iterdir()} >= {
        "ld-linux-aarch64.so.1",
        "libc.so.6",
        "libstdc++.so.6",
    }


@pytest.mark.slow
def test_through_a_real_sshd(folder, expected, tmp_path):
    (tmp_path / "board").mkdir()
    with board(tmp_path / "board") as running_board:
        transport = SshTransport(running_board.address, options=running_board.options)
        try:
            check_same(run_all(transport, folder, launcher=QEMU, machine="aarch64"), expected)
            check_same(run_all(transport, folder, launcher=(), machine=None), expected)
        finally:
            transport.close()


@pytest.mark.slow
def test_through_a_real_adbd(folder, expected):
    found = run_inside(Path(__file__), folder, timeout=INSIDE_SECONDS)
    assert found["error"] is None, found["error"]
    check_same({name: Answer.model_validate(answer) for name, answer in found["answers"].items()}, expected)


def play(folder: Path) -> None:
    """What happens inside, where the phone is."""
    result: dict[str, object] = {"error": None}
    try:
        with phone(folder) as device:
            answers = run_all(AdbTransport(device.address), folder, launcher=QEMU, machine="aarch64")
            result["answers"] = {
                name: answer.model_dump(mode="json", by_alias=True) for name, answer in answers.items()
            }
    except BaseException:
        result["error"] = traceback.format_exc()
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    play(Path(sys.argv[1]))
