"""What all command lines share: errors, JSON on stdout, progress on stderr."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from comp_edge.errors import InputError
from comp_edge.quiet import quiet_libraries

BAD_INPUT = 2
INTERRUPTED = 130
MODEL_HELP = "a reference model, a folder (dense or pruned), a hub id, or random:SHAPE (see comp-edge inspect --list)"
LOWERING_JOBS = min(2, os.cpu_count() or 1)  # each needs a few times the memory of the model's weights
LOWERING_HELP = "processes that lower programs (default: %(default)s)"
TASK_HELP = "digit_vqa, digit_pairs, easy_vqa, synthetic or path/to/file.py:ClassName"
TORCH_DEVICE_HELP = "where torch computes, such as cuda:1, xpu or cpu (default: cuda where there is one)"
DTYPES = ("float32", "bfloat16", "float16")


def dtype(name: str) -> Any:
    """The torch dtype of this name."""
    import torch

    return getattr(torch, name)


class Parser(argparse.ArgumentParser):
    """argparse that keeps examples as they are typed, and reports bad input in one line with exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> None:
        """One sentence on stderr, exit code 2."""
        self.exit(BAD_INPUT, f"{self.prog}: {message}. See '{self.prog} --help'.\n")


def fraction(text: str) -> float:
    """An argparse type: a number strictly between 0 and 1."""
    return _number(text, lambda v: 0 < v < 1, "a number between 0 and 1 (both exclusive)")


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    return _number(text, lambda v: v > 0, "a number above 0")


def above_one(text: str) -> float:
    """An argparse type: a number above 1."""
    return _number(text, lambda v: 1 < v < float("inf"), "a number above 1")


def count(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    return int(_number(text, lambda v: v >= 1 and v == int(v), "an integer of at least 1"))


def natural(text: str) -> int:
    """An argparse type: an integer of at least 0."""
    return int(_number(text, lambda v: v >= 0 and v == int(v), "an integer of at least 0"))


def _number(text: str, accept: Callable[[float], bool], wanted: str) -> float:
    try:
        value = float(text)
        good = accept(value)
    except (ValueError, OverflowError):
        good = False
    if not good:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def run(command: Callable[[], Any], *, name: str) -> int:
    """Run a command, with quiet libraries; turn what a user did into one sentence and an exit code."""
    quiet_libraries()
    try:
        with _ends_as_by_ctrl_c():
            result = command()
        return result if isinstance(result, int) else 0
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return BAD_INPUT
    except FloatingPointError as error:
        print(f"{name}: {error}; the last checkpoint is intact, lower --lr and go on with --resume.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"\n{name}: interrupted; nothing is half-written. Go on with --resume where there is one.", file=sys.stderr
        )
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; that is theirs to decide.
        sys.stderr.close()
        return 0


@contextmanager
def _ends_as_by_ctrl_c() -> Iterator[None]:
    """A kill, or a terminal that is closed, ends a command as Ctrl-C does: what was changed on a device is put back."""
    if threading.current_thread() is not threading.main_thread():  # others may set no handlers
        yield
        return
    # What is ignored (`nohup`) or handled already stays so.
    ours = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is signal.SIG_DFL]
    for one in ours:
        signal.signal(one, signal.default_int_handler)
    try:
        yield
    finally:
        for one in ours:
            signal.signal(one, signal.SIG_DFL)


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar with time left on stderr; yields `update(done, total, description)`.

    Where stderr is no terminal, a line every ten per cent instead.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        last = -1

        def plain(done: int, total: int, text: str) -> None:
            nonlocal last
            tenth = done * 10 // max(total, 1)
            if tenth != last:
                last = tenth
                print(f"{text}: {done}/{total}", file=sys.stderr, flush=True)

        yield plain
        return
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(description, total=None)
        yield lambda done, total, text: progress.update(bar, completed=done, total=total, description=text)


def main(commands: Sequence[Any], *, parser: Parser, argv: Sequence[str] | None) -> int:
    """Parse and run: each command module has `add(subparsers)` and `run(arguments)`."""
    sub = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for command in commands:
        command.add(sub)
    arguments = parser.parse_args(argv)
    return run(lambda: arguments.run(arguments), name=f"{parser.prog} {arguments.command}")
