"""Against a real sshd on loopback, with keys that are thrown away."""

from __future__ import annotations

import glob
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from real_sshd import Board, board
from transport_contract import CHECKS, lasting, running, until

from devices.errors import DeviceError, DeviceGone
from devices.transports import shell, ssh
from devices.transports.ssh import SshTransport


@pytest.fixture(scope="module")
def lasting_board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    with board(tmp_path_factory.mktemp("board")) as running_board:
        yield running_board


@pytest.fixture(scope="module")
def lasting_transport(lasting_board: Board) -> Iterator[SshTransport]:
    transport = SshTransport(lasting_board.address, options=lasting_board.options)
    yield transport
    transport.close()


@pytest.fixture
def own_board(tmp_path: Path) -> Iterator[Board]:
    (tmp_path / "board").mkdir()
    with board(tmp_path / "board") as running_board:
        yield running_board


def reach(target: Board) -> SshTransport:
    return SshTransport(target.address, options=target.options)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_contract(check: Callable[[SshTransport, Path], None], lasting_transport: SshTransport, tmp_path: Path) -> None:
    check(lasting_transport, tmp_path)


def test_a_server_with_another_key_is_refused(own_board: Board) -> None:
    known, other = own_board.folder / "known_hosts", (own_board.folder / "client.pub").read_text()
    known.write_text(f"[127.0.0.1]:{own_board.port} {other}")
    with pytest.raises(DeviceGone, match="Host key verification failed"):
        reach(own_board).run(["true"])


def test_a_server_that_is_not_known_is_refused(own_board: Board) -> None:
    (own_board.folder / "known_hosts").write_text("")
    with pytest.raises(DeviceGone, match="Host key verification failed"):
        reach(own_board).run(["true"])
    assert (own_board.folder / "known_hosts").read_text() == ""


def test_who_is_not_let_in_is_not_asked(own_board: Board) -> None:
    (own_board.folder / "client.pub").write_text("")
    with pytest.raises(DeviceGone, match="Permission denied"):
        reach(own_board).run(["true"])


def test_nobody_there(own_board: Board) -> None:
    own_board.vanish()
    transport = reach(own_board)
    with pytest.raises(DeviceGone, match="Connection refused"):
        transport.run(["true"])
    with pytest.raises(DeviceGone, match="Connection refused"), transport.workspace():
        pass


def test_a_client_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DeviceError, match="no `ssh` in PATH"):
        SshTransport("ssh://board")


def test_a_board_that_vanishes_while_a_command_runs(own_board: Board) -> None:
    marker = lasting()
    transport = reach(own_board)
    transport.run(["true"])
    threading.Thread(target=lambda: (until(lambda: bool(running(marker))), own_board.vanish())).start()
    with pytest.raises(DeviceGone, match="cannot be reached"):
        transport.run(["sleep", marker], timeout=600)
    until(lambda: not running(marker))
    with pytest.raises(DeviceGone, match="Connection refused"):
        transport.run(["true"])


def test_a_board_that_vanishes_hides_no_error(own_board: Board) -> None:
    transport = reach(own_board)
    with pytest.raises(KeyError, match="first"), transport.workspace() as folder:
        own_board.vanish()
        raise KeyError("first")
    os.rmdir(folder)
    # Without another error it must be said: the folder is still there.


def test_a_folder_that_cannot_be_removed_is_told(own_board: Board) -> None:
    transport = reach(own_board)
    with pytest.raises(DeviceGone), transport.workspace() as folder:
        own_board.vanish()
    os.rmdir(folder)


