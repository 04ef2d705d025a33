"""What `accelerate launch` starts in the tests: `launched.py FOLDER` leaves there what each process found."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import comp_edge
from comp_edge.errors import InputError
from comp_edge.parallel import launched
from comp_edge.placement import CPU
from tests import tiny
from tests.comp_edge.test_pruning import QUICK


def prune(strategy: str, task: Any = None, **options: Any) -> comp_edge.PruneResult:
    """What the processes do together, and the test alone."""
    task = task or tiny.TinyVQA(tiny.make_processor())
    options = {"budget": comp_edge.Budget(macs=0.5), "config": QUICK, "base": "tiny", **options}
    return comp_edge.prune(options.pop("model", None) or tiny.make_model(), task, strategy=strategy, **options)


def raised(run: Callable[[], Any]) -> str:
    try:
        run()
    except (InputError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class PoisonedSecond(tiny.TinyVQA):
    """The rows of the second process have a loss that is not a number, in the third step."""

    calls = 0

    def logits(self, model: Any, batch: Any) -> torch.Tensor:
        self.calls += model.training
        poison = model.training and self.calls == 3 and launched(CPU).index == 1
        return super().logits(model, batch) * (float("nan") if poison else 1.0)


def main(folder: Path) -> None:
    """Small things first, then whole passes."""
    torch.set_num_threads(1)
    processes = launched(CPU)
    computed: list[int] = []

    def compute() -> str:
        computed.append(processes.index)
        return f"from {processes.index}"

    def refuse() -> None:
        raise InputError("the main process refuses.")

    facts: dict[str, Any] = {"count": processes.count, "once": processes.once(compute), "computed": computed}
    facts["refused"] = raised(lambda: processes.once(refuse))
    facts["sum"] = processes.sum(processes.index + 0.5)
    # Of three parameters both processes have a gradient, one has, none has.
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad = torch.full((2,), 1.0 + processes.index)
    if processes.main:
        parameters[1].grad = torch.full((2,), 5.0)
    processes.sum_gradients(parameters)
    facts["gradients"] = [None if p.grad is None else p.grad.tolist() for p in parameters]
    model = tiny.make_model(seed=processes.index)
    processes.align(model)
    facts["aligned"] = all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), tiny.make_model().state_dict().values(), strict=True)
    )
    facts["poisoned"] = raised(lambda: prune("comp", PoisonedSecond(tiny.make_processor()), evaluate=False))
    told: list[int] = []
    for strategy in ("comp", "probe"):
        result = prune(strategy, out=folder / strategy, on_progress=lambda progress: told.append(progress.step))
        tensors = {name: value.contiguous() for name, value in result.model.state_dict().items()}
        save_file(tensors, folder / f"{strategy}-{processes.index}.safetensors")
        facts[strategy] = {**result.metrics["dense"], **result.metrics["pruned"], "folder": result.folder.is_dir()}
    facts["told"] = len(told)
    (folder / f"facts-{processes.index}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
