"""Two processes of one pass, really launched by accelerate, against one process with the same batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import comp_edge
from comp_edge.parallel import ALONE, launched
from comp_edge.placement import CPU
from tests.comp_edge.launched import prune
from tests.comp_edge.test_pruning import QUICK

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5  # of weights: sums of halves round otherwise than sums of wholes


def launch(arguments: Sequence[str], **options: Any) -> subprocess.CompletedProcess:
    """`accelerate launch` of two processes on the CPU, at a port that is free."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=600, env=environment, **options
    )


def test_alone_nothing_is_done() -> None:
    assert launched(CPU) is ALONE and ALONE.main and ALONE.count == 1
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    gradient = parameter.grad
    ALONE.sum_gradients([parameter])
    assert parameter.grad is gradient and ALONE.sum(0.3) == 0.3 and ALONE.once(lambda: "x") == "x"
    assert ALONE.own(3) == slice(0, 3)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    """The same plan and trace as one process, the same weights; what is decided is computed by the main process only."""
    done = launch([str(Path(__file__).with_name("launched.py")), str(tmp_path)])
    assert done.returncode == 0, done.stderr[-3000:]
    facts = [json.loads((tmp_path / f"facts-{rank}.json").read_text()) for rank in range(2)]
    for rank, fact in enumerate(facts):
        assert fact["count"] == 2 and fact["once"] == "from 0" and fact["computed"] == ([] if rank else [0])
        assert fact["refused"] == "InputError: the main process refuses." and fact["sum"] == 2.0
        assert fact["gradients"] == [[3.0, 3.0], [5.0, 5.0], None] and fact["aligned"]
        assert fact["poisoned"].startswith("FloatingPointError: loss nan") and "step 1 of stage 2" in fact["poisoned"]
        assert (fact["told"] > 0) == (rank == 0)
    for strategy in ("comp", "probe"):
        assert facts[0][strategy] == facts[1][strategy] and facts[0][strategy]["folder"]
        own, other = (load_file(tmp_path / f"{strategy}-{rank}.safetensors") for rank in range(2))
        assert all(torch.equal(own[name], value) for name, value in other.items())
        saved = comp_edge.load_pretrained(tmp_path / strategy)
        assert all(torch.equal(own[name], value) for name, value in saved.state_dict().items())
        # Micro-batches of one process are the very rows that the two had.
        for config in (QUICK, replace(QUICK, accumulate=2)):
            alone = prune(strategy, config=config)
            assert alone.plan == saved.comp_edge_plan
            for name, value in alone.model.state_dict().items():
                # Biases of keys have no gradient but rounding, which Adam scales up; they change nothing. (Parts are added
                # up in another order where a process cuts its share of a batch once more.)
                if not name.endswith("k_proj.bias"):
                    torch.testing.assert_close(own[name], value, atol=TOLERANCE, rtol=0, msg=name)
            trace = [json.loads(line) for line in (tmp_path / strategy / "trace.jsonl").read_text().splitlines()]
            for line, expected in zip(trace, alone.trace, strict=True):
                assert [line[k] for k in ("mode", "plan", "score")] == (
                    [expected[k] for k in ("mode", "plan", "score")]
                )
                assert line["loss"] == pytest.approx(expected["loss"], abs=1e-5)


@pytest.mark.slow
def test_the_command_line_speaks_once(tmp_path: Path) -> None:
    """One JSON object on stdout, one folder, nothing of the second process; what is refused is said once, too."""
    task = str(Path(__file__).parents[1] / "tiny.py") + ":TinyVQA"
    prune = ["-m", "comp_edge", "prune", "--model", "llava-digits", "--task", task, "--keep", "0.9"]
    prune += ["--stages", "1", "--stage-steps", "2", "--final-steps", "1", "--val-examples", "15", "--strategy", "comp"]
    done = launch([*prune, "--no-eval", "--json", "-o", "out"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads(done.stdout)
    assert metrics["macs_kept"] <= 0.9 and done.stderr.count("fine-tune: ") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "report.html").is_file()
    refused = launch([*prune, "--resume", "-o", "out"], cwd=tmp_path)
    assert refused.returncode != 0 and refused.stderr.count("there is nothing to resume") == 1
