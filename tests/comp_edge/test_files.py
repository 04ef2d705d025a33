"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from comp_edge import files
from comp_edge.errors import InputError
from comp_edge.files import check_writable, read_json, recover_folder, whole_folder, write_json, write_text

# Nobody, not even root (whom permissions do not stop), can create a file in here.
READ_ONLY = Path("/proc/self")
needs_proc = pytest.mark.skipif(not READ_ONLY.is_dir(), reason="needs a Linux /proc")


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_write_and_read(tmp_path):
    value = {"a": [1, 2.5, None, "ü"], "b": {"c": True}}
    write_json(tmp_path / "new" / "x.json", value)
    assert read_json(tmp_path / "new" / "x.json", what="trace") == value
    assert "ü" in (tmp_path / "new" / "x.json").read_text(encoding="utf-8")
    write_text(tmp_path / "new" / "x.json", "[]")
    assert contents(tmp_path) == {"new/x.json": "[]"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": 1,}', "line 1, column"),
        (b'{"a": 1\n"b": 2}', "line 2, column 1"),
        (b"", "line 1, column 1"),
        (b'{"a": "\xff"}', "cannot be read"),
        (b"[" * 100_000, "trace"),
    ],
)
def test_unreadable_json(tmp_path, content, says):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        read_json(tmp_path / "x.json", what="trace")
    assert "trace" in str(caught.value) and "x.json" in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_not_a_file(tmp_path):
    with pytest.raises(InputError, match="plan .*x.json' does not exist"):
        read_json(tmp_path / "x.json", what="plan")
    with pytest.raises(InputError, match="plan .* cannot be read"):
        read_json(tmp_path, what="plan")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="plan"):
        read_json(tmp_path / "file" / "x.json", what="plan")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_text(tmp_path / "x.txt", "old")

    def full_disk(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(InputError, match="cannot write.*x.txt.*No space left"):
        write_text(tmp_path / "x.txt", "new")
    assert contents(tmp_path) == {"x.txt": "old"}

    def stop(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "x.txt", "new")
    assert contents(tmp_path) == {"x.txt": "old"}


@needs_proc
def test_read_only_places():
    for attempt in (
        lambda: write_text(READ_ONLY / "x.txt", "new"),
        lambda: write_json(READ_ONLY / "deeper" / "x.json", {}),
        lambda: check_writable(READ_ONLY / "out"),
        lambda: check_writable(READ_ONLY),
        lambda: whole_folder(READ_ONLY / "out").__enter__(),
    ):
        with pytest.raises(InputError, match="/proc/self") as caught:
            attempt()
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="Permission denied"):
            check_writable(tmp_path / "out")
        with pytest.raises(InputError, match="Permission denied"):
            write_text(tmp_path / "x.txt", "new")
    finally:
        tmp_path.chmod(0o700)


def test_outputs_that_are_files(tmp_path):
    (tmp_path / "file").write_text("keep me")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="file"):
            check_writable(folder)
        with pytest.raises(InputError, match="file"), whole_folder(folder):
            pytest.fail("the block must not run")
    with pytest.raises(InputError, match="file"):
        write_text(tmp_path / "file" / "x.txt", "new")
    assert contents(tmp_path) == {"file": "keep me"}


def test_check_writable_leaves_nothing(tmp_path, monkeypatch):
    check_writable(tmp_path / "a" / "b" / "c")
    monkeypatch.chdir(tmp_path)
    check_writable("relative")
    check_writable(".")
    assert list(tmp_path.iterdir()) == []


def test_a_whole_folder(tmp_path):
    target = tmp_path / "deeper" / "out"
    with whole_folder(target) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "x").write_text("1")
        assert not target.exists() and staging.parent == target.parent  # one file system: the rename is atomic
    assert contents(tmp_path) == {"deeper/out/sub/x": "1"}
    with whole_folder(target) as staging:
        assert list(staging.iterdir()) == []
        (staging / "y").write_text("2")
        assert contents(target) == {"sub/x": "1"}
    assert contents(tmp_path) == {"deeper/out/y": "2"}
    assert [p.name for p in (tmp_path / "deeper").iterdir()] == ["out"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), InputError("no"), SystemExit(3)])
