"""Clocks that are fixed for a while, on a made-up device: a tree of the kernel's files, and NVIDIA's commands as scripts."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from devices.conditions.clocks import fixed_clocks
from devices.errors import DeviceError, DeviceGone
from devices.transports.host import HostTransport
from tests.devices.fake_programs import fake_programs

FIXTURES = Path(__file__).parent / "fixtures" / "conditions"
POLICIES = {"policy0": "schedutil", "policy4": "powersave", "policy7": "performance"}


@pytest.fixture
def tree(tmp_path):
    for name, governor in POLICIES.items():
        folder = tmp_path / "tree/sys/devices/system/cpu/cpufreq" / name
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text(governor + "\n")
        (folder / "scaling_available_governors").write_text("schedutil powersave performance \n")
    return tmp_path / "tree"


def governors(tree):
    folder = tree / "sys/devices/system/cpu/cpufreq"
    return {path.name: (path / "scaling_governor").read_text().strip() for path in sorted(folder.iterdir())}


def test_governors_are_set_and_set_back(tree):
    with fixed_clocks(HostTransport(), "linux", root=str(tree)):
        assert set(governors(tree).values()) == {"performance"}
    assert governors(tree) == POLICIES


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(1), DeviceGone("unplugged")])
def test_set_back_whatever_ends_the_block(tree, error):
    with pytest.raises(type(error)):
        with fixed_clocks(HostTransport(), "android", root=str(tree)):
            raise error
    assert governors(tree) == POLICIES


def test_preference_of_a_governor_is_set_back(tree):
    """Where the governor takes its preference along, as intel_pstate's does, it is written again."""
    folder = tree / "sys/devices/system/cpu/cpufreq/policy4"
    (folder / "energy_performance_preference").write_text("balance_power\n")
    with fixed_clocks(HostTransport(), "linux", root=str(tree)):
        (folder / "energy_performance_preference").write_text("performance\n")
    assert (folder / "energy_performance_preference").read_text() == "balance_power\n"
    assert governors(tree) == POLICIES


class Interrupted(HostTransport):
    """Ctrl-C in the middle of the n-th command."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def run(self, command, **options):
        self.left -= 1
        if self.left == 0:
            super().run(command, **options)
            raise KeyboardInterrupt
        return super().run(command, **options)


@pytest.mark.parametrize("at", range(1, 6))
def test_interrupted_at_any_command(tree, at):
    """Also while it sets the clocks, and while it sets them back."""
    with pytest.raises(KeyboardInterrupt):
        with fixed_clocks(Interrupted(at), "linux", root=str(tree)):
            pass
    assert governors(tree) == POLICIES


def test_no_clocks_to_set(tmp_path):
    with pytest.raises(DeviceError, match="'host' has no clocks that can be set.*without --set-clocks"):
        with fixed_clocks(HostTransport(), "linux", root=str(tmp_path)):
            pass


def test_no_such_governor(tree):
    file = tree / "sys/devices/system/cpu/cpufreq/policy4/scaling_available_governors"
    file.write_text("schedutil powersave\n")
    with pytest.raises(DeviceError, match="policy4 of 'host' has governors schedutil powersave only"):
        with fixed_clocks(HostTransport(), "linux", root=str(tree)):
            pass
    assert governors(tree) == POLICIES


def test_a_governor_that_no_kernel_has_is_not_passed_on(tree):
    """What a device says reaches no shell as a command."""
    file = tree / "sys/devices/system/cpu/cpufreq/policy4/scaling_governor"
    file.write_text("$(touch oops); performance\n")
    with fixed_clocks(HostTransport(), "linux", root=str(tree)):
        assert file.read_text().startswith("$(touch"), "left alone"
    assert not Path("oops").exists()


class Nobody(HostTransport):
    """Commands run as a user who may not write."""

    def run(self, command, **options):
        if os.getuid() == 0:
            command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command]
        return super().run(command, **options)


@pytest.fixture
def forbidden():
    """A tree that everyone may read and nobody may write."""
    if os.getuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("setpriv (util-linux) is missing: root cannot become somebody else")
    folder = Path(tempfile.mkdtemp())  # tmp_path is root's own
    try:
        path = folder / "sys/devices/system/cpu/cpufreq/policy0"
        path.mkdir(parents=True)
        (path / "scaling_governor").write_text("schedutil\n")
        (path / "scaling_governor").chmod(0o444)
        for parent in (folder, *folder.rglob("*")):
            if parent.is_dir():
                parent.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder)


def test_without_permission(forbidden, command):
    command("sudo", 'echo "sudo: a password is required" >&2; exit 1')
    with pytest.raises(DeviceError, match="can be set by root only") as error:
        with fixed_clocks(Nobody(), "linux", root=str(forbidden)):
            pytest.fail("the block must not begin")
    assert "\n" not in str(error.value)
    assert governors(forbidden) == {"policy0": "schedutil"}


def test_a_device_that_does_not_set_them_back(tree):
    with pytest.raises(DeviceError, match="'host' are not what they were; restart it"):
        with fixed_clocks(HostTransport(), "linux", root=str(tree)):
            gone = tree / "sys/devices/system/cpu/cpufreq/policy4"
            shutil.rmtree(gone)  # cores that were switched off meanwhile


def test_a_device_that_is_unplugged_meanwhile(tree):
    transport = HostTransport()
    with pytest.raises(DeviceError, match="may not be what they were, restart it to be sure: unplugged"):
        with fixed_clocks(transport, "linux", root=str(tree)):

            def run(*_, **__):
                raise DeviceGone("unplugged")

            transport.run = run


# A Jetson: one folder is its state, changed and printed by scripts in the PATH.

_NVPMODEL = """
case "$1" in
-q) echo "NVPM WARN: fan mode is not set!"; echo "NV Power Mode: $(cat {state}/mode)"
    case $(cat {state}/mode) in 15W) echo 0;; 25W) echo 1;; MAXN_SUPER) echo 2;; esac;;
