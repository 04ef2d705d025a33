"""`comp-edge bench method` at work: cells are whole, resumed, never repeated, and equal whoever runs them."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

import comp_edge.train
from comp_edge.bench.method.cell import FOLDER, OPTIONS_FILE, ROWS_FILE
from comp_edge.bench.method.grid import slug
from comp_edge.bench.method.pool import Failure, Job, run_jobs
from comp_edge.bench.method.results import KEYS
from comp_edge.cli import common
from comp_edge.cli.main import main
from comp_edge.reference import REFERENCE_MODELS
from comp_edge.session import STATE_FILE, WORK_SUFFIX
from comp_edge.settings import PruneConfig
from tests import tiny

TASK = f"{tiny.__file__}:TinyVQA"
MODEL = f"tiny@{TASK}"
STEPS = 8
OPTIONS = "stages=3,stage_steps=2,val_examples=30,calibration_batches=1,round_to=8"
MEASURED = ("selection_seconds", "training_seconds", "scoring_seconds", "peak_memory_bytes")


def make_model(seed: int = 0) -> tuple[Any, Any]:
    """A model of two layers a stream, and its processor."""
    return tiny.make_model(seed=seed, vision_layers=2, language_layers=2), tiny.make_processor()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    for seed in (0, 1):
        for part in make_model(seed):
            part.save_pretrained(folder / f"{slug(MODEL)}-{seed}")
    return folder


@pytest.fixture(scope="module")
def command(dense: Path) -> Callable[..., list[str]]:
    """The command line of a small run, with more arguments behind."""

    def build(out: Path, *more: Any) -> list[str]:
        options = ["--dense", dense, "--steps", STEPS, "--options", OPTIONS, "-o", out, "--jobs", 1, "--json"]
        chosen = ["--strategies", "params", "comp", "--reductions", 0.4, "--dense-seeds", 0]
        return [str(part) for part in ("bench", "method", MODEL, *options, *chosen, *more)]

    return build


def results_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def decided(out: Path) -> list[dict[str, Any]]:
    """The cells of a run without what depends on the machine."""
    return [{k: v for k, v in cell.items() if k not in MEASURED} for cell in results_of(out)["cells"]]


@pytest.fixture(scope="module")
def whole(command: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("bench") / "whole"
    assert main(command(out)) == 0
    return out


def test_what_a_run_leaves(whole: Path, command: Any, capsys: pytest.CaptureFixture) -> None:
    results = results_of(whole)
    cells = results["cells"]
    assert [cell["strategy"] for cell in cells] == ["params", "comp"] and results["failures"] == []
    for cell in cells:
        assert set(KEYS) <= set(cell) and cell["model"] == MODEL and cell["task"] == TASK
        assert cell["steps"] == STEPS and cell["samples"] == STEPS * 12  # four images, three questions each
        assert cell["macs"] <= 0.6 * cell["dense_macs"] and 0 <= cell["score"] <= 1
        # What the modes removed is all that is gone, and `params` has removed no tokens.
        assert sum(cell["modes"].values()) == pytest.approx(1 - cell["macs"] / cell["dense_macs"])
        assert min(cell[name] for name in MEASURED) > 0
    assert {mode.rsplit("_", 1)[1] for mode in cells[0]["modes"]} == {"params"}
    assert {mode.rsplit("_", 1)[1] for mode in cells[1]["modes"]} == {"params", "tokens"}
    assert len({cell["options"]["dense_weights"] for cell in cells}) == 1
    assert [path.name for path in (whole / "work").iterdir()] == []
    written = {
        "accuracy.png",
        "cells",
        "dense",
        "modes.png",
        "results.json",
        "selection.png",
        "table.md",
        "work",
        ".lock",
    }
    assert {path.name for path in whole.iterdir()} == written
    # The same command again runs nothing; the results can be had from the cells alone.
    times = {path: path.stat().st_mtime_ns for path in (whole / "cells").iterdir()}
    (whole / "table.md").unlink()
    (whole / "modes.png").unlink()
    capsys.readouterr()
    assert main(command(whole)) == 0
    assert json.loads(capsys.readouterr().out)["cells"] == cells
    assert {path: path.stat().st_mtime_ns for path in (whole / "cells").iterdir()} == times
    (whole / "results.json").unlink()
    assert main(["bench", "method", "-o", str(whole), "--redo", "--ours", "comp"]) == 0
    assert "`comp` minus" in capsys.readouterr().out
    assert results_of(whole)["cells"] == cells and (whole / "modes.png").is_file() and (whole / "table.md").is_file()


@contextmanager
def stopping(update: Callable[[str], bool]) -> Iterator[None]:
    """Ctrl-C when `update` says so of what the progress bar shows."""

    @contextmanager
    def bar(description: str) -> Iterator[Callable[[int, int, str], None]]:
        def show(done: int, total: int, text: str) -> None:
            assert 0 <= done <= total
            if update(text):
                raise KeyboardInterrupt

        yield show

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "progress_bar", bar)
        yield


def test_an_interrupted_cell_goes_on_where_it_was(whole: Path, command: Any, tmp_path: Path) -> None:
    """Also steps that were taken after the checkpoint and have to be taken again count once."""
    seen: list[str] = []

    def late(text: str) -> bool:
        seen.append(text)
        return " comp " in text and "stage 2" in text and "stage 2" in seen[-2]

    with stopping(late):
        assert main(command(tmp_path)) == 130
    (work,) = (tmp_path / "work").iterdir()
    assert (work / OPTIONS_FILE).is_file() and (work / (FOLDER + WORK_SUFFIX) / STATE_FILE).is_file()
    booked = [json.loads(line) for line in (work / ROWS_FILE).read_text().splitlines()]
    assert [step for step, _ in booked] == [1, 2, 3, 4, 5]
    assert len(list((tmp_path / "cells").iterdir())) == 1
    with stopping(lambda text: " params " in text):  # is finished, so that it is not run again
        assert main(command(tmp_path)) == 0
    assert decided(tmp_path) == decided(whole)
    assert not list((tmp_path / "work").iterdir())


def test_a_cell_that_only_lacks_its_score(whole: Path, command: Any, tmp_path: Path) -> None:
    with stopping(lambda text: " comp " in text and text.endswith(": score")):
        assert main(command(tmp_path)) == 130
    with stopping(lambda text: " comp " in text and not text.endswith(": score")):
        assert main(command(tmp_path)) == 0
    assert decided(tmp_path) == decided(whole)


def test_what_is_no_result(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A reduction out of reach is refused and reported; other steps than the run's are an error."""
    more = ["--strategies", "tokens", "params", "--reductions", 0.4, 0.9]
    assert main(command(tmp_path, *more)) == 0
    captured = capsys.readouterr()
    failures = json.loads(captured.out)["failures"]
    assert {(f["strategy"], f["reduction"]) for f in failures} >= {("tokens", 0.9)}
    assert all(f["kind"] == "refused" and "can reach is" in f["reason"] for f in failures)
    assert "refused: tiny@" in captured.err and "| refused | the budget asks for" in (tmp_path / "table.md").read_text()
    assert not list((tmp_path / "work").iterdir())
    more_steps = functools.partialmethod(lambda self, stages: max(0, self.total_steps - stages * self.stage_steps) + 1)
    monkeypatch.setattr(PruneConfig, "steps_after", more_steps)
    assert main(command(tmp_path, "--strategies", "joint")) == 1
    *before, failure = sorted(json.loads(capsys.readouterr().out)["failures"], key=lambda f: f["strategy"] == "joint")
    assert failure["kind"] == "failed" and "step 9 was taken; every cell of this run takes 8" in failure["reason"]
    assert not list((tmp_path / "cells").glob("*joint*"))
    assert {f["strategy"] for f in before} == {"params", "tokens"}, "those of the run before stay"