@pytest.mark.parametrize("existed", [True, False])
def test_a_crash_in_the_middle_leaves_the_old_folder(tmp_path, error, existed):
    target = tmp_path / "out"
    if existed:
        target.mkdir()
        (target / "x").write_text("old")
    with pytest.raises(type(error)), whole_folder(target) as staging:
        (staging / "x").write_text("new")
        raise error
    assert contents(tmp_path) == ({"out/x": "old"} if existed else {})
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if existed else [])


def test_a_full_disk_in_the_middle(tmp_path):
    from safetensors import SafetensorError

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("old")
    for error in (
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        # What safetensors raises when a file cannot be written.
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ):
        with pytest.raises(InputError, match="cannot write.*out.*No space left"), whole_folder(tmp_path / "out"):
            raise error
        assert contents(tmp_path) == {"out/x": "old"}


def test_a_failed_exchange_brings_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "x").write_text("old")
    genuine = os.replace

    def replace(source, destination):
        if Path(destination) == target and Path(source).name != "old":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        genuine(source, destination)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(InputError, match="cannot write"), whole_folder(target) as staging:
        (staging / "x").write_text("new")
    assert contents(tmp_path) == {"out/x": "old"}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_kill_in_the_middle_leaves_the_old_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("old")
    script = (
        "import os, signal, sys\n"
        "from comp_edge.files import whole_folder\n"
        "with whole_folder(sys.argv[1]) as staging:\n"
        "    (staging / 'x').write_text('new')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(files.__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], cwd=root, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert contents(tmp_path / "out") == {"x": "old"}
    # And the next run is not disturbed by what the killed one left behind.
    with whole_folder(tmp_path / "out") as staging:
        (staging / "x").write_text("newer")
    assert contents(tmp_path / "out") == {"x": "newer"}


KILLED = """
import os, signal, sys
from comp_edge import files
genuine, calls = os.replace, []

def replace(source, destination):
    calls.append(destination)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    genuine(source, destination)

files.os.replace = replace
with files.whole_folder(sys.argv[1]) as staging:
    (staging / "x").write_text("new")
"""


@pytest.mark.parametrize(("call", "now"), [(1, {"x": "old"}), (2, None), (3, {"x": "new"})])
def test_kill_9_in_the_exchange(tmp_path, call, now):
    """Before the first rename, between the two, and behind the second: the next command finds a whole folder."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("old")
    root = Path(files.__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out"), str(call)], cwd=root, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) > 1  # something hidden was left
    assert (contents(tmp_path / "out") if (tmp_path / "out").exists() else None) == now
    check_writable(tmp_path / "out")
    assert contents(tmp_path) == {"out/x": (now or {"x": "old"})["x"]}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_recovery_leaves_others_at_work_alone(tmp_path):
    """Two processes that write the same folder: the second must not take away what the first works on."""
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out") as staging:
        (staging / "x").write_text("new")
        recover_folder(tmp_path / "out")
        recover_folder(tmp_path / "other")
        assert contents(staging) == {"x": "new"}
    assert contents(tmp_path) == {"out/x": "new"}


def test_the_only_copy_is_never_removed(tmp_path, monkeypatch):
    """Neither the new folder nor the old one can be put in place: the old one stays where it is, to be recovered."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "x").write_text("old")
    genuine = os.replace

    def replace(source, destination):
        if Path(destination) == target:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        genuine(source, destination)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(InputError, match="cannot write"), whole_folder(target) as staging:
        (staging / "x").write_text("new")
    monkeypatch.undo()
    assert not target.exists()
    recover_folder(target)
    assert contents(tmp_path) == {"out/x": "old"}


def test_others_may_read_what_was_written(tmp_path):
    """As for any program's output: a bundle is handed over to somebody else. safetensors makes its files private."""
    import numpy as np
    from safetensors.numpy import save_file

    umask = os.umask(0o022)
    try:
        write_text(tmp_path / "x.txt", "new")
        with whole_folder(tmp_path / "out") as staging:
            write_json(staging / "x.json", {})
            save_file({"a": np.zeros(2)}, staging / "w.safetensors")
    finally:
        os.umask(umask)
    modes = {str(p.relative_to(tmp_path)): oct(p.stat().st_mode & 0o777) for p in tmp_path.rglob("*")}
    readable = dict.fromkeys(["x.txt", "out/x.json", "out/w.safetensors"], "0o644")
    assert modes == readable | {"out": "0o755"}


def test_json_is_what_other_tools_read(tmp_path):
    write_json(tmp_path / "x.json", {"b": 1, "a": [1]})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == {"b": 1, "a": [1]} and text.endswith("\n")