-m) echo "nvpmodel -m $2" >> {state}/log
    if [ -f {state}/needs_restart ]; then
        echo "NVPM WARN: Reboot required for changing to this power mode: $2"
        echo "NVPM WARN: DO YOU WANT TO REBOOT NOW? enter YES/yes to confirm:"
        read -r answer && [ "$answer" = yes ] && touch {state}/restarted
        echo "NVPM ERROR: bad input!"; exit 0
    fi
    case $2 in 0) echo 15W > {state}/mode; echo 1510400 > {state}/max;; 1) echo 25W > {state}/mode; echo 1344000 > {state}/max;;
    2) echo MAXN_SUPER > {state}/mode; echo 1728000 > {state}/max;; esac;;
esac
"""
_JETSON_CLOCKS = """
[ "$(id -u)" = 0 ] || {{ echo "Error: Run this script($0) as a root user"; exit 1; }}
case "$1" in
--show) echo "SOC family:tegra234  Machine:Board"; echo "Online CPUs: 0-1"
    for c in 0 1; do
        echo "cpu$c:  Online=1 Governor=schedutil MinFreq=$(cat {state}/min) MaxFreq=$(cat {state}/max)" \\
            "CurrentFreq=729600 IdleStates: WFI=1 c7=1 "
    done
    echo "NV Power Mode: $(cat {state}/mode)";;
--store) echo "store" >> {state}/log; [ -e "$2" ] && exit 1; cat {state}/min {state}/max > "$2";;
--restore) echo "restore" >> {state}/log; {{ read -r min; read -r max; }} < "$2"
    echo "$min" > {state}/min; echo "$max" > {state}/max;;
