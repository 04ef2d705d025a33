"""Pruning weights that are held in bfloat16: it trains, the plan holds, and statistics are summed in float32."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import comp_edge
from comp_edge.calibrate import collect, gradient_scores
from comp_edge.cli.main import main
from comp_edge.families import family_of
from comp_edge.masks import UnitMasks
from comp_edge.schedule import active_schedule, attach
from comp_edge.state import State
from comp_edge.surgery import apply_plan
from tests.comp_edge.test_pruning import QUICK

ROUNDING = 2**-8  # of bfloat16, relative
DENSE = {"vision": (17, 17, 17), "language": (24, 24, 24)}


def in_halves(model: Any) -> Any:
    """Weights as `--dtype bfloat16` loads them; buffers stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


@pytest.mark.parametrize("strategy", ["comp", "probe"])
def test_a_pass(make_model: Any, tiny_task: Any, tmp_path: Path, strategy: str) -> None:
    model = in_halves(make_model())
    result = comp_edge.prune(
        model, tiny_task, budget=comp_edge.Budget(macs=0.6), config=QUICK, strategy=strategy, out=tmp_path / "out"
    )
    assert all(math.isfinite(line["loss"]) and line["loss"] > 0 for line in result.trace)
    assert result.plan.cost.pruned <= 0.6 * result.plan.cost.dense
    loaded = comp_edge.load_pretrained(tmp_path / "out")
    assert loaded.comp_edge_plan == result.plan and {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    moved = loaded.lm_head.weight != make_model().lm_head.weight.to(torch.bfloat16)
    assert bool(moved.any())  # a few: most of these small steps are below the rounding of a weight
    inputs = tiny_task.example_inputs()
    assert torch.equal(loaded(**inputs).logits, result.model(**inputs).logits)


@torch.no_grad()
def test_masked_is_shrunk(make_model: Any, tiny_task: Any) -> None:
    """Within the rounding of the residual stream: sums over fewer units are rounded in another order."""
    model, inputs = in_halves(make_model()), tiny_task.example_inputs()
    request = family_of(model).request(model, inputs)
    state = State.of(model, base="tiny", request=request)
    for site, alive in state.alive.items():
        alive[1::2] = False
        if site.kind == "heads" and site.stream == "language":
            alive[:] = torch.tensor([True, False, True, False])
    state.tokens = {name: list(tokens) for name, tokens in {**state.tokens, "vision": [17, 12, 9]}.items()}
    gone = 8  # image tokens that the language model does not get
    state.tokens["language"] = [n - gone for n in state.tokens["language"]]
    attach(model, state.tokens)
    masks = UnitMasks(family_of(model).streams(model))
    masks.masks = {site: alive.float() for site, alive in state.alive.items()}
    for site, mask in masks.masks.items():
        if site.kind == "heads":
            active_schedule(model).head_masks[(site.stream, site.layer)] = mask
    masked = model(**inputs).logits.float()
    masks.detach()
    apply_plan(model, comp_edge.Plan.parse(state.plan().to_json()))
    shrunk = model(**inputs).logits.float()
    error = float((masked - shrunk).abs().max() / shrunk.abs().max())
    assert 0 <= error <= 4 * ROUNDING, error


def test_statistics_are_of_float32(make_model: Any, tiny_task: Any) -> None:
    """And near those of the same weights in float32, to the rounding of what is summed."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = in_halves(make_model()).to(dtype)
        schedule = attach(model, DENSE)  # with drops, two tokens that are nearly alike would change places
        masks = UnitMasks(family_of(model).streams(model))
        alive = State.of(model, base="", prompt_tokens=8).alive
        masks.masks = {site: torch.ones(len(units)) for site, units in alive.items()}
        batches = list(itertools.islice(tiny_task.train_batches(0), 2))
        collector = collect(model, masks, schedule, batches, cip=True, cit=True, norm="mean")
        gradients = gradient_scores(model, tiny_task, masks, batches, power=2)
        wanda = collector.wanda()
        scores = {key: part for key, parts in collector.tokens.scores.items() for part in parts}
        for values in (collector.energy, wanda, gradients, scores):
            assert {value.dtype for value in values.values()} == {torch.float32}
        found[dtype] = wanda
    for site, half in found[torch.bfloat16].items():
        # A single unit that is hardly active may be far off; what comes to a layer was rounded in all layers before it.
        full = found[torch.float32][site]
        assert float((half - full).abs().mean() / full.mean()) < 2 * (2 + site.layer) * ROUNDING, site


def test_gradients_of_a_unit_are_summed_in_float32() -> None:
    """A head's mask has the gradients of all its channels: in bfloat16 their sum would lose the small ones."""
    layer = torch.nn.Linear(64, 64, bias=False)

    class Attention:
        heads, kv_heads, head_dim, out, separable = 2, 2, 32, layer, True

    class Layer:
        attn, mlp = Attention(), None

    class Stream:
        layers = (Layer(),)

    masks = UnitMasks({"vision": Stream()})
    (site,) = masks.unit_sizes
    mask = torch.ones(2, requires_grad=True)
    masks.masks = {site: mask}
    layer.to(torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(64))
    x = torch.full((1, 64), 2.0**-7, dtype=torch.bfloat16)
    x[0, 0] = 4.0
    layer(x).sum().backward()
    assert float(mask.grad[0]) == 4.0 + 31 * 2.0**-7  # bfloat16 has no number between 4 and 4 + 2**-5
    assert mask.grad.dtype == torch.float32


@pytest.mark.slow
def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    task = str(Path(__file__).parents[1] / "tiny.py") + ":TinyVQA"
    monkeypatch.chdir(tmp_path)
    command = [
        "prune",
        "--model",
        "llava-digits",
        "--task",
        task,
        "--keep",
        "0.9",
        "--stages",
        "1",
        "--stage-steps",
        "1",
    ]
    command += ["--final-steps", "1", "--val-examples", "15", "--dtype", "bfloat16", "--no-eval", "--json", "-o", "out"]
    assert main(command) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["macs_kept"] <= 0.9 and math.isfinite(metrics["trace"][0]["loss"])