def fails(capsys: pytest.CaptureFixture, arguments: list[str]) -> str:
    """Run a command that must refuse its input; what it says."""
    try:
        code = main(arguments)
    except SystemExit as exit_:  # argparse leaves this way
        code = exit_.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if "comp-edge bench" in line]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--reductions", "1.2"], "'1.2' is not a number between 0 and 1"),
        (["--dense-seeds", "-1"], "'-1' is not an integer of at least 0"),
        (["--strategies", "best"], "unknown strategy 'best'; give one of params"),
        (["--strategies", "comp:cip=maybe"], "gives 'cip' as 'maybe'"),
        (["--ours", "joint"], "--ours 'joint' is not among the strategies: params, comp"),
        (["--prune-seeds", "1", "2"], "1 dense seeds and 2 pruning seeds make no pairs"),
        (["--dense-seeds", "7"], "tiny.py+TinyVQA-7' does not exist; --dense must hold every seed's"),
        (["--dense", "nowhere"], "--dense 'nowhere' is no folder"),
        (["--out", "/proc/nowhere"], "output '/proc/nowhere' cannot be written"),
        (["--redo"], "holds no finished cells; run the command without --redo first"),
    ],
)
def test_bad_input(command: Any, tmp_path: Path, capsys: Any, more: list[str], message: str) -> None:
    assert message in fails(capsys, command(tmp_path / "x", *more))
    assert not (tmp_path / "x").exists() or not list((tmp_path / "x").glob("[!.]*"))


