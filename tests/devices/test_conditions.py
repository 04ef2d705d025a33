"""Reading conditions of a device with made-up files and commands, and what is said about a change."""

import json
from pathlib import Path

import pytest

from devices.conditions import Conditions, Energy, beside_tegrastats, changed, read_conditions
from devices.conditions.linux import parse_files
from devices.errors import DeviceError, DeviceGone, DeviceTimeout
from devices.transports.base import Completed
from devices.transports.host import HostTransport
from tests.devices.fake_programs import fake_programs

FIXTURES = Path(__file__).parent / "fixtures" / "conditions"


def fixture(name):
    return (FIXTURES / f"{name}.txt").read_text(encoding="utf-8")


@pytest.fixture
def tree(tmp_path):
    """A folder with the kernel's files of the fixture."""
    for path, value in parse_files(fixture("files_linux6")).items():
        file = tmp_path / "tree" / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(value + "\n")
    return tmp_path / "tree"


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`command(name, script)` puts a program in front of the PATH."""
    return fake_programs(tmp_path / "bin", monkeypatch)


@pytest.fixture
def jetson(command):
    command("nvpmodel", f'[ "$1" = -q ] && cat {FIXTURES}/nvpmodel_orin_nano_jetpack6.txt')
    command("jetson_clocks", f'[ "$1" = --show ] && cat {FIXTURES}/jetson_clocks_orin_nano_jetpack6.txt')
    command("tegrastats", f"while cat {FIXTURES}/tegrastats_orin_nano_jetpack6.txt; do sleep 0.05; done")


def test_linux(tree):
    found = Conditions.model_validate(read_conditions(HostTransport(), "linux", root=str(tree)))
    assert found.missing == () and (found.cores, found.load) == (8, (1.52, 0.9, 0.41))
    assert [cluster.governor for cluster in found.clusters] == ["schedutil", "schedutil", "performance"]
    assert found.battery.percent == 79 and found.throttle_events == 18


def test_this_machine():
    """Real files, whatever there is of them; JSON that can be read again."""
    found = read_conditions(HostTransport(), "linux")
    assert Conditions.model_validate(json.loads(json.dumps(found))).online


def test_files_that_cannot_be_read(tree):
    zone = tree / "sys/class/thermal/thermal_zone0/temp"
    zone.unlink()
    zone.mkdir()  # reading a folder fails, also for root
    (tree / "sys/class/thermal/thermal_zone2/temp").write_text("")
    (tree / "sys/class/thermal/thermal_zone10/temp").write_bytes(b"\xff\xfe\n")
    (tree / "proc/loadavg").unlink()
    found = read_conditions(HostTransport(), "linux", root=str(tree))
    assert found["missing"] == ["load average", "thermal zones"]


def test_a_root_with_odd_characters(tree):
    odd = tree.rename(tree.with_name("a 'tree'; $(touch oops) *"))
    assert read_conditions(HostTransport(), "linux", root=str(odd))["cores"] == 8


def test_jetson(tree, jetson):
    found = Conditions.model_validate(read_conditions(HostTransport(), "jetson", root=str(tree)))
    assert found.missing == ()
    assert (found.power_mode.name, found.tegrastats.gpu_percent) == ("25W", 99)
    assert {clock.name for clock in found.clocks} == {"cpu0", "cpu1", "GPU", "EMC", "DLA0_CORE"}


def test_jetson_without_root(tree, jetson, command):
    command("jetson_clocks", f"cat {FIXTURES}/jetson_clocks_not_root.txt; exit 1")
    command("tegrastats", "echo 'RAM 10/20MB CPU [1%@729] GR3D_FREQ 0%'; sleep 0.1")
    found = read_conditions(HostTransport(), "jetson", root=str(tree))
    assert found["missing"] == ["jetson_clocks", "power rails"]


def test_android(tree, command):
    command("getprop", f"grep \"^$1$(printf '\\t')\" {FIXTURES}/properties_android14.txt | cut -f 2")
    command(
        "dumpsys",
        f"case $1 in thermalservice) n=thermalservice_android11;; *) n=battery_android11;; esac; cat {FIXTURES}/$n.txt",
    )
    found = Conditions.model_validate(read_conditions(HostTransport(), "android", root=str(tree)))
    assert found.missing == () and found.build.soc == "QTI SM8550"
    assert (found.thermal_status, found.battery.percent) == (2, 83)


@pytest.mark.slow
def test_a_service_that_hangs_and_one_that_says_no(tree, command):
    command("getprop", "echo 30")
    command("dumpsys", '[ "$1" = battery ] && sleep 60; echo "Can\'t find service: $1"')
    found = read_conditions(HostTransport(), "android", root=str(tree))
    assert found["missing"] == [
        "thermalservice",
        "thermalservice temperatures",
        "thermalservice cooling devices",
        "battery",
    ]


def test_a_service_that_never_stops_talking(tree, command):
    command("getprop", "echo 30")
    command("dumpsys", f'[ "$1" = battery ] && exec yes garbage; cat {FIXTURES}/thermalservice_android14.txt')
    found = read_conditions(HostTransport(), "android", root=str(tree))
    assert found["missing"] == ["battery"] and found["thermal_status"] == 0


class Broken(HostTransport):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def run(self, command, **_):
        if isinstance(self.error, Exception):
            raise self.error
        return Completed(*self.error)


@pytest.mark.parametrize(
    "error", [DeviceTimeout("slow"), DeviceError("too much"), (1, "", "sh: not found"), (0, "\0", "")]
)
def test_a_device_that_cannot_tell_anything(error):
    found = read_conditions(Broken(error), "jetson")
    assert len(found["missing"]) == 9 and found["clusters"] == []


def test_a_device_that_is_gone_is_an_error():
    with pytest.raises(DeviceGone):
        read_conditions(Broken(DeviceGone("unplugged")), "linux")


def test_power_beside_a_command(tmp_path, command):
    line = "RAM 10/20MB VDD_IN 5000mW/5000mW"
    command(
        "tegrastats",
        f'[ "$1 $3" = "--interval --logfile" ] || exit 2; trap "echo ended >> {tmp_path}/end; exit" TERM\n'
        f'while echo "{line}" >> "$4"; do sleep 0.02; done',
    )
    log = tmp_path / "power log"
    done = HostTransport().run(beside_tegrastats(["sh", "-c", 'sleep 0.3; echo "$1"; exit 3', "sh", "a b"], str(log)))
    assert (done.exit_code, done.stdout) == (3, "a b\n"), "the command's own output and exit code"
    lines = log.read_text().splitlines()
    assert len(lines) >= 2
    energy = Energy.of_tegrastats(lines, interval=0.1)
    assert energy.board_joules == pytest.approx(5.0 * 0.1 * (len(lines) - 1))


def test_power_where_there_is_no_tegrastats(tmp_path):
    done = HostTransport().run(beside_tegrastats(["echo", "fine"], str(tmp_path / "log")))
    assert (done.exit_code, done.stdout) == (0, "fine\n")


# What is said about a change.


def conditions(**values):
    cluster = {"name": "policy0", "governor": "performance", "max_khz": 2_000_000, "hardware_max_khz": 2_000_000}
    return {"kind": "linux", "online": [0, 1, 2, 3], "load": [0.1, 0.1, 0.1], "clusters": [cluster], **values}


def test_nothing_to_say():
    assert changed(conditions(), conditions()) == []


def test_other_keys_are_the_profiles():
    assert changed({**conditions(), "time": 1.0, "when": "before"}, conditions()) == []


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            {"clusters": [{"name": "policy0", "governor": "schedutil"}, {"name": "policy4", "governor": "schedutil"}]},
            {},
            "governor of policy0, policy4 is 'schedutil'",
        ),
        (
            {},
            {"clusters": [{"name": "policy0", "max_khz": 1_500_000, "hardware_max_khz": 2_000_000}]},
            "policy0 may reach 1.50 of 2.00 GHz only since the measurement began",
        ),
        ({}, {"online": [0, 1]}, "4 cores were online before and 2 afterwards"),
        ({"thermal_status": 0}, {"thermal_status": 2}, r"thermal status 2 \(moderate\), and 0 \(none\) before"),
        (
            {"coolers": [{"name": "cpufreq-cpu0", "state": 0}]},
            {"coolers": [{"name": "cpufreq-cpu0", "state": 4}]},
            "Throttling began or grew: cpufreq-cpu0",
        ),
        ({"throttle_events": 7}, {"throttle_events": 12}, "slowed the processor down 5 times"),
        (
            {"temperatures": [{"name": "cpu", "celsius": 40}, {"name": "gpu", "celsius": 40}]},
            {"temperatures": [{"name": "cpu", "celsius": 52}, {"name": "gpu", "celsius": 61.5}]},
            "gpu rose by 21.5 °C, from 40.0 to 61.5",
        ),
        (
            {"tegrastats": {"ram_mb": 1, "ram_total_mb": 2, "temperatures": [{"name": "tj", "celsius": 40}]}},
            {"tegrastats": {"ram_mb": 1, "ram_total_mb": 2, "temperatures": [{"name": "tj", "celsius": 55}]}},
            "tj rose by 15.0",
        ),
        ({}, {"battery": {"percent": 12, "plugged": False}}, "battery was at 12 %"),
        (
            {"battery": {"percent": 90, "plugged": True, "status": "charging"}},
            {"battery": {"percent": 90, "plugged": False, "status": "discharging"}},
            "was unplugged in between",
        ),
        (
            {"battery": {"percent": 90, "plugged": True, "status": "charging"}},
            {"battery": {"percent": 90, "plugged": True, "status": "full"}},
            "battery was charging before and full afterwards",
        ),
        (
            {"power_mode": {"name": "MAXN", "id": 0}},
            {"power_mode": {"name": "15W", "id": 1}},
            "power mode was MAXN before and 15W afterwards",
        ),
        (
            {"clocks": [{"name": "GPU", "min": 5, "max": 5, "current": 5}]},
            {"clocks": [{"name": "GPU", "min": 1, "max": 5, "current": 5}]},
            "limits of clocks changed: GPU",
        ),
        ({"load": [3.2, 1, 1]}, {}, "kept 3.2 of 4 cores busy"),
    ],
)
def test_what_makes_a_measurement_doubtful(before, after, said):
    sentences = changed(conditions(**before), conditions(**after))
    assert len(sentences) == 1, sentences
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(sentences[0])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # A fan at work is good, and so are a cooler device and one that has not moved.
        ({"coolers": [{"name": "pwm-fan", "state": 0}]}, {"coolers": [{"name": "pwm-fan", "state": 3}]}),
        ({"coolers": [{"name": "cpu", "state": 3}]}, {"coolers": [{"name": "cpu", "state": 1}]}),
        (
            {"temperatures": [{"name": "cpu", "celsius": 40}]},
            {"temperatures": [{"name": "cpu", "celsius": 49}, {"name": "gpu", "celsius": 90}]},
        ),
        ({"battery": {"percent": 90}}, {"battery": {"percent": 12, "plugged": True}}),
        ({"kind": "android", "load": [9, 9, 9]}, {"kind": "android"}),
        ({}, {"load": [4, 1, 1]}),  # that was the measurement
        # jetson_clocks leaves the governor no choice.
        ({"clusters": [{"name": "policy0", "governor": "schedutil", "min_khz": 9, "max_khz": 9}]}, {}),
    ],
)
def test_what_is_no_reason_for_doubt(before, after):
    assert changed(conditions(**before), conditions(**after)) == []


def test_a_cap_that_was_there_before():
    capped = {
        "clusters": [{"name": "p", "governor": "performance", "max_khz": 1_500_000, "hardware_max_khz": 2_000_000}]
    }
    (sentence,) = changed(conditions(**capped), conditions(**capped))
    assert sentence.endswith("1.50 of 2.00 GHz only.")


def test_sensors_of_one_name_are_compared_in_turn():
    before = {"temperatures": [{"name": "soc", "celsius": 30}, {"name": "soc", "celsius": 50}]}
    after = {"temperatures": [{"name": "soc", "celsius": 35}, {"name": "soc", "celsius": 55}]}
    assert changed(conditions(**before), conditions(**after)) == []
    assert changed(conditions(**before), conditions(**after), warmer=4)


def test_what_are_no_conditions():
    with pytest.raises(DeviceError, match="kind"):
        changed({}, conditions())
    with pytest.raises(DeviceError, match=r"clusters\.0\.max_khz"):
        changed(conditions(), conditions(clusters=[{"name": "p", "max_khz": "fast"}]))
