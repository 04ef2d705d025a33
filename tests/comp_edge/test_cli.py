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
import torch

from comp_edge.checkpoint import load_dense, load_pretrained
from comp_edge.cli.main import main
from comp_edge.cost import macs
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
    # What is left can be pruned again; the share is of what is left.
    again = [
        "prune",
        "--model",
        str(out),
        "--task",
        TASK,
        "--keep",
        "0.9",
        "-o",
        str(tmp_path / "again"),
        *QUICK,
        "--json",
    ]
    assert main(again) == 0
    assert json.loads(capsys.readouterr().out)["pruned"]["macs"] <= 0.9 * metrics["pruned"]["macs"]


def test_without_training(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "pruned"
    options = ["--keep", "0.6", "--train-steps", "0", "--stages", "3", "--dtype", "bfloat16", "--val-examples", "20"]
    assert main(["prune", "--model", str(dense), "--task", TASK, "-o", str(out), *options, "--no-eval"]) == 0
    captured = capsys.readouterr()
    assert "val score" in captured.out and "GiB" in captured.err
    model, whole = load_pretrained(out), load_dense(str(dense), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    # Nothing was trained: what is left are slices of the dense weights.
    head = model.model.language_model.layers[0].mlp.down_proj.weight
    kept = list(model.comp_edge_plan.streams["language"].layers[0].ffn)
    assert torch.equal(head, whole.model.language_model.layers[0].mlp.down_proj.weight[:, kept])
    message = fails(
        capsys, "prune", "--model", dense, "--task", TASK, "-o", out, "--train-steps", "4", "--final-steps", "1"
    )
    assert "leave out --stage-steps and --final-steps" in message


@pytest.mark.parametrize("label", ["joint:importance=taylor", "probe"])
def test_the_report_of_every_kind_of_strategy(dense: Path, tmp_path: Path, label: str) -> None:
    """Of one whose stages have no prices, too."""
    out = tmp_path / "pruned"
    assert main(["prune", "--model", str(dense), "--task", TASK, "-o", str(out), "--strategy", label, *QUICK]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert ("loss at the end" in page) == (label == "probe") and "of all candidates" not in page
    assert json.loads((out / "plan.json").read_text())["strategy"] == label.partition(":")[0]


def test_inspect(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(dense), "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["streams"]["vision"]["drops_before_layers"] == [1, 2] and not whole["pruned"]
    assert whole["macs"] == macs(load_dense(str(dense)))
    assert main(["inspect", str(dense / "config.json")]) == 0  # a config alone
    assert "vision tokens may be dropped before layers 1-2" in capsys.readouterr().out
    assert main(["inspect", "random:qwen2.5-vl-3b", "--json", "--decode-tokens", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["streams"]["vision"]["drops_behind_connector"] and found["parameters"] == 3_754_622_976
    assert found["macs"]["total"] > found["macs"]["vision"] + found["macs"]["connector"] + found["macs"]["prefill"]
    assert main(["inspect", "--list", "--json"]) == 0
    assert "smolvlm-256m" in json.loads(capsys.readouterr().out)["shapes"]
    assert "no model was given" in fails(capsys, "inspect")
    assert "no shape is named 'giant'" in fails(capsys, "inspect", "random:giant")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "model type 'bert' is not supported" in fails(capsys, "inspect", tmp_path / "config.json")


@pytest.mark.parametrize("command", ["", "demo", "inspect", "train", "prune", "eval", "report"])
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
        ({"--strategy": "best"}, "unknown strategy 'best'; give one of params, tokens, joint, comp, probe"),
        ({"--model": "lava"}, "unknown model 'lava': give a shipped model (blip-digits, clip-digits, llava-digits)"),
        ({"--task": "vqa"}, "unknown task 'vqa': give one of digit_pairs, digit_vqa, easy_vqa, synthetic, or path/to/"),
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
        command = [sys.executable, "-m", "comp_edge", *arguments, "-o", str(tmp_path / name), *more]
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
