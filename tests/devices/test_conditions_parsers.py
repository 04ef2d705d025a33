"""What devices print about their condition, in the layouts of each version; and anything else."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.conditions import android, jetson, linux, tegrastats
from devices.conditions.energy import Energy
from devices.conditions.model import Conditions, CoreLoad, Rail
from devices.conditions.read import assemble, split_sections
from devices.errors import DeviceError

FIXTURES = Path(__file__).parent / "fixtures" / "conditions"


def fixture(name):
    return (FIXTURES / f"{name}.txt").read_text(encoding="utf-8")


def temperatures(found):
    return {temperature.name: temperature.celsius for temperature in found}


@pytest.mark.parametrize(
    ("name", "ram", "cores", "gpu", "rails"),
    [
        ("tx1_jetpack3", (1607, 3983), [(17, 1734), (11, 1734), (None, None), (5, 1734)], (39, (76,)), {}),
        (
            "nano_jetpack4",
            (1412, 3956),
            [(41, 1479), (12, 1479), (7, 1479), (3, 1479)],
            (88, (921,)),
            {"POM_5V_IN": (6215, 5410), "POM_5V_GPU": (2310, 1802), "POM_5V_CPU": (1201, 977)},
        ),
        (
            "tx2_jetpack4",
            (3120, 7852),
            [(22, 2035), (None, None), (None, None), (18, 2034), (9, 2035), (31, 2036)],
            (54, (1134,)),
            {
                "VDD_SYS_GPU": (1907, 1143),
                "VDD_SYS_SOC": (842, 806),
                "VDD_4V0_WIFI": (38, 21),
                "VDD_IN": (6844, 5120),
                "VDD_SYS_CPU": (1219, 640),
                "VDD_SYS_DDR": (1311, 1190),
            },
        ),
        (
            "agx_xavier_jetpack4",
            (5021, 31918),
            [(13, 1190), (8, 1190), (2, 1190), *[(0, 1190)] * 5],
            (61, ()),
            {
                "GPU": (3105, 1840),
                "CPU": (621, 474),
                "SOC": (1862, 1551),
                "CV": (0, 0),
                "VDDRQ": (776, 465),
                "SYS5V": (2411, 2290),
            },
        ),
        (
            "xavier_nx_jetpack5",
            (2744, 6851),
            [(19, 1420), (11, 1420), (8, 1190), (6, 1190), (None, None), (None, None)],
            (72, (803,)),
            {"VDD_IN": (7420, 6105), "VDD_CPU_GPU_CV": (3011, 2240), "VDD_SOC": (1402, 1288)},
        ),
        (
            "agx_orin_jetpack5",
            (8204, 62795),
            [(7, 1728), (3, 1728), *[(0, 729)] * 6, *[(None, None)] * 4],
            (35, (611, 612)),
            {
                "VDD_GPU_SOC": (4788, 3991),
                "VDD_CPU_CV": (798, 601),
                "VIN_SYS_5V0": (4112, 3988),
                "VDDQ_VDD2_1V8AO": (905, 707),
            },
        ),
        (
            "agx_orin_jetpack6_idle",
            (3187, 62841),
            [*[(0, 1728)] * 4, *[(0, 1420)] * 4, *[(None, None)] * 4],
            (0, (0, 0)),
            {
                "VDD_GPU_SOC": (1592, 1592),
                "VDD_CPU_CV": (-398, -398),
                "VIN_SYS_5V0": (2624, 2624),
                "VDDQ_VDD2_1V8AO": (403, 403),
            },
        ),
        (
            "orin_nano_jetpack6",
            (4712, 7620),
            [(38, 1510), (2, 1510), (1, 1510), (0, 729), (1, 729), (0, 729)],
            (99, (624,)),
            {"VDD_IN": (9850, 8535), "VDD_CPU_GPU_CV": (4512, 3944), "VDD_SOC": (2720, 2659)},
        ),
        (
            "thor_jetpack7",
            (35265, 125772),
            [(0, 972), (0, 972), (3, 1566), (0, 1566), (0, 972), (0, 972), (1, 972)]
            + [*[(0, 972)] * 4, (8, 972), (0, 972), (0, 972)],
            (None, (314, 314, 314)),
            {
                "VDD_GPU": (1962, 1962),
                "VDD_CPU_SOC_MSS": (5887, 5801),
                "VIN_SYS_5V0": (5635, 5635),
                "VIN": (19780, 19610),
            },
        ),
    ],
)
def test_tegrastats_of_every_board(name, ram, cores, gpu, rails):
    sample = tegrastats.parse(fixture(f"tegrastats_{name}"))
    assert (sample.ram_mb, sample.ram_total_mb) == ram
    assert [(core.percent, core.mhz) for core in sample.cores] == cores
    assert (sample.gpu_percent, sample.gpu_mhz) == gpu
    assert sample.rails == {rail: Rail(now_mw=now, average_mw=average) for rail, (now, average) in rails.items()}


def test_tegrastats_temperatures_clocks_and_date():
    sample = tegrastats.parse(fixture("tegrastats_agx_orin_jetpack5"))
    found = temperatures(sample.temperatures)
    assert found["CPU"] == 46.125 and found["tj"] == 46.125 and found["Tboard"] == 33
    assert not found.keys() & {"CV0", "CV1", "CV2"}, "-256 means that it is off"
    assert (sample.memory_percent, sample.memory_mhz, sample.swap_mb) == (1, 2133, 0)
    assert sample.stamp == 1713951011  # 2024-04-24 09:30:11
    assert tegrastats.parse(fixture("tegrastats_nano_jetpack4")).stamp is None


def test_tegrastats_rail_without_an_average():
    sample = tegrastats.parse("RAM 1/2MB VDD_GPU 5517mW VDD_CPU_SOC_MSS 7484mW APE 150")
    assert sample.rails == {"VDD_GPU": Rail(now_mw=5517), "VDD_CPU_SOC_MSS": Rail(now_mw=7484)}


@given(st.text(alphabet="RAM CPU[]%@,/0123456789mWVDIN_-.Cx", max_size=200))
def test_tegrastats_takes_any_line(text):
    for line in (text, f"RAM 10/20MB {text}"):
        try:
            tegrastats.parse(line)
        except ValueError:
            pass


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("nano_jetpack4", ("MAXN", 0)),
        ("xavier_nx_jetpack5", ("MODE_15W_6CORE", 2)),
        ("orin_nano_jetpack6", ("25W", 1)),
    ],
)
def test_nvpmodel(name, mode):
    found = jetson.power_mode(fixture(f"nvpmodel_{name}"))
    assert (found.name, found.id) == mode


def test_nvpmodel_without_a_number_or_a_mode():
    assert jetson.power_mode("NV Power Mode: MAXN").id is None
    with pytest.raises(ValueError, match="no power mode"):
        jetson.power_mode("NVPM ERROR: Error opening /var/lib/nvpmodel/status: 2\n")


def test_modes_of_the_configuration():
    modes = jetson.power_modes(fixture("nvpmodel_orin_nano_jetpack6.conf"))
    assert {mode.name: mode.id for mode in modes} == {"15W": 0, "25W": 1, "MAXN_SUPER": 2}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "nano_jetpack4",
            {
                "cpu0": (102000, 1479000, 1326000),
                "GPU": (76800000, 921600000, 76800000),
                "EMC": (204000000, 1600000000, 1600000000),
            },
        ),
        (
            "orin_nano_jetpack6",
            {
                "cpu1": (729600, 1344000, 1190400),
                "GPU": (306000000, 918000000, 306000000),
                "DLA0_CORE": (0, 614400000, 614400000),
            },
        ),
        (
            "thor_jetpack7",
            {
                "cpu13": (972000, 2601000, 972000),
                "gpu-gpc-0": (315000000, 1575000000, 315000000),
                "PVA0_VPS0": (0, 1215000000, 1215000000),
            },
        ),
    ],
)
def test_jetson_clocks(name, expected):
    clocks = {
        clock.name: (clock.min, clock.max, clock.current) for clock in jetson.clocks(fixture(f"jetson_clocks_{name}"))
    }
    assert expected.items() <= clocks.items()


def test_jetson_clocks_for_others_than_root():
    with pytest.raises(ValueError, match="no clocks"):
        jetson.clocks(fixture("jetson_clocks_not_root"))


def test_thermalservice():
    old, new = fixture("thermalservice_android11"), fixture("thermalservice_android14")
    assert (android.thermal_status(old), android.thermal_status(new)) == (2, 0)
    assert temperatures(android.thermal_temperatures(old)) == {
        "cpu0-silver-usr": 61.4,  # not the cached one
        "cpu0-gold-usr": 66.200005,
        "gpu0-usr": 58.7,
        "battery": 33.8,
        "skin-therm-monitor": 42.083,
    }
    assert "disp_therm" not in temperatures(android.thermal_temperatures(new)), "NaN is no temperature"
    assert [(cooler.name, cooler.state) for cooler in android.thermal_coolers(old)] == [
        ("battery", 0),
        ("thermal-cpufreq-4", 3),
    ]


def test_thermalservice_without_a_hal():
    text = fixture("thermalservice_android10_no_hal")
    assert temperatures(android.thermal_temperatures(text)) == {"SKIN": 29.1}
    assert android.thermal_coolers(text) == ()


def test_battery_of_android():
    charging = android.battery(fixture("battery_android11"))
    assert charging.model_dump() == {
        "percent": 83,
        "status": "charging",
        "plugged": True,
        "celsius": 29.6,
        "millivolts": 4203,
    }
    later = android.battery(fixture("battery_android14_events"))
    assert (later.percent, later.status, later.plugged) == (15, "discharging", False), "old events are no state"


def test_properties():
    new, old = android.build(fixture("properties_android14")), android.build(fixture("properties_android10"))
    assert (new.model, new.soc, new.sdk, new.release) == ("Phone 8", "QTI SM8550", 34, "14")
    assert (old.model, old.soc, old.platform, old.sdk) == ("Phone 3", None, "msm8998", 29)


def test_files_of_linux():
    files = linux.parse_files(fixture("files_linux6"))
    low, middle, high = linux.clusters(files)
    assert (low.cpus, middle.cpus, high.cpus) == ((0, 1, 2, 3), (4, 5, 6), (7,))
    assert (middle.governor, middle.min_khz, middle.max_khz, middle.hardware_max_khz) == (
        "schedutil",
        499200,
        2208000,
        2803200,
    )
    assert [(t.name, t.celsius) for t in linux.temperatures(files)] == [
        ("cpu-thermal", 48.25),
        ("acpitz", 37.0),  # degrees, as old kernels have them
        ("gpu-thermal", 46.5),  # zone 10 after zone 2
    ]
    assert [(cooler.name, cooler.state) for cooler in linux.coolers(files)] == [
        ("pwm-fan", 2),
        ("cpufreq-cpu0", 0),
        ("intel_powerclamp", 0),
    ]
    assert linux.throttle_events(files) == 3 + 4 + 11  # a package counts once
    battery = linux.battery(files)
    assert (battery.percent, battery.status, battery.plugged, battery.celsius) == (79, "not charging", True, 31.2)
    assert linux.load_average(files) == (1.52, 0.9, 0.41)


@pytest.mark.parametrize(
    ("text", "cores"), [("0-3", (0, 1, 2, 3)), ("0,2-3,9\n", (0, 2, 3, 9)), ("0 1 2", (0, 1, 2)), ("5", (5,))]
)
def test_core_lists(text, cores):
    assert linux.core_list(text) == cores


@pytest.mark.parametrize("text", ["", "a", "3-1", "0-99999999999", "-3"])
def test_what_is_no_core_list(text):
    with pytest.raises(ValueError):
        linux.core_list(text)


def test_sections():
    assert split_sections("noise\n== one\na\n\nb\n== two\n== three \nc") == {
        "one": "a\n\nb\n",
        "two": "\n",
        "three": "c\n",
    }


def test_nothing_is_missing_of_a_whole_device():
    files = linux.parse_files(fixture("files_linux6"))
    assert assemble("linux", files, {}).missing == ()
    phone = {
        "thermalservice": fixture("thermalservice_android11"),
        "battery": fixture("battery_android11"),
        "properties": fixture("properties_android14"),
    }
    found = assemble("android", files, phone)
    assert found.missing == () and found.thermal_status == 2
    assert {"cpu-thermal", "cpu0-gold-usr"} <= temperatures(found.temperatures).keys()
    board = {
        "nvpmodel": fixture("nvpmodel_orin_nano_jetpack6"),
        "jetson_clocks": fixture("jetson_clocks_orin_nano_jetpack6"),
        "tegrastats": fixture("tegrastats_orin_nano_jetpack6"),
    }
    found = assemble("jetson", files, board)
    assert found.missing == () and found.power_mode.name == "25W"
    assert found.tegrastats.cores[0] == CoreLoad(percent=38, mhz=1510)
    assert Conditions.model_validate_json(found.model_dump_json()) == found


def test_everything_is_missing_of_nothing():
    everything = {"cores", "online cores", "load average", "cpufreq", "thermal zones", "cooling devices"}
    assert set(assemble("linux", {}, {}).missing) == everything | {"thermal_throttle", "power_supply"}
    assert set(assemble("jetson", {}, {}).missing) == everything | {"nvpmodel", "jetson_clocks", "tegrastats"}
    assert {"thermalservice", "battery", "properties"} < set(assemble("android", {}, {}).missing)


def test_rails_that_only_root_sees():
    line = fixture("tegrastats_orin_nano_jetpack6").partition(" VDD_IN")[0]
    assert "power rails" in assemble("jetson", {}, {"tegrastats": line}).missing


_VALUE = st.one_of(st.text(max_size=40), st.integers().map(str), st.floats().map(str), st.just("x" * 300))


@given(st.data())
def test_no_device_can_make_reading_fail(data):
    """Whatever files and commands say: JSON comes out, and what makes no sense is missing."""
    paths = list(linux.parse_files(fixture("files_linux6")))
    files = data.draw(st.dictionaries(st.sampled_from(paths), _VALUE, max_size=12))
    texts = [fixture(path.stem) for path in FIXTURES.glob("*.txt")]
    text = st.one_of(st.text(max_size=60), st.sampled_from(texts), st.sampled_from(texts).flatmap(_cut))
    names = ("thermalservice", "battery", "properties", "nvpmodel", "jetson_clocks", "tegrastats")
    said = data.draw(st.dictionaries(st.sampled_from(names), text))
    kind = data.draw(st.sampled_from(["linux", "android", "jetson"]))
    found = assemble(kind, files, said)
    assert Conditions.model_validate_json(found.model_dump_json()) == found


def _cut(text):
    return st.integers(0, len(text)).map(lambda end: text[:end])


def test_energy_is_the_area_under_power():
    energy = Energy.of(
        [0.0, 1.0, 3.0], [{"VDD_IN": 1000, "A": 0}, {"VDD_IN": 3000, "A": 0}, {"VDD_IN": 3000, "A": 500}]
    )
    assert energy.joules == {"VDD_IN": 2.0 + 6.0, "A": 0.5}
    assert (energy.seconds, energy.samples, energy.board_joules) == (3.0, 3, 8.0)


def test_energy_of_a_board_without_a_sensor_at_its_input():
    rails = {"VDD_GPU_SOC": 4000, "VDD_CPU_CV": 1000, "VIN_SYS_5V0": 2000, "VDDQ_VDD2_1V8AO": 700}
    # The memory's rail is a part of the 5 V rail.
    assert Energy.of([0, 2], [rails, rails]).board_joules == pytest.approx(14.0)
    assert Energy.of([0, 2], [{"VDD_SOC": 5}, {"VDD_SOC": 5}]).board_joules is None


@given(st.lists(st.tuples(st.floats(0.001, 10), st.floats(0, 60_000)), min_size=2, max_size=30))
def test_energy_lies_between_the_least_and_the_most_power(steps):
    times, now = [], 0.0
    for step, _ in steps:
        times.append(now)
        now += step
    powers = [power for _, power in steps]
    energy = Energy.of(times, [{"VDD_IN": power} for power in powers])
    low, high = (bound(powers) / 1e3 * energy.seconds for bound in (min, max))
    assert low - 1e-6 <= energy.joules["VDD_IN"] <= high + 1e-6


def test_energy_of_lines_with_dates():
    def line(second, power):
        return f"02-19-2024 10:14:{second:02d} RAM 1/2MB VDD_IN {power}mW/1mW"

    # Two lines a second: half a second apart, though both have the same date.
    lines = [line(7, 2000), line(7, 2000), line(8, 2000), line(8, 2000), "02-19-2024 10:14:09 RA"]
    energy = Energy.of_tegrastats(lines)
    assert (energy.seconds, energy.samples, energy.board_joules) == (1.5, 4, 3.0)
    assert Energy.of_tegrastats(lines, interval=0.1).board_joules == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "two of each"),
        (["RAM 1/2MB VDD_IN 1mW/1mW"] * 3, "interval between them is needed"),
        (["02-19-2024 10:14:09 RAM 1/2MB VDD_IN 1mW/1mW", "02-19-2024 10:14:07 RAM 1/2MB VDD_IN 1mW/1mW"], "must rise"),
    ],
)
def test_energy_that_cannot_be_known(lines, said):
    with pytest.raises(DeviceError, match=said):
        Energy.of_tegrastats(lines)
