"""The commands of `python -m devices`: what they take, and how they tell what they found."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from comp_edge.cli import common
from devices.errors import DeviceError

EXAMPLES = """\
examples:
  python -m devices list
  python -m devices profile host --model llava-digits -o host.json
  python -m devices profile ssh://pi@board:2222 --model my-vlm --preset report --cpus 4,5 --threads 2 -o board.json
  python -m devices fit host.json                                  how good predictions are, and what they rest on
  python -m devices fit host.json --plan pruned --decode-tokens 8  what a pruned model takes, by method and layer
  python -m devices run bundle/scheduled/model.pte --device adb://SERIAL --method prefill --json
  python -m devices run bundle/scheduled --trace traces            where the time goes, kernel by kernel
  python -m devices import benchmark_results.json                  what somebody else has measured
"""
TRACE_ROWS = 12  # operations that are told of a trace; all are in --json
DEVICE_HELP = "host, ssh://[user@]host[:port] or adb://SERIAL"


def _parser(subparsers: Any, name: str, about: str, run: Any) -> argparse.ArgumentParser:
    lines = [line for line in EXAMPLES.splitlines() if f"devices {name}" in line]
    parser = subparsers.add_parser(
        name, help=about, description=about[0].upper() + about[1:] + ".", epilog="\n".join(["examples:", *lines])
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.set_defaults(run=run)
    return parser


def _measuring(parser: argparse.ArgumentParser) -> None:
    from devices.measuring import PRESETS

    parser.add_argument("--preset", default="quick", metavar="PRESET", help=f"{' or '.join(PRESETS)} (default: quick)")
    parser.add_argument(
        "--agent", default="native", metavar="AGENT",
        help="native (C++), python (a board's own runtime) or trtexec (a Jetson's GPU) (default: native)",
    )  # fmt: skip
    parser.add_argument("--threads", type=common.count, default=1, metavar="N", help="of the runtime (default: 1)")
    parser.add_argument("--cpus", type=_cpus, default=(), metavar="N,N", help="cores to bind to (default: all)")
    parser.add_argument(
        "--set-clocks", action="store_true", help="fix the device's clocks while it is measured, and put them back"
    )


def _cpus(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) < 4096 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of cores like 4,5")
    return tuple(map(int, parts))


def _console() -> Any:
    from rich.console import Console

    # What devices, files and their users say is no markup.
    return Console(highlight=False, soft_wrap=True, markup=False)


def _warn(sentences: list[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for sentence in sentences:
        console.print(Text.assemble(("warning", "yellow"), ": ", sentence))


class ListCommand:
    """`list`"""

    @staticmethod
    def add(subparsers: Any) -> None:
        _parser(subparsers, "list", "what can be reached", ListCommand.run)

    @staticmethod
    def run(arguments: Any) -> None:
        from rich.table import Table

        from devices.device import connect
        from devices.discovery import attached

        found = attached()
        host = connect("host").info().model_dump(mode="json")
        if arguments.json:
            common.print_json({"devices": [one.to_json() for one in found], "host": host})
            return
        table = Table("device", "what", "state", "hint")
        for one in found:
            table.add_row(one.address, one.what, one.state, one.hint or "")
        console = _console()
        console.print(table)
        console.print(f"host: {host['cpu']}, {host['cores']} cores, {host['memory_mb']} MB, {host['system']}")


class Run:
    """`run`"""

    @staticmethod
    def add(subparsers: Any) -> None:
        parser = _parser(subparsers, "run", "time the methods of ExecuTorch programs, in turns", Run.run)
        parser.add_argument("programs", nargs="+", type=Path, metavar="PTE", help="a program, or a bundle's folder")
        parser.add_argument("--device", default="host", help=f"{DEVICE_HELP} (default: host)")
        parser.add_argument("--method", help="only this method")
        parser.add_argument("--energy", action="store_true", help="also joules a call, by a Jetson's tegrastats")
        parser.add_argument(
            "--trace", type=Path, metavar="FOLDER", help="also say where the time goes, and keep ETDump traces there"
        )
        _measuring(parser)

    @staticmethod
    def run(arguments: Any) -> None:
        from contextlib import nullcontext

        from rich.table import Table

        from comp_edge.files import check_writable
        from devices.agent import agent_named
        from devices.agent.protocol import Job
        from devices.conditions import changed, fixed_clocks
        from devices.device import connect
        from devices.measuring import preset_named
        from devices.metering import check_meter, joules_a_call
        from devices.sitting import sit
        from devices.tracing import check_tracer, trace_calls

        preset = preset_named(arguments.preset)
        if arguments.trace is not None:
            check_tracer(arguments.agent)
            check_writable(arguments.trace)
        jobs = {}
        for given in arguments.programs:
            path = _program(given, agent_named(arguments.agent).form)
            for name in _methods(path, arguments.method):
                jobs[f"{path}:{name}"] = Job(path, name, threads=arguments.threads, cpus=arguments.cpus)
        options = {"agent": arguments.agent, "threads": arguments.threads, "cpus": arguments.cpus}
        with connect(arguments.device) as device:
            if arguments.energy:
                check_meter(device)
            clocks = fixed_clocks(device.transport, device.kind) if arguments.set_clocks else nullcontext()
            joules, traces = {}, {}
            with clocks:
                with sit(device, preset=preset, **options) as sitting, common.progress_bar("timing") as update:
                    before, calls = device.conditions(), 0

                    def progress(name: str) -> None:
                        nonlocal calls
                        update(min(calls, preset.rounds * len(jobs)), preset.rounds * len(jobs), name)
                        calls += 1

                    timings = sitting.measure(jobs, progress)
                    after = device.conditions()
                if arguments.energy:
                    joules = joules_a_call(device, jobs, agent=arguments.agent)
                if arguments.trace is not None:
                    traces = trace_calls(device, jobs, arguments.trace, agent=arguments.agent)
            info = device.info().model_dump(mode="json")
        _warn(changed(before, after))
        ms = {name: _figures(timing) for name, timing in timings.items()}
        for name, energy in joules.items():
            ms[name]["joules"] = energy
        if arguments.json:
            found = {"device": info, "threads": arguments.threads, "conditions": [before, after], "methods": ms}
            if arguments.trace is not None:
                found["traces"] = _traces_json(traces)
            common.print_json(found)
            return
        labels = {name: job.method if len(arguments.programs) == 1 else name for name, job in jobs.items()}
        table = Table("ms")
        for name in ms:
            table.add_column(labels[name], overflow="fold", justify="right")
        for figure in next(iter(ms.values())):
            values = [figures[figure] for figures in ms.values()]
            table.add_row(figure, *(f"{v:.3f}" if isinstance(v, float) else str(v) for v in values))
        _console().print(table)
        for name, (path, parts) in traces.items():
            _print_trace(labels[name], path, parts)


def _traces_json(traces: dict[str, Any]) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        name: {"file": str(path), "parts": [asdict(part) for part in parts]} for name, (path, parts) in traces.items()
    }


def _print_trace(name: str, path: Path, parts: Any) -> None:
    """What a call spends its time on, the longest first."""
    from rich.table import Table

    from devices.tracing import shares

    table = Table("runs as", "what", "times", "ms", "share", title=f"{name}: {path}", title_justify="left")
    found = shares(parts)
    for one in found[:TRACE_ROWS]:
        table.add_row(one.kind, one.name, str(one.count), f"{one.ms:.3f}", f"{one.share:.1%}")
    if rest := found[TRACE_ROWS:]:
        total = sum(one.ms for one in rest)
        table.add_row("", f"{len(rest)} others", "", f"{total:.3f}", f"{sum(one.share for one in rest):.1%}")
    _console().print(table)


def _program(path: Path, form: str) -> Path:
    """The program of a bundle's folder, or the file itself.

    Args:
        form: of the programs that the agent takes.
    """
    if path.is_dir():
        found = sorted(path.glob(f"*.{form}")) or sorted(path.glob(f"*/*.{form}"))
        if len(found) != 1:
            raise DeviceError(
                f"{str(path)!r} holds {len(found)} .{form} files; give one of them, or a folder that has one."
            )
        return found[0]
    if {path.suffix, f".{form}"} == {".pte", ".onnx"}:
        raise DeviceError(f"program {str(path)!r} is none for this agent, which takes .{form} files; see --agent.")
    return path


def _methods(path: Path, only: str | None) -> list[str]:
    from devices.program import method_names

    names = method_names(path)
    if only is not None and only not in names:
        raise DeviceError(f"program {str(path)!r} has no method {only!r}; it has {', '.join(names)}.")
    return names if only is None else [only]


def _figures(timing: Any) -> dict[str, Any]:
    return {
        "steady": timing.steady,
        "p50": timing.percentile(50),
        "p90": timing.percentile(90),
        "p99": timing.percentile(99),
        "min": timing.samples[0],
        "load": timing.load_ms,
        "first": timing.first_ms,
        "samples": len(timing.samples),
        "peak_rss_kb": timing.peak_rss_kb,
        "rejected_rounds": timing.rejected,
        "settled": timing.settled,
    }


class ProfileCommand:
    """`profile`"""

    @staticmethod
    def add(subparsers: Any) -> None:
        from devices.profiles import NEW_TOKENS

        parser = _parser(
            subparsers, "profile", "measure what pruned forms of a model take on a device", ProfileCommand.run
        )
        parser.add_argument("device", metavar="DEVICE", help=DEVICE_HELP)
        parser.add_argument("--model", required=True, help=common.MODEL_HELP)
        parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="the profile to write")
        parser.add_argument("--prompt-tokens", type=common.count, metavar="N", help="text tokens of the longest prompt")
        parser.add_argument(
            "--max-new-tokens", type=common.count, default=NEW_TOKENS, metavar="N",
            help="room for the answer, for models that generate (default: %(default)s)",
        )  # fmt: skip
        parser.add_argument("--resume", action="store_true", help="go on with the profile that is there")
        parser.add_argument(
            "--jobs", type=common.count, default=common.LOWERING_JOBS, metavar="N", help=common.LOWERING_HELP
        )
        _measuring(parser)

    @staticmethod
    def run(arguments: Any) -> None:
        from devices.latency import LatencyModel
        from devices.profiling import doubts, profile

        out: Path = arguments.out
        if out.exists() and not arguments.resume:
            raise DeviceError(f"{str(out)!r} is there already; give --resume to go on with it, or another --out.")
        with common.progress_bar("profile") as update:
            found = profile(
                arguments.device,
                arguments.model,
                out=out,
                preset=arguments.preset,
                agent=arguments.agent,
                threads=arguments.threads,
                cpus=arguments.cpus,
                prompt_tokens=arguments.prompt_tokens,
                new_tokens=arguments.max_new_tokens,
                set_clocks=arguments.set_clocks,
                jobs=arguments.jobs,
                on_progress=update,
            )
        report = LatencyModel.fit(found).report()
        if arguments.json:
            common.print_json({"profile": str(out), "doubts": doubts(found), **report})
            return
        _warn([*doubts(found), *report["warnings"]])
        print(f"{out}: {found.measurements} measurements of {len(found.points)} programs, {found.seconds:.0f} s")
        _print_accuracy(report)


class FitCommand:
    """`fit`"""

    @staticmethod
    def add(subparsers: Any) -> None:
        parser = _parser(
            subparsers, "fit", "how good the predictions from a profile are, and what a plan takes", FitCommand.run
        )
        parser.add_argument("profile", metavar="PROFILE", help="a file that profile has written")
        parser.add_argument(
            "--plan",
            action="append",
            default=[],
            metavar="FOLDER",
            help="a pruned folder or a plan.json; may be repeated",
        )
        parser.add_argument("--decode-tokens", type=common.natural, default=0, metavar="N", help="after the first")
        parser.add_argument("--report", type=Path, metavar="FILE", help="write an HTML page with pictures")

    @staticmethod
    def run(arguments: Any) -> None:
        from rich.table import Table

        from comp_edge.plan import Plan
        from devices.latency import LatencyModel
        from devices.page import predicted, write_page

        model = LatencyModel.fit(arguments.profile).with_decode_tokens(arguments.decode_tokens)
        report, plans = model.report(), {}
        for path in arguments.plan:
            plans[path] = predicted(model, Plan.load(path))
        if arguments.report is not None:
            write_page(model, plans, arguments.report)
        if arguments.json:
            common.print_json(report | {"plans": plans})
            return
        _warn(report["warnings"])
        _print_accuracy(report)
        if plans:
            table = Table("plan", "request", *next(iter(plans.values()))["methods"])
            for path, found in plans.items():
                parts = [f"{ms:.2f} ms" for ms in found["methods"].values()]
                table.add_row(path, f"{found['ms']:.2f} ± {found['uncertainty_ms']:.2f} ms", *parts)
                _warn([f"{path}: {sentence}" for sentence in found["outside"]])
            _console().print(table)


def _print_accuracy(report: dict[str, Any]) -> None:
    """Errors of points that were left out, by method and of whole requests."""
    from rich.table import Table

    table = Table("left out one by one", "n", "mean error", "within 10 %", "in proportion to MACs")
    plain = report["macs_proportional"]
    rows = {name: (found, plain["methods"][name]) for name, found in report["methods"].items()}
    rows["whole request"] = (report["whole"], plain["whole"])
    for name, (ours, theirs) in rows.items():
        if ours["mape"] is not None:
            table.add_row(
                name, str(ours["n"]), f"{ours['mape']:.1%}", f"{ours['within_10pct']:.0%}", f"{theirs['mape']:.1%}"
            )
    _console().print(table)


class Import:
    """`import`"""

    @staticmethod
    def add(subparsers: Any) -> None:
        parser = _parser(subparsers, "import", "read what somebody else has measured", Import.run)
        parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a log or a JSON file; see the README")

    @staticmethod
    def run(arguments: Any) -> None:
        from rich.table import Table

        from devices.imports import import_results

        found = [import_results(path) for path in arguments.files]
        if arguments.json:
            common.print_json({"results": [one.model_dump(mode="json") for one in found]})
            return
        table = Table("file", "format", "name", "mean ms", "min", "max", "samples")
        for path, one in zip(arguments.files, found, strict=True):
            for timing in one.timings:
                values = (timing.mean, timing.min, timing.max)
                shown = ["-" if value is None else f"{value:.3f}" for value in values]
                count = "-" if timing.samples is None else str(len(timing.samples))
                table.add_row(str(path), one.format, timing.name, *shown, count)
        _console().print(table)
