"""Runs a pass again and again, each time killed by SIGKILL at another point, until nothing is left to do.

    python -m tests.comp_edge.killing STRATEGY FOLDER

Every run is a process of its own, forked once torch and transformers are there. `FOLDER/whole` is what comes out of a run
that nobody disturbs, `FOLDER/killed` of those that were killed, and each point that really killed one is printed on a line.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import comp_edge
from comp_edge import files, optim, session
from comp_edge.settings import PruneConfig
from tests import tiny

CONFIG = PruneConfig(
    stages=3, stage_steps=3, final_steps=5, val_examples=15, calibration_batches=1, round_to=8, lr=1e-3, matrix_lr=1e-3
)
KILLED = "killed"  # the folder's name
CHUNK = 2  # steps of fine-tuning between checkpoints: two of them, and one step that is not in any


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def model() -> Any:
    """With dropout, so that a resumed run must draw the same random numbers too."""
    made = tiny.make_model()
    for layer in made.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.2
    return made


def prune(strategy: str, out: Path, on_progress: Callable[[Any], None] = lambda progress: None) -> None:
    torch.manual_seed(os.getpid())  # no run may depend on what was drawn before it
    comp_edge.prune(
        model(), tiny.TinyVQA(tiny.make_processor()), budget=comp_edge.Budget(macs=0.5), config=CONFIG, base="tiny",
        strategy=strategy, out=out, resume=(out.parent / f"{out.name}.work" / session.STATE_FILE).exists(),
        evaluate=False, on_progress=on_progress,
    )  # fmt: skip


def before(owner: Any, name: str, *, call: int = 1) -> Callable[[], None]:
    """Die instead of the n-th call of a function."""

    def arm() -> None:
        genuine, calls = getattr(owner, name), [0]

        def deadly(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == call:
                die()
            return genuine(*args, **kwargs)

        setattr(owner, name, deadly)

    return arm


def after(owner: Any, name: str, *, call: int = 1) -> Callable[[], None]:
    """Die right after the n-th call of a function."""

    def arm() -> None:
        genuine, calls = getattr(owner, name), [0]

        def deadly(*args: Any, **kwargs: Any) -> Any:
            result = genuine(*args, **kwargs)
            calls[0] += 1
            if calls[0] == call:
                die()
            return result

        setattr(owner, name, deadly)

    return arm


def in_the_exchange() -> None:
    """Die when the old folder has been moved away, and the new one is not there yet."""
    genuine = os.replace

    def deadly(source: Any, destination: Any) -> None:
        genuine(source, destination)
        if Path(source).name == KILLED:
            die()

    files.os.replace = deadly


def in_the_clearing() -> None:
    """Die when the new folder is there, and the checkpoint is still there too."""
    genuine = shutil.rmtree

    def deadly(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).name.endswith(session.WORK_SUFFIX):
            die()
        genuine(path, *args, **kwargs)  # what earlier kills left is put away before

    shutil.rmtree = deadly


# In this order one run after the other is killed; each takes up what the one before left.
POINTS: dict[str, Callable[[], None]] = {
    "before anything is written": before(session.Session, "start"),
    "while the dense model is scored": after(tiny.TinyVQA, "score"),
    "while the first checkpoint is written": after(optim, "save_file", call=2),
    "while the first stage is chosen": before(session.Session, "_train_stage"),
    "in the training of the first stage": before(optim.Optimizer, "step_in_parts", call=3),
    "between the first stage and its checkpoint": before(session.Session, "_checkpoint", call=1),
    "between two stages": before(session.Session, "_choose", call=2),
    "while a checkpoint is written": after(optim, "save_file", call=1),
    "in the training of another stage": after(optim.Optimizer, "step_in_parts", call=2),
    "when the plan is decided": before(session.Session, "finish"),
    "in the first chunk of fine-tuning": before(optim.Optimizer, "step_in_parts", call=2),
    "in a later chunk of fine-tuning": before(optim.Optimizer, "step_in_parts", call=4),
    "when all is trained": before(session.Session, "save"),
    "while the folder is written": before(session, "write_card"),
    "while the folders are exchanged": in_the_exchange,
    "before the checkpoint is removed": in_the_clearing,
}


def forked(run: Callable[[], None]) -> int:
    """The exit code of a run in a process of its own; minus the signal that ended it."""
    child = os.fork()
    if not child:
        try:
            run()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the parent's test shall not run on in here
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(strategy: str, folder: Path) -> int:
    """Kill, resume, and so on; 0 when the last run came to its end."""
    torch.set_num_threads(1)
    session.CHUNK = CHUNK
    if code := forked(lambda: prune(strategy, folder / "whole")):
        return code
    out = folder / KILLED
    out.mkdir()
    (out / "old").write_text("what was there before")
    for name, arm in POINTS.items():

        def run(arm: Callable[[], None] = arm) -> None:
            arm()
            prune(strategy, out)

        code = forked(run)
        if code == -signal.SIGKILL:
            found = "nothing" if not out.exists() else "old" if (out / "old").exists() else "new"
            print(f"{name}: {found}", flush=True)
        elif code:
            return code
    return forked(lambda: prune(strategy, out)) if out.with_name(KILLED + session.WORK_SUFFIX).exists() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
