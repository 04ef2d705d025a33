"""Silence for the libraries beneath: what they say on import is not meant for who runs a command."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Keep imports of the stack from writing warnings that a user can do nothing about."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    for name in ("torchao", "torch.utils._pytree", "coremltools", "executorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("torch").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