def test_a_board_that_vanishes_while_it_gets_a_file(
    own_board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has of the file does not stay."""
    (tmp_path / "file").write_bytes(os.urandom(300_000))
    (tmp_path / "there").mkdir()

    def chunks(file: object) -> Iterator[bytes]:
        yield file.read(100_000)
        until(lambda: any(path.stat().st_size for path in (tmp_path / "there").iterdir()))
        own_board.vanish()
        yield file.read()

    monkeypatch.setattr(shell, "read_chunks", chunks)
    with pytest.raises(DeviceGone):
        reach(own_board).push(tmp_path / "file", str(tmp_path / "there/file"))
    until(lambda: not list((tmp_path / "there").iterdir()))


def test_a_board_that_hangs(own_board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "GRACE", 0.5)
    transport = reach(own_board)
    transport.run(["true"], timeout=60)
    servers = own_board.servers()
    for server in servers:
        server.suspend()
    try:
        with pytest.raises(DeviceGone, match="has not answered for 1.5 s"):
            transport.run(["true"], timeout=1)
    finally:
        for server in servers:
            server.resume()
    transport.close()


def test_a_login_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something listens that is no sshd."""
    monkeypatch.setattr(ssh, "CONNECTION_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(DeviceGone, match="did not let us in within 1 s"):
            SshTransport(f"ssh://127.0.0.1:{server.getsockname()[1]}", options=("-F", "none")).run(["true"])


def test_a_board_that_comes_back(own_board: Board) -> None:
    """The shared connection is made anew."""
    transport = reach(own_board)
    assert transport.run(["echo", "first"]).stdout == "first\n"
    for process in own_board.server.children(recursive=True):
        process.kill()
    until(lambda: not transport._socket.exists())
    assert transport.run(["echo", "again"]).stdout == "again\n"
    transport.close()


def test_a_connection_is_shared_private_and_ends(own_board: Board) -> None:
    before = set(glob.glob("/tmp/comp-edge-*"))
    transport = reach(own_board)
    assert set(glob.glob("/tmp/comp-edge-*")) == before  # not before it is needed
    sessions = {transport.run(["sh", "-c", "echo $SSH_CONNECTION"]).stdout for _ in range(3)}
    assert len(sessions) == 1
    folder = transport._socket.parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    transport.close()
    assert not folder.exists()
    until(lambda: not running(f"ControlPath={folder}/s"))
    assert transport.run(["echo", "reopened"]).stdout == "reopened\n"
    folder = transport._socket.parent
    del transport
    assert not folder.exists()


def test_nothing_of_the_user_is_forwarded(own_board: Board) -> None:
    """Whatever the configuration says for other uses: no port is opened, no agent lent, no other command run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with open(own_board.folder / "client_config", "a") as config:
        config.write(f"LocalForward 127.0.0.1:{port} 127.0.0.1:1\nForwardAgent yes\nForwardX11 yes\n")
        config.write("RequestTTY force\nRemoteCommand echo another\nLogLevel DEBUG\n")
    transport = reach(own_board)
    done = transport.run(["sh", "-c", 'echo "<$SSH_AUTH_SOCK$DISPLAY$SSH_TTY>"'])
    assert (done.stdout, done.stderr) == ("<>\n", "")
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    transport.close()


def test_what_a_login_prints_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "board").mkdir()
    (tmp_path / "banner").write_text("Authorized use only\n")
    with board(tmp_path / "board", extra=f"Banner {tmp_path}/banner\nPrintMotd yes") as greeting:
        done = reach(greeting).run(["sh", "-c", "echo out; echo err >&2; exit 4"])
    assert (done.exit_code, done.stdout, done.stderr) == (4, "out\n", "err\n")


def test_an_account_without_a_shell(tmp_path: Path) -> None:
    (tmp_path / "board").mkdir()
    with board(tmp_path / "board", extra="ForceCommand echo This account is closed. >&2; exit 1") as closed:
        with pytest.raises(DeviceGone, match="This account is closed"):
            reach(closed).run(["true"])


def test_a_terminal_that_hangs_up_does_not_reach_the_connection(own_board: Board) -> None:
    """Ctrl-C goes to every process of the terminal's group; the workspace is still to be removed through ssh then."""
    transport = reach(own_board)
    transport.run(["true"])
    clients = [
        p for p in psutil.process_iter(["cmdline"]) if f"ControlPath={transport._socket}" in (p.info["cmdline"] or ())
    ]
    clients = [client for client in clients if client.status() != psutil.STATUS_ZOMBIE]
    assert clients and all(os.getpgid(client.pid) != os.getpgid(0) for client in clients)
    with pytest.raises(KeyboardInterrupt), transport.workspace() as folder:
        previous = signal.getsignal(signal.SIGINT)
        assert previous is signal.default_int_handler
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    assert not os.path.exists(folder)
    transport.close()
