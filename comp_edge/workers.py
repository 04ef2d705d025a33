"""What every worker process of this package does first."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import wait

import torch


def begin_worker(initialize: Callable[[], None]) -> None:
    """One thread, deaf to Ctrl-C, which is for the parent, and gone when the parent has gone, however it went.

    Args:
        initialize: called at the end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    initialize()


def _die_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
