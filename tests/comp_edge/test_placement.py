"""Models on a device that is not the CPU: nothing is left behind there, and the results are the CPU's.

No machine that the tests run on has such a device. `tests.elsewhere` stands in for one, in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch

import comp_edge
from comp_edge import tasks
from comp_edge import train as training
from comp_edge.cli.main import main
from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.masks import UnitMasks
from comp_edge.parallel import launched
from comp_edge.placement import CPU, computing_device, device_of, placed
from comp_edge.schedule import active_schedule
from comp_edge.tasks.synthetic import Synthetic
from tests import tiny
from tests.comp_edge.test_pruning import QUICK
from tests.comp_edge.test_tasks_families import ASKED, PAIRED, SHORT, asking, make_model, make_processor
from tests.comp_edge.test_train import Lessons

DRIFT = 5e-4  # of weights, after steps of up to 1e-3 each, which rounding makes a little different
TOLERANCE = 1e-5  # attention is computed from its parts there, and by one kernel on the CPU


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Any]:
    """`elsewhere(function, *arguments)` calls a function of this module where torch knows the other device."""
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as one:
        yield lambda function, *arguments: one.submit(function, *arguments).result()


# ---- called in the other process


def _mixing() -> dict[str, str]:
    """What the device says of what a GPU would refuse."""
    from tests.elsewhere import DEVICE

    there, said = torch.ones(3, device=DEVICE), {}
    assert there[torch.tensor([0, 1])].tolist() == [1.0, 1.0]  # a GPU moves indices itself
    for name, wrong in {
        "sum": lambda: there + torch.ones(3),
        "numpy": there.numpy,
        "gather": lambda: torch.gather(there, 0, torch.tensor([0])),
        "look up": lambda: torch.ones(3)[there.long()],
        "put": lambda: there.index_put_((there.long()[:1],), torch.ones(1)),
    }.items():
        try:
            wrong()
        except (RuntimeError, TypeError) as error:
            said[name] = str(error)
    return said


def _gradients() -> list[list[float]]:
    """Of a small network, by the device and by the CPU."""
    from tests.elsewhere import DEVICE

    found = []
    for device in (DEVICE, CPU):
        torch.manual_seed(0)
        network = torch.nn.Sequential(
            torch.nn.Conv1d(2, 3, 2), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(9, 2)
        )
        network, inputs = network.to(device), torch.arange(16.0).reshape(2, 2, 4).to(device)
        network(inputs).log_softmax(-1).square().sum().backward()
        found.append([value for p in network.parameters() for value in p.grad.flatten().tolist()])
    return found


def _family(name: str) -> dict[str, tuple[Any, Any]]:
    """What a family's pruned model gives there and here: loss, gradients, what dropping kept, and the score."""
    from tests.elsewhere import DEVICE

    task = asking(name) if name in ASKED else Synthetic(make_processor(name), model=make_model(name), **SHORT)
    found: dict[str, list[Any]] = {}
    for device in (DEVICE, CPU):
        model = make_model(name, pruned=True, task=task).to(device)
        batch = next(iter(placed(task.train_batches(0), device)))
        loss = task.loss(model, batch)
        loss.backward()
        # SigLIP 2 writes its positions row by row: autograd asks such tensors where they lie in memory, and there is none.
        learnt = [p for key, p in model.named_parameters() if "vision_model.embeddings.position" not in key]
        schedule = active_schedule(model)
        kept = {stream: schedule.kept(stream) for stream in family_of(model).streams(model)}
        facts = {
            "loss": loss.item(),
            "gradients": [p.grad.cpu().abs().sum().item() for p in learnt if p.grad is not None],
            "kept": {stream: None if tokens is None else tokens.tolist() for stream, tokens in kept.items()},
            "answers": _answers(task, model, next(iter(placed(task.val_batches(), device)))),
            "score": task.score(model, placed(task.val_batches(), device)),
        }
        for key, value in facts.items():
            found.setdefault(key, []).append(value)
    return {key: (there, here) for key, (there, here) in found.items()}


@torch.no_grad()
def _answers(task: Any, model: Any, batch: dict[str, torch.Tensor]) -> list[Any]:
    """What is generated, or which text suits each image best."""
    if hasattr(task, "generate"):
        return task.generate(model, batch)
    (table,) = task.comparison.similarities(model, [batch])
    return table.argsort(1).tolist()