def test_other_options_in_the_same_folder(whole: Path, command: Any, dense: Path, tmp_path: Path, capsys: Any) -> None:
    before = results_of(whole)
    message = fails(capsys, command(whole, "--options", OPTIONS + ",lr=1e-4"))
    assert "holds tiny@" in message and "params 0.4 seeds 0/0 with lr None, this run has 0.0001" in message
    # Another cell, but other steps than those that are there.
    other = fails(capsys, command(whole, "--strategies", "joint", "--options", f"{OPTIONS},distill=0.1"))
    assert "with distill 0.7, this run has 0.1" in other, "a recovery that the cells beside it do not have"
    assert "with steps 8, this run has 9" in fails(capsys, command(whole, "--strategies", "joint", "--steps", 9))
    other = tmp_path / f"{slug(MODEL)}-0"
    for part in make_model(5):
        part.save_pretrained(other)
    assert "with dense_weights " in fails(capsys, command(whole, "--dense", tmp_path))
    beside = fails(capsys, command(whole, "--dense", tmp_path, "--strategies", "joint"))
    assert "of dense seed 0 with dense_weights " in beside, "another cell would be compared with those of another model"
    (other / "metrics.json").write_text('{"task": "easy_vqa", "seed": 0}')
    assert "was trained on 'easy_vqa'" in fails(capsys, command(whole, "--dense", tmp_path))
    (other / "plan.json").write_text("{}")
    assert "is pruned already; give a dense model" in fails(capsys, command(whole, "--dense", tmp_path))
    with (whole / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another run is at work in" in fails(capsys, command(whole))
    assert results_of(whole) == before


def test_an_unfinished_cell_is_not_taken_up_with_other_options(command: Any, tmp_path: Path, capsys: Any) -> None:
    with stopping(lambda text: "stage 1" in text):
        assert main(command(tmp_path)) == 130
    assert "give the same command again to go on" in capsys.readouterr().err
    assert "params 0.4 seeds 0/0 with distill 0.7, this run has 0.1" in fails(
        capsys, command(tmp_path, "--options", OPTIONS + ",distill=0.1")
    )


def test_help_has_an_example(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "method", "--help"])
    assert exit_.value.code == 0 and "comp-edge bench method --quick" in capsys.readouterr().out


# ---- jobs


def note(path: Path, name: str, tell: Callable[[int, str], None]) -> None:
    """A job that leaves a line."""
    tell(1, "noting")
    with path.open("a") as file:
        file.write(f"{name}\n")


def refuse(tell: Any) -> None:
    raise comp_edge.InputError("this is refused.")


def die(tell: Any) -> None:
    os._exit(3)


def jobs(path: Path, **others: Callable) -> list[Job]:
    """b needs a, and so does c; d needs nothing."""
    calls = {name: functools.partial(note, path, name) for name in "abcd"} | others
    return [Job(name, calls[name], 2, name, "a" if name in "bc" else None) for name in "bacd"]


def run_here(given: list[Job], workers: int = 1) -> tuple[list[Failure], list[str], list[tuple[int, str]]]:
    ended: list[str] = []
    told: list[tuple[int, str]] = []
    failures = run_jobs(
        given, workers=workers, on_progress=lambda n, text: told.append((n, text)),
        on_end=lambda job, failure: ended.append(job.key),
    )  # fmt: skip
    return failures, ended, told


def test_jobs_wait_for_what_they_need(tmp_path: Path) -> None:
    failures, ended, told = run_here(jobs(tmp_path / "log"))
    assert failures == [] and ended == ["a", "b", "c", "d"] == (tmp_path / "log").read_text().split()
    assert told == [(1, "a: noting"), (3, "b: noting"), (5, "c: noting"), (7, "d: noting")]


