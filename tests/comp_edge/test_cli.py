"""The command line: exit codes, one clear sentence, JSON on stdout only, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from comp_edge.cli.main import main
from tests import tiny

TASK = f"{tiny.__file__}:TinyVQA"
QUICK = ["--stages", "4", "--stage-steps", "2", "--final-steps", "2", "--round-to", "8"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "tiny"
    tiny.make_model().save_pretrained(folder)
    tiny.make_processor().save_pretrained(folder)
    return folder


def fails(capsys: pytest.CaptureFixture, *arguments: Any) -> str:
    """Run a command that must refuse its input; what it says."""
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as exit_:  # argparse leaves this way
        code = exit_.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and "Traceback" not in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    return captured.err


def test_prune_eval_and_json(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "pruned"
    assert (
        main(["prune", "--model", str(dense), "--task", TASK, "--keep", "0.4", "-o", str(out), *QUICK, "--json"]) == 0
    )
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["macs_kept"] <= 0.4 and (out / "report.html").is_file()
    assert main(["eval", str(out), "--task", TASK, "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["score"] == metrics["pruned"]["test_score"] and scored["macs"]["total"] == metrics["pruned"]["macs"]
    assert main(["eval", str(out), "--task", TASK, "--deploy", "stock", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["macs"]["total"] >= scored["macs"]["total"]
    assert "already" in fails(capsys, "prune", "--model", out, "--task", TASK, "-o", tmp_path / "again")


@pytest.mark.parametrize("command", ["", "demo", "train", "prune", "eval", "report"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command.split(), "--help"])
    assert exit_.value.code == 0 and f"comp-edge {command}".strip() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--keep": "1.5"}, "'1.5' is not a number between 0 and 1"),
        ({"--keep": "0"}, "'0' is not a number between 0 and 1"),
        ({"--keep": "much"}, "'much' is not a number between 0 and 1"),
        ({"--keep": "0.001"}, "asks for 0.0010 of the dense cost; the lowest"),
        ({"--strategy": "best"}, "unknown strategy 'best'; give one of comp, probe"),
        ({"--model": "lava"}, "unknown model 'lava': give a shipped model (llava-digits)"),
        ({"--task": "vqa"}, "unknown task 'vqa': give one of digit_vqa, easy_vqa, or path/to/file.py:ClassName"),
        ({"--task": "nowhere.py:Task"}, "task file 'nowhere.py' does not exist"),
        ({"--task": f"{tiny.__file__}:Nope"}, "has no class 'Nope'"),
        ({"--modes": "cross_params"}, "mode 'cross_params' is not one of the model's"),
        ({"--out": "/proc/nowhere"}, "output '/proc/nowhere' cannot be written"),
    ],
)
def test_bad_input_to_prune(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture, options: dict[str, str], message: str
) -> None:
    given = {"--model": str(dense), "--task": TASK, "--out": str(tmp_path / "x"), **options}
    assert message in fails(capsys, "prune", *[part for pair in given.items() for part in pair])
    assert not (tmp_path / "x").exists()


def test_bad_input_to_others(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "COMMAND" in fails(capsys)
    assert "is not a model folder" in fails(capsys, "eval", tmp_path, "--task", TASK)
    assert "unknown strategy 'x'" in fails(capsys, "demo", "-o", tmp_path / "d", "--strategy", "x")
    assert not (tmp_path / "d").exists()
    assert "unknown task" in fails(capsys, "train", "--task", "x", "--model", "llava-digits", "-o", tmp_path / "t")
    assert "there is nothing to resume" in fails(
        capsys, "prune", "--model", "llava-digits", "--task", TASK, "-o", tmp_path / "r", "--resume"
    )


def test_images_of_another_size_are_refused(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = shutil.copytree(dense, tmp_path / "small")
    file = folder / "processor_config.json"
    values = json.loads(file.read_text())
    values["image_processor"]["size"] = values["image_processor"]["crop_size"] = {"height": 32, "width": 32}
    file.write_text(json.dumps(values))
    message = "the task gives images of 32x32 pixels, the model takes 64x64"
    assert message in fails(capsys, "eval", folder, "--task", TASK)
    assert message in fails(capsys, "prune", "--model", folder, "--task", TASK, "-o", tmp_path / "x")


@pytest.mark.slow
def test_training_from_the_command_line(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "trained"
    arguments = ["train", "--task", TASK, "--model", str(dense), "-o", str(out), "--steps", "3", "--images", "2"]
    assert main([*arguments, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["steps"] == 3 and json.loads((out / "metrics.json").read_text()) == metrics
    assert main(["eval", str(out), "--task", TASK, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == metrics["test_score"]


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_half_written_and_resumes(dense: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    arguments = ["prune", "--model", str(dense), "--task", TASK, "--keep", "0.4", *QUICK, "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}

    def start(name: str, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "comp_edge.cli.main", *arguments, "-o", str(tmp_path / name), *more]
        return subprocess.Popen(
            command,
            cwd=root,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A suite that runs in the background ignores Ctrl-C, and its children would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    process = start("cut")
    checkpoint = tmp_path / "cut.work" / "state.safetensors"
    deadline = time.time() + 300
    while time.time() < deadline and process.poll() is None and not checkpoint.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and out == "" and "interrupted" in err and "Traceback" not in err
    assert not (tmp_path / "cut").exists()
    resumed, whole = start("cut", "--resume"), start("whole")
    assert resumed.wait(timeout=300) == whole.wait(timeout=300) == 0
    assert (tmp_path / "cut" / "plan.json").read_bytes() == (tmp_path / "whole" / "plan.json").read_bytes()
