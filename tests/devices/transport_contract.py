"""What every transport must do, checked on whatever device is at hand, as long as it is this machine in disguise."""

from __future__ import annotations

import os
import secrets
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devices.errors import DeviceError, DeviceTimeout
from devices.transports import Transport
from devices.transports.local import Capture

PATIENCE = 60  # seconds for what happens at once on an idle machine
NASTY = ["", " ", "'", '"', "\\", "\\\\'", "$(id)", "`id`", "${HOME}", "\n", "a\n\nb\n", "-n", "--", "*", "~", "!!", "#", ";",
         "&", "%s", "\t", "\r", "\u0081\u0088", "é", "日本語", "🙂", "<&3", "x" * 3000]  # fmt: skip
WORDS = st.one_of(st.sampled_from(NASTY), st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
ODD_NAMES = ["a b", "'quoted' \"twice\"", "$(touch hacked)", "-rf", "line\nbreak", "ünïcode 🙂", "back\\slash", "*"]


def running(marker: str) -> list[psutil.Process]:
    """Processes that have a word in their command line, and are not only waiting to be collected."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and marker in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def lasting() -> str:
    """Seconds to sleep, far too many, and a number that no other test sleeps for."""
    return f"{50_000 + secrets.randbelow(9_999)}.{secrets.randbelow(10**6)}"


def until(happens: Callable[[], bool]) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + PATIENCE
    while not happens():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of 64 KiB; skips the test where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no disk can be mounted here (that needs root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def check_words_arrive_as_they_were_sent(transport: Transport, local: Path) -> None:
    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.lists(WORDS, min_size=1, max_size=6))
    def words_arrive(words: list[str]) -> None:
        done = transport.run(["printf", "%s\\0", *words])
        assert done.stdout.split("\0")[:-1] == words

    words_arrive()
    assert transport.run(["printf", "%s\\0", *NASTY]).stdout.split("\0")[:-1] == NASTY


def check_a_variable_reaches_the_command(transport: Transport, local: Path) -> None:
    value = "a 'b' $(c)\n\"d\" \\"
    done = transport.run(["sh", "-c", 'printf %s "$SOME_VALUE"'], environment={"SOME_VALUE": value})
    assert done.stdout == value
    assert transport.run(["sh", "-c", 'printf %s "$SOME_VALUE"']).stdout == ""


def check_exit_codes_and_streams_come_back(transport: Transport, local: Path) -> None:
    for code in (0, 1, 124, 137, 255):
        done = transport.run(["sh", "-c", f"echo out; echo err >&2; exit {code}"])
        assert (done.exit_code, done.stdout, done.stderr) == (code, "out\n", "err\n")


def check_a_signal_is_128_more(transport: Transport, local: Path) -> None:
    assert transport.run(["sh", "-c", "kill -KILL $$"]).exit_code == 128 + 9
    assert transport.run(["sh", "-c", "kill -SEGV $$"]).exit_code == 128 + 11


def check_a_program_that_is_not_there(transport: Transport, local: Path) -> None:
    done = transport.run(["no-such-program-anywhere"])
    assert done.exit_code == 127 and "no-such-program-anywhere" in done.stderr


def check_words_of_a_shell_are_no_programs(transport: Transport, local: Path) -> None:
    """`exit` would end a shell that took it for its own word."""
    assert transport.run(["exit", "3"]).exit_code == 127


def check_a_file_for_another_processor(transport: Transport, local: Path) -> None:
    program = local / "program"
    program.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(11) + b"\xf7\x00" + bytes(100))  # machine: BPF
    with transport.workspace() as folder:
        transport.push(program, f"{folder}/program", executable=True)
        assert transport.run([f"{folder}/program"]).exit_code != 0


def check_output_that_is_no_text(transport: Transport, local: Path) -> None:
    assert transport.run(["printf", "a\\377b"]).stdout == "a\ufffdb"


def check_a_command_reads_nothing(transport: Transport, local: Path) -> None:
    assert transport.run(["cat"]).stdout == ""


def check_nothing_is_left_of_a_command_that_took_too_long(transport: Transport, local: Path) -> None:
    marker = lasting()
    # The grandchild ignores what asks it to end, and keeps no output open.
    stubborn = f"(trap '' HUP INT TERM; exec sleep {marker}) >/dev/null 2>&1 & sleep {marker}"
    with pytest.raises(DeviceTimeout, match="'sh' on .* took longer than 1 s"):
        transport.run(["sh", "-c", stubborn], timeout=1)
    until(lambda: not running(marker))


def check_nothing_is_left_when_who_asked_is_killed(transport: Transport, local: Path) -> None:
    marker = lasting()
    transport.run(["true"])
    child = os.fork()
    if child == 0:
        try:
            transport.run(["sleep", marker], timeout=600)
        finally:
            os._exit(0)
    until(lambda: bool(running(marker)))
    os.kill(child, 9)
    os.waitpid(child, 0)
    until(lambda: not running(marker))


def check_output_has_a_limit(transport: Transport, local: Path) -> None:
    for stream in ("stdout", "stderr"):
        print_it = ["sh", "-c", f"head -c $1 /dev/zero {'>&2' if stream == 'stderr' else ''}", "sh"]
        assert len(getattr(transport.run([*print_it, "5000"], limit=5000), stream)) == 5000
        with pytest.raises(DeviceError, match=f"more on {stream} than the 5000 bytes"):
            transport.run([*print_it, "5001"], limit=5000)


def check_endless_output_ends(transport: Transport, local: Path) -> None:
    marker = lasting()
    before = psutil.Process().memory_info().rss
    with pytest.raises(DeviceError, match="more on stdout than the 1000000 bytes"):
        transport.run(["yes", marker], limit=1_000_000)
    until(lambda: not running(marker))
    assert psutil.Process().memory_info().rss - before < 100e6


def check_files_come_back_as_they_were(transport: Transport, local: Path) -> None:
    sent, back = local / "sent", local / "back"
    with transport.workspace() as folder:
        for content in (b"", bytes(range(256)), os.urandom(3_000_000)):
            sent.write_bytes(content)
            transport.push(sent, f"{folder}/file")  # over what is there
            transport.pull(f"{folder}/file", back, limit=len(content))
            assert back.read_bytes() == content
        for name in ODD_NAMES:
            transport.push(sent, f"{folder}/{name}")
            transport.pull(f"{folder}/{name}", local / name, limit=3_000_000)
            assert (local / name).read_bytes() == content
        assert sorted(os.listdir(folder)) == sorted(["file", *ODD_NAMES])
    assert transport.run(["ls", "hacked"]).exit_code != 0


def check_files_are_private(transport: Transport, local: Path) -> None:
    (local / "tool").write_text("#!/bin/sh\necho it runs\n")
    (local / "tool").chmod(0o666)
    with transport.workspace() as folder:
        transport.push(local / "tool", f"{folder}/data")
        transport.push(local / "tool", f"{folder}/tool", executable=True)
        modes = [stat.S_IMODE(os.stat(path).st_mode) for path in (folder, f"{folder}/data", f"{folder}/tool")]
        assert modes == [0o700, 0o600, 0o700]
        assert transport.run([f"{folder}/tool"]).stdout == "it runs\n"


def check_pulling_what_cannot_be(transport: Transport, local: Path) -> None:
    (local / "file").write_bytes(bytes(1001))
    with transport.workspace() as folder:
        transport.push(local / "file", f"{folder}/file")
        nothing = "(?i)no such file|directory"
        for wrong, reason in ((f"{folder}/missing", nothing), (f"{folder}/file", "1000"), (folder, nothing)):
            with pytest.raises(DeviceError, match=reason) as error:
                transport.pull(wrong, local / "pulled", limit=1000)
            assert repr(wrong) in str(error.value)
    assert os.listdir(local) == ["file"]


def check_pushing_what_cannot_be(transport: Transport, local: Path) -> None:
    (local / "file").write_bytes(b"content")
    with transport.workspace() as folder:
        with pytest.raises(DeviceError, match="missing"):
            transport.push(local / "missing", f"{folder}/file")
        with pytest.raises(DeviceError, match="nowhere/file"):
            transport.push(local / "file", f"{folder}/nowhere/file")
        os.mkdir(f"{folder}/taken")
        with pytest.raises(DeviceError, match="taken"):
            transport.push(local / "file", f"{folder}/taken")
        assert os.listdir(folder) == ["taken"] and not os.listdir(f"{folder}/taken")
    with pytest.raises(DeviceError, match="absolute"):
        transport.push(local / "file", "relative/file")
    with pytest.raises(DeviceError, match="absolute"):
        transport.pull("relative/file", local / "pulled", limit=1)


def check_what_is_offered_stays_here(transport: Transport, local: Path) -> None:
    (local / "file").write_bytes(b"content")
    (local / "file").chmod(0o640)
    with transport.workspace() as folder:
        transport.offer(local / "file", f"{folder}/one")
        transport.offer(local / "file", f"{folder}/two")
        assert transport.run(["cat", f"{folder}/one"]).stdout == "content"
        transport.run(["rm", "-f", f"{folder}/one"])
        assert transport.run(["cat", f"{folder}/two"]).stdout == "content"
        for missing, remote in ((local / "missing", f"{folder}/file"), (local, f"{folder}/file")):
            with pytest.raises(DeviceError, match=missing.name):
                transport.offer(missing, remote)
        with pytest.raises(DeviceError, match="nowhere/file"):
            transport.offer(local / "file", f"{folder}/nowhere/file")
    with pytest.raises(DeviceError, match="absolute"):
        transport.offer(local / "file", "relative/file")
    assert (local / "file").read_bytes() == b"content" and stat.S_IMODE((local / "file").stat().st_mode) == 0o640


def check_a_full_disk_is_named_and_left_clean(transport: Transport, local: Path) -> None:
    (local / "file").write_bytes(os.urandom(1_000_000))
    with small_disk(local / "disk") as disk:
        with pytest.raises(DeviceError, match="No space left"):
            transport.push(local / "file", f"{disk}/file")
        until(lambda: not os.listdir(disk))


def check_a_workspace_goes_with_its_user(transport: Transport, local: Path) -> None:
    for reason in (None, RuntimeError, KeyboardInterrupt):
        try:
            with transport.workspace() as folder:
                transport.run(["sh", "-c", 'mkdir "$1/deep"; echo x >"$1/deep/file"', "sh", folder])
                assert os.path.exists(f"{folder}/deep/file")
                if reason is not None:
                    raise reason
        except BaseException as error:
            assert type(error) is reason
        assert not os.path.exists(folder)


def check_ctrl_c_ends_the_command_too(transport: Transport, local: Path) -> None:
    """It comes while output is waited for: as the first is there, to be sure of it."""
    marker = lasting()

    def interrupt(capture: Capture, data: bytes) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Capture, "add_stdout", interrupt)
        transport.run(["sh", "-c", f"echo started; exec sleep {marker}"], timeout=600)
    until(lambda: not running(marker))


def check_commands_that_cannot_be(transport: Transport, local: Path) -> None:
    for command in ([], [""], ["-x"], ["A=B"], ["echo", "a\0b"]):
        with pytest.raises(DeviceError):
            transport.run(command)
    for name in ("", "A B", "1A", "A=B", "é"):
        with pytest.raises(DeviceError, match="names no variable"):
            transport.run(["true"], environment={name: "x"})
    with pytest.raises(DeviceError, match="zero byte"):
        transport.run(["true"], environment={"A": "x\0"})


CHECKS = {name.removeprefix("check_"): check for name, check in sorted(globals().items()) if name.startswith("check_")}
