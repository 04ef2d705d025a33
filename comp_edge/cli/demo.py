"""`comp-edge demo`: the whole path on the shipped model, from pruning to verified bundles and a report.

The steps are the commands that a user would type, run one after the other; what they print as JSON is put together.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comp_edge.cli import common
from comp_edge.errors import InputError

MODEL, TASK = "llava-digits", "digit_vqa"
QUESTIONS = 200  # test questions on which every export is compared
EXAMPLES = """\
examples:
  comp-edge demo                        writes to the folder demo; then open demo/pruned/report.html
  comp-edge demo -o elsewhere --json    one JSON object on stdout
"""


class StepFailed(RuntimeError):
    """A step of the demo did not end well; that is not the user's doing."""


@dataclass(frozen=True)
class Step:
    """One step of the demo, and about how long it takes on two cores (for the time left)."""

    title: str
    seconds: float


STEPS = {
    "prune": Step("prune to the budget", 300),
    "score": Step("score with the language model's drops lifted", 10),
    "exports": Step("export to ExecuTorch and Core ML, compare with transformers", 90),
    "runtime": Step("run the conformance tests, time dense and pruned in turns", 30),
    "report": Step("report", 10),
}


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "demo",
        help="prune, export, verify and report, in a few minutes",
        description=f"Prune {MODEL} on {TASK}, export it to ExecuTorch and Core ML, verify and time it, write a report.",
        epilog=EXAMPLES,
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("demo"), help="folder to write to (default: demo)")
    parser.add_argument("--keep", type=common.fraction, default=0.3, help="fraction of the MACs to keep (default: 0.3)")
    parser.add_argument("--strategy", default="probe", help="probe or comp (default: probe)")
    parser.add_argument("--seed", type=common.natural, default=0)
    parser.add_argument("--json", action="store_true", help="print the results as JSON on stdout")
    parser.set_defaults(run=run)


class _Clock:
    """A bar over all steps with the time left: steps that tell their progress move it, others move with the clock."""

    def __init__(self, update: Callable[[int, int, str], None]) -> None:
        self._update = update
        self._names = list(STEPS)
        self._total = int(sum(step.seconds for step in STEPS.values()))

    def show(self, name: str, share: float, detail: str = "") -> None:
        """Step `name` is done to this share, 0 to 1."""
        position = self._names.index(name)
        before = sum(STEPS[earlier].seconds for earlier in self._names[:position])
        step = STEPS[name]
        text = f"[{position + 1}/{len(self._names)}] {step.title}{detail}"
        self._update(int(before + min(share, 1.0) * step.seconds), self._total, text)

    @contextmanager
    def ticking(self, name: str) -> Iterator[None]:
        """Move with the clock, never quite to the end, while the block runs."""
        over = threading.Event()

        def tick() -> None:
            started = time.monotonic()
            while not over.wait(0.5):
                passed = (time.monotonic() - started) / STEPS[name].seconds
                self.show(name, passed / (1 + passed) if passed > 0.5 else passed * 2 / 3)

        self.show(name, 0.0)
        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        self.show(name, 1.0)