def _pass(strategy: str, folder: Path) -> dict[str, tuple[Any, Any]]:
    """Plan, trace and weights of a whole pass there and here; there it is interrupted once and resumed."""
    from tests.elsewhere import DEVICE

    def run(device: torch.device, out: Path, **options: Any) -> comp_edge.PruneResult:
        task = tiny.TinyVQA(tiny.make_processor())
        options = {"budget": comp_edge.Budget(macs=0.5), "config": QUICK, "base": "tiny", "seed": 1, **options}
        return comp_edge.prune(tiny.make_model().to(device), task, strategy=strategy, out=out, **options)

    def interrupt(progress: Any) -> None:
        if progress.message.startswith("stage 2"):
            raise KeyboardInterrupt

    try:
        run(DEVICE, folder / "there", on_progress=interrupt)
    except KeyboardInterrupt:
        there = run(DEVICE, folder / "there", resume=True)
    here = run(CPU, folder / "here")
    weights = [{name: value.cpu() for name, value in result.model.state_dict().items()} for result in (there, here)]
    loaded = comp_edge.load_pretrained(folder / "there").state_dict()
    return {
        "plan": (there.plan.to_json(), here.plan.to_json()),
        "modes": ([stage["mode"] for stage in there.trace], [stage["mode"] for stage in here.trace]),
        "scores": (there.metrics["pruned"], here.metrics["pruned"]),
        "device": (device_of(there.model).type, "elsewhere"),
        "names": (list(weights[0]), list(weights[1])),
        "weights": (_furthest(*weights) < DRIFT, True),
        "saved": (all(torch.equal(value, weights[0][name]) for name, value in loaded.items()), True),
    }


def _furthest(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    # Attention does not depend on a key's bias: its gradient is rounding, which Adam scales up.
    return max((v - others[k]).abs().max().item() for k, v in some.items() if not k.endswith("k_proj.bias"))


def _trained(folder: Path) -> tuple[float, float]:
    """The loss of a few steps of dense training, its lesson on patches included, there and here."""
    from tests.elsewhere import DEVICE

    def run(device: torch.device) -> float:
        model, task = tiny.make_model().to(device), Lessons(tiny.make_processor())
        return training.train(model, task, folder=folder / device.type, steps=3, val_questions=10).loss

    return run(DEVICE), run(CPU)


class Watching(tiny.TinyVQA):
    """Writes down where the models are that it judges."""

    seen: ClassVar[set[str]] = set()

    def logits(self, model: Any, batch: Any) -> torch.Tensor:
        self.seen.add(device_of(model).type)
        return super().logits(model, batch)

    def generate(self, model: Any, batch: Any) -> list[str]:
        self.seen.add(device_of(model).type)
        return super().generate(model, batch)


def _commands(folder: Path) -> list[tuple[int, list[str]]]:
    """Exit codes of commands that compute there, and where they had their models."""
    import tests.elsewhere  # noqa: F401

    tiny.make_model().save_pretrained(folder / "tiny")
    tiny.make_processor().save_pretrained(folder / "tiny")
    model, pruned, there = str(folder / "tiny"), str(folder / "pruned"), ["--torch-device", "elsewhere"]
    short = ["--train-steps", "6", "--stages", "2", "--round-to", "8", "--val-examples", "15", "--keep", "0.6"]
    found = []
    for command in (
        ["train", "--model", model, "-o", str(folder / "trained"), "--steps", "1", "--images", "2"],
        ["prune", "--model", model, "-o", pruned, "--strategy", "params", "--no-eval", *short],
        ["eval", pruned, "--split", "val"],
    ):
        Watching.seen.clear()
        with (
            mock.patch.object(tasks, "task_class", lambda spec: Watching),  # a file would be imported anew
            mock.patch.object(training, "save_trained", lambda *_, **__: {"test_score": 0.0, "val_score": 0.0}),
            mock.patch("comp_edge.report.write_report"),  # which looks at the result on the CPU
        ):
            found.append((main([*command, "--task", "watching", *there]), sorted(Watching.seen)))
    return found


def _dealt(environment: dict[str, str]) -> str:
    """The device that a process with this environment gets there, or why none."""
    import tests.elsewhere  # noqa: F401

    with mock.patch.dict("os.environ", environment):
        try:
            return str(computing_device("elsewhere"))
        except InputError as error:
            return str(error)


# ---- tests


def test_the_stand_in_is_a_device(elsewhere: Any) -> None:
    """It refuses what a GPU refuses, and computes what the CPU does."""
    said = elsewhere(_mixing)
    assert said.keys() == {"sum", "numpy", "gather", "look up", "put"} and all(
        "elsewhere" in text for text in said.values()
    )
    there, here = elsewhere(_gradients)
    assert there == here and any(here)


@pytest.mark.parametrize("name", ASKED + PAIRED)
def test_every_family_computes_there(elsewhere: Any, name: str) -> None:
    for key, (there, here) in elsewhere(_family, name).items():
        rounding = {"loss": TOLERANCE, "gradients": 1e-3}.get(key)
        assert there == (here if rounding is None else pytest.approx(here, rel=rounding, abs=TOLERANCE)), key


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["comp", "probe"])
def test_a_pass_comes_to_the_same(elsewhere: Any, tmp_path: Path, strategy: str) -> None:
    for key, (there, here) in elsewhere(_pass, strategy, tmp_path).items():
        assert there == here, key