"") echo "fix" >> {state}/log; [ -f {state}/fails ] && {{ echo "no such clock"; exit 5; }}; cat {state}/max > {state}/min;;
esac
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`command(name, script)` puts a program in front of the PATH."""
    return fake_programs(tmp_path / "bin", monkeypatch)


@pytest.fixture
def board(tmp_path, command):
    state, root = tmp_path / "state", tmp_path / "root"
    state.mkdir()
    (root / "etc").mkdir(parents=True)
    shutil.copy(FIXTURES / "nvpmodel_orin_nano_jetpack6.conf.txt", root / "etc/nvpmodel.conf")
    for name, value in (("mode", "25W"), ("min", "729600"), ("max", "1344000"), ("log", "")):
        (state / name).write_text(value + "\n" if value else "")
    command("nvpmodel", _NVPMODEL.format(state=state))
    command("jetson_clocks", _JETSON_CLOCKS.format(state=state))
    command("id", "echo 0")
    return state, root


def read(state):
    return tuple((state / name).read_text().strip() for name in ("mode", "min", "max"))


BEFORE = ("25W", "729600", "1344000")


def test_jetson_runs_without_limits_and_goes_back(board):
    state, root = board
    with fixed_clocks(HostTransport(), "jetson", root=str(root)):
        assert read(state) == ("MAXN_SUPER", "1728000", "1728000")
    assert read(state) == BEFORE
    assert (state / "log").read_text().split("\n")[:3] == ["store", "nvpmodel -m 2", "fix"]


def test_jetson_that_is_in_its_highest_mode(board):
    state, root = board
    (state / "mode").write_text("MAXN_SUPER\n")
    with fixed_clocks(HostTransport(), "jetson", root=str(root)):
        assert read(state)[1] == "1344000"
    assert read(state) == ("MAXN_SUPER", *BEFORE[1:])
    assert "nvpmodel" not in (state / "log").read_text()


def test_jetson_without_such_a_mode(board):
    state, root = board
    (root / "etc/nvpmodel.conf").write_text("< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=25W >\n")
    with fixed_clocks(HostTransport(), "jetson", root=str(root)):
        assert read(state) == ("25W", "1344000", "1344000")
    assert read(state) == BEFORE


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_jetson_goes_back_whatever_ends_the_block(board, error):
    state, root = board
    with pytest.raises(type(error)):
        with fixed_clocks(HostTransport(), "jetson", root=str(root)):
            raise error
    assert read(state) == BEFORE


@pytest.mark.parametrize("at", range(1, 13))
def test_jetson_interrupted_at_any_command(board, at):
    state, root = board
    with pytest.raises(KeyboardInterrupt):
        with fixed_clocks(Interrupted(at), "jetson", root=str(root)):
            pass
    assert read(state) == BEFORE


def test_jetson_mode_that_needs_a_restart(board):
    state, root = board
    (state / "needs_restart").touch()
    with pytest.raises(DeviceError, match="does not switch from power mode '25W' to 'MAXN_SUPER' without a restart"):
        with fixed_clocks(HostTransport(), "jetson", root=str(root)):
            pass
    assert read(state) == BEFORE and not (state / "restarted").exists()


def test_jetson_clocks_that_fail(board):
    state, root = board
    (state / "fails").touch()
    with pytest.raises(DeviceError, match="jetson_clocks on 'host' ended with 5: 'no such clock'"):
        with fixed_clocks(HostTransport(), "jetson", root=str(root)):
            pass
    assert read(state) == BEFORE


def test_jetson_without_root(board, command):
    state, root = board
    command("id", "echo 1000")
    command("sudo", 'echo "sudo: a password is required" >&2; exit 1')
    with pytest.raises(DeviceError, match="can be set by root only"):
        with fixed_clocks(HostTransport(), "jetson", root=str(root)):
            pass
    assert read(state) == BEFORE and (state / "log").read_text() == ""


def test_jetson_with_sudo(board, command):
    state, root = board
    # The first call asks as a user, what sudo runs sees root.
    command("id", '[ -n "$AS_ROOT" ] && echo 0 || echo 1000')
    command("sudo", '[ "$1" = -n ] || exit 1; shift; AS_ROOT=1 exec "$@"')
    with fixed_clocks(HostTransport(), "jetson", root=str(root)):
        assert read(state) == ("MAXN_SUPER", "1728000", "1728000")
    assert read(state) == BEFORE


def test_not_a_jetson(tree):
    with pytest.raises(DeviceError, match="has no jetson_clocks"):
        with fixed_clocks(HostTransport(), "jetson", root=str(tree)):
            pass


def test_nothing_changes_before_the_block(tree, board):
    state, _ = board
    fixed_clocks(HostTransport(), "linux", root=str(tree))
    fixed_clocks(HostTransport(), "jetson")
    assert governors(tree) == POLICIES and (state / "log").read_text() == ""