def run(arguments: Any) -> int:
    """Run all steps; 0 when everything was verified, 1 otherwise."""
    from comp_edge.files import check_writable
    from comp_edge.strategy import STRATEGIES

    if arguments.strategy not in STRATEGIES:
        raise InputError(f"unknown strategy {arguments.strategy!r}; give one of {', '.join(STRATEGIES)}.")
    out: Path = arguments.out
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with common.progress_bar("demo") as update:
            result = _steps(out, arguments, _Clock(update))
    except StepFailed as error:
        print(f"comp-edge demo: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        common.print_json(result)
    else:
        _print(result)
    return 0 if _verified(result) else 1


def _steps(out: Path, arguments: Any, clock: _Clock) -> dict[str, Any]:
    from comp_edge.report import write_report

    pruned = out / "pruned"
    metrics, prompt_tokens = _prune(pruned, arguments, clock)
    requests = out / "requests.safetensors"
    with clock.ticking("score"):
        stock_score = _score_lifted(pruned, requests)
    golden = ["--golden", str(requests)]
    executorch, dense, coreml = out / "executorch", out / "executorch-dense", out / "coreml"
    exports = [
        ("export.executorch", [pruned, "-o", executorch, "--verify", QUESTIONS, *golden]),
        ("export.coreml", [pruned, "-o", coreml, "--verify", 50, *golden]),
        # The dense model is what the pruned one is timed against: same runtime, same profile, same prompt length.
        (
            "export.executorch",
            [MODEL, "-o", dense, "--profile", "scheduled", "--prompt-tokens", prompt_tokens, *golden],
        ),
    ]
    with clock.ticking("exports"), ThreadPoolExecutor(max_workers=2) as pool:
        lowered, apple, _ = pool.map(lambda export: _json_of(*export), exports)
    with clock.ticking("runtime"):
        timed = _json_of("runtime_tests", [executorch, "--against", dense])
        checked = _json_of("runtime_tests", [coreml, "--rounds", 0])
    latency = {Path(bundle["path"]).name: _first_token(bundle) for bundle in timed["bundles"]}
    dense_latency = _first_token(timed["against"][0])
    result = {
        "dense": {
            "score": metrics["dense"]["test_score"],
            "macs": metrics["dense"]["macs"],
            "latency_ms": dense_latency,
        },
        "pruned": {
            "score": metrics["pruned"]["test_score"],
            "macs": metrics["pruned"]["macs"],
            "latency_ms": latency["scheduled"],
            "folder": str(pruned),
        },
        "executorch": {
            profile: {**lowered[profile], "latency_ms": latency[profile]} for profile in ("stock", "scheduled")
        },
        "coreml": apple,
        "runtime_tests": {"executorch": timed["ok"], "coreml": checked["ok"]},
        "report": str(pruned / "report.html"),
    }
    result["executorch"]["stock"]["score"] = stock_score
    result["executorch"]["scheduled"]["score"] = metrics["pruned"]["test_score"]
    with clock.ticking("report"):
        write_report(pruned, task=TASK, verification=result)
    return result


def _prune(folder: Path, arguments: Any, clock: _Clock) -> tuple[dict[str, Any], int]:
    """Prune; take up an interrupted demo where it can be. Returns metrics and the reference prompt's text tokens."""
    from comp_edge.budget import Budget
    from comp_edge.checkpoint import load_dense, load_processor
    from comp_edge.pruning import prune
    from comp_edge.session import STATE_FILE, WORK_SUFFIX
    from comp_edge.settings import Progress
    from comp_edge.tasks import load_task
    from comp_edge.units import text_tokens

    processor = load_processor(MODEL)

    def attempt(resume: bool) -> Any:
        detail = ""

        def on_progress(progress: Progress) -> None:
            nonlocal detail
            detail = f": {progress.message}" if progress.message else detail
            clock.show("prune", progress.done / max(progress.total, 1), detail)

        return prune(
            load_dense(MODEL),
            load_task(TASK, processor),
            budget=Budget(macs=arguments.keep),
            strategy=arguments.strategy,
            out=folder,
            seed=arguments.seed,
            processor=processor,
            base=MODEL,
            resume=resume,
            on_progress=on_progress,
        )

    clock.show("prune", 0.0)
    interrupted = (folder.with_name(folder.name + WORK_SUFFIX) / STATE_FILE).is_file()
    try:
        result = attempt(resume=interrupted)
    except InputError:
        if not interrupted:
            raise
        result = attempt(resume=False)  # what was interrupted was another run
    return result.metrics, text_tokens(result.model, result.plan)


def _score_lifted(folder: Path, requests: Path) -> float:
    """Test score with every drop inside the language model lifted; also writes the requests that exports compare on."""
    from comp_edge.checkpoint import load_pretrained, load_processor
    from comp_edge.schedule import lift_language_drops
    from comp_edge.tasks import load_task

    task: Any = load_task(TASK, load_processor(folder))
    write_requests(task, requests, count=QUESTIONS)
    model = load_pretrained(folder)
    lift_language_drops(model)
    return task.score(model, task.test_batches())


def write_requests(task: Any, path: Path, *, count: int) -> None:
    """The first test questions with their images, as the exporters take them (`--golden`)."""
    from safetensors.torch import save_file

    batch = task.batch("test", list(range(count)))
    questions = [task.split("test").questions[i][1] for i in batch["question_ids"].tolist()]
    metadata = {"questions": json.dumps(questions)}
    save_file({"pixel_values": batch["pixel_values"].contiguous()}, path, metadata=metadata)


def _json_of(module: str, arguments: Sequence[Any]) -> dict[str, Any]:
    """Run `python -m module ... --json` and decode what it prints.

    Raises:
        StepFailed: it failed; with the last thing that it said.
    """
    command = [sys.executable, "-m", module, *map(str, arguments), "--json"]
    with tempfile.TemporaryFile("w+") as errors:
        # Two exports run side by side, so each gets one thread. The terminal's Ctrl-C reaches the children as well.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        errors.seek(0)
        said = [line for line in errors.read().splitlines() if line.strip()]
    # The conformance tests print their findings also when something failed, and exit with 1.
    if done.returncode == 0 or module == "runtime_tests" and done.returncode == 1 and done.stdout.strip():
        return json.loads(done.stdout)
    raise StepFailed(f"`{' '.join(command[1:])}` failed: {said[-1] if said else f'exit code {done.returncode}'}")


def _first_token(bundle: dict[str, Any]) -> float:
    return bundle["latency_ms"]["first_token"]["steady"]


def _verified(result: dict[str, Any]) -> bool:
    lowered = result["executorch"].values()
    return all(result["runtime_tests"].values()) and all(profile["tokens_equal"] for profile in lowered)


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    dense, pruned = result["dense"], result["pruned"]
    table = Table(title=f"{MODEL} on {TASK}", title_justify="left")
    for column in ("", "dense", "pruned", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("test score (exact match)", f"{dense['score']:.4f}", f"{pruned['score']:.4f}", "")
    ratio = dense["macs"] / pruned["macs"]
    table.add_row("MACs a request", f"{dense['macs'] / 1e6:.1f} M", f"{pruned['macs'] / 1e6:.1f} M", f"{ratio:.2f}x")
    for profile, row in result["executorch"].items():
        before, after = dense["latency_ms"], row["latency_ms"]
        name = f"first token, ExecuTorch {profile}"
        table.add_row(name, f"{before:.2f} ms", f"{after:.2f} ms", f"{before / after:.2f}x")
    console = Console(soft_wrap=True)
    console.print(table)
    for profile, row in result["executorch"].items():
        equal = "tokens equal" if row["tokens_equal"] else "TOKENS DIFFER"
        if row["ambiguous"]:
            count = f"{row['ambiguous']} of {row['questions']}"
            equal += f"; {count} requests left to rounding: {row['ambiguous_max_abs_error']:.1e}"
        console.print(
            f"ExecuTorch {profile}: {row['path']}, error {row['max_abs_error']:.1e}, {equal}", highlight=False
        )
    apple = result["coreml"]
    console.print(
        f"Core ML: {apple['path']}, error fp32 {apple['fp32_max_abs_error']:.1e}, fp16 {apple['fp16_max_abs_error']:.1e}, "
        f"kept sets equal in {apple['kept_set_agreement']:.1%}",
        highlight=False,
    )
    console.print(f"look at {result['report']}", highlight=False)
