"""What every worker process of this package does first."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait

import torch

from comp_edge.quiet import quiet_libraries


def begin_worker() -> None:
    """One thread, deaf to Ctrl-C, which is for the parent, and gone when the parent has gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    quiet_libraries()


def _die_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