def test_what_needs_a_failed_job_fails_and_the_rest_is_done(tmp_path: Path) -> None:
    failures, ended, _ = run_here(jobs(tmp_path / "log", a=refuse))
    assert [(f.key, f.kind) for f in failures] == [("a", "refused"), ("b", "refused"), ("c", "refused")]
    assert failures[1].reason == "a is missing: this is refused."
    assert (tmp_path / "log").read_text().split() == ["d"]


@pytest.mark.slow
def test_a_worker_that_dies_takes_its_job_with_it_and_no_other(tmp_path: Path) -> None:
    failures, ended, _ = run_here(jobs(tmp_path / "log", d=die), workers=2)
    assert [(f.key, f.kind, f.reason) for f in failures] == [("d", "failed", "its process ended with exit code 3")]
    assert sorted((tmp_path / "log").read_text().split()) == ["a", "b", "c"] and sorted(ended) == list("abcd")


# ---- whole processes


@pytest.mark.slow
def test_killed_with_its_workers_and_resumed(whole: Path, command: Any, tmp_path: Path) -> None:
    """`kill -9` on the main process: the workers go too, and the same command gives what an undisturbed run gives."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    arguments = [sys.executable, "-m", "comp_edge", *command(tmp_path, "--jobs", 2)]

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            arguments, cwd=root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    process = start()
    deadline = time.time() + 300
    while time.time() < deadline and process.poll() is None:
        if list(tmp_path.glob(f"work/*/{FOLDER}{WORK_SUFFIX}/{STATE_FILE}")):
            break  # a worker is in the middle of a cell
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    assert not psutil.wait_procs(children, timeout=30)[1]
    assert not (tmp_path / "results.json").exists() or len(decided(tmp_path)) < 2
    again = start()
    out, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    assert json.loads(out) == results_of(tmp_path) and decided(tmp_path) == decided(whole)


@pytest.mark.slow
def test_dense_models_are_trained_as_the_command_trains_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REFERENCE_MODELS, "tiny", make_model)
    monkeypatch.setattr(comp_edge.train, "CHUNK", 2)
    arguments = [
        "bench", "method", MODEL, "--steps", "4", "--options", OPTIONS,
        "--strategies", "params", "--reductions", "0.3", "--dense-seeds", "0", "1", "--dense-steps", "4",
        "--jobs", "1", "-o", str(tmp_path / "out"),
    ]  # fmt: skip
    with stopping(lambda text: "dense model" in text and "-1: train" in text and len(seen.append(text) or seen) == 3):
        seen: list[str] = []
        assert main(arguments) == 130
    cells = list((tmp_path / "out" / "cells").iterdir())
    assert len(cells) == 1  # the seed that was there is finished before another model is trained
    with stopping(lambda text: len(again.append(text) or again) < 0):
        again: list[str] = []
        assert main(arguments) == 0
    assert sum("-1: train" in text for text in again) == 2  # the other two steps were in the checkpoint
    train = ["train", "--task", TASK, "--model", "tiny", "--steps", "4", "--seed", "1", "-o", str(tmp_path / "train")]
    assert main(train) == 0
    trained = tmp_path / "out" / "dense" / f"{slug(MODEL)}-1"
    first, second = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "train"))
    assert first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)
    assert {cell["dense_seed"] for cell in results_of(tmp_path / "out")["cells"]} == {0, 1}
    # They can be given to another run; trained otherwise they are refused.
    elsewhere = [str(tmp_path / "elsewhere") if a == str(tmp_path / "out") else a for a in arguments]
    assert main([*elsewhere, "--dense", str(tmp_path / "out" / "dense")]) == 0
    assert decided(tmp_path / "elsewhere") == decided(tmp_path / "out")
    assert main([*arguments, "--dense-steps", "5"]) == 2


@pytest.mark.slow
def test_the_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """On the shipped model, with fewer steps still."""
    fewer = ["--strategies", "params", "probe", "--reductions", "0.5", "--steps", "10", "--test-examples", "250"]
    options = ["--options", "stages=3,stage_steps=2,val_examples=50"]
    assert main(["bench", "method", "llava-digits", "--quick", *fewer, *options, "-o", str(tmp_path), "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [(cell["strategy"], cell["steps"]) for cell in cells] == [("params", 10), ("probe", 10)]
    assert all(cell["samples"] == 960 and cell["dense_score"] > 0.97 for cell in cells)
    assert "| 50 % | `params` |" in (tmp_path / "table.md").read_text()
