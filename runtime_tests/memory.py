"""`python -m runtime_tests.memory BUNDLE THREADS`: answer one golden request and print this process's peak memory as JSON."""

from __future__ import annotations

import json
import sys

from devices.memory import peak_memory_mb, resident_memory_mb
from devices.program import set_threads
from export.bundle import Bundle
from export.encoder_runner import EncoderRunner, runner_of


def main(folder: str, threads: int) -> dict[str, float] | None:
    """Peak memory in MB, and what the bundle added to what the runtime had loaded before it."""
    set_threads(threads)
    import tokenizers  # noqa: F401 - so that its own size is not counted as the bundle's
    from executorch.runtime import Runtime

    Runtime.get()
    bundle = Bundle.open(folder)
    texts = bundle.manifest.text is not None
    golden = bundle.text_golden() if texts else bundle.golden()
    before = resident_memory_mb()
    runner = runner_of(bundle)
    if isinstance(runner, EncoderRunner):
        runner.respond(golden.tensors["pixel_values"][:1], golden.tensors["input_ids"][:1])
    else:
        runner.generate(golden.pixel_values[:1], golden.questions[0])
    peak = peak_memory_mb()
    if before is None or peak is None:
        return None
    return {"peak": peak, "program": max(peak - before, 0.0)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