def test_training_computes_there(elsewhere: Any, tmp_path: Path) -> None:
    there, here = elsewhere(_trained, tmp_path)
    assert there == pytest.approx(here, rel=1e-4)


@pytest.mark.slow
def test_commands_compute_there(elsewhere: Any, tmp_path: Path) -> None:
    assert elsewhere(_commands, tmp_path) == [(0, ["elsewhere"])] * 3
    assert comp_edge.load_pretrained(tmp_path / "pruned").comp_edge_plan.cost.name == "macs"


def test_processes_get_a_device_each(elsewhere: Any) -> None:
    """By their number on the machine, among the devices that they see; there is one here."""
    assert elsewhere(_dealt, {}) == elsewhere(_dealt, {"LOCAL_RANK": "3"}) == "elsewhere:0"
    refused = elsewhere(_dealt, {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert refused.startswith("2 processes were launched on this machine, which has 1 of 'elsewhere'")


def test_batches_follow_a_model(tiny_task: Any) -> None:
    batch = next(tiny_task.train_batches(0))
    batches = [{**batch, "answers": ["one", "two"]}] * 2
    moved = placed(batches, torch.device("meta"))
    assert len(moved) == len(list(moved)) == len(list(moved)) == 2  # as often as one likes
    first = next(iter(moved))
    assert first.pop("answers") == ["one", "two"]
    assert first.keys() == batch.keys() and {value.device.type for value in first.values()} == {"meta"}
    assert placed(batches, CPU) is batches


def test_masks_are_wanted_where_the_weights_are() -> None:
    model = tiny.make_model()
    masks = UnitMasks(family_of(model).streams(model))
    assert {masks.device(site) for site in masks.unit_sizes} == {CPU} == {device_of(model)}


@pytest.mark.parametrize("name", ["meta", "gpu", "hpu", "cuda:77", "cpu:x", ""])
def test_a_device_that_is_not_there_is_refused(name: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no device that torch can compute on here; give one of cpu"):
        computing_device(name)
    command = ["prune", "--model", "llava-digits", "--task", "digit_vqa", "-o", str(tmp_path / "out")]
    assert main([*command, "--torch-device", name]) == 2
    assert repr(name) in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_cpu_where_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert computing_device(None) == computing_device("cpu") == computing_device("cpu:0") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # what `accelerate launch --cpu` says
    assert computing_device(None) == CPU


def test_a_model_elsewhere_than_its_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    state = SimpleNamespace(num_processes=2, process_index=1, device=torch.device("cuda:1"))
    monkeypatch.setattr("accelerate.PartialState", lambda **options: state)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched(torch.device("cuda:1")).index == 1
    for device in ("cuda:0", "cpu"):
        with pytest.raises(InputError, match=f"the model is on '{device}', and process 1 of 2 computes on 'cuda:1'"):
            launched(torch.device(device))
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(InputError, match="4 processes were launched, but accelerate knows of 2"):
        launched(torch.device("cuda:1"))
