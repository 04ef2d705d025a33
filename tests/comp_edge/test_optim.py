"""The optimizer's state on disk brings back the run, to the bit."""

from __future__ import annotations

import copy
import json
import math
import struct

import pytest
import torch
from torch import nn

from comp_edge.errors import InputError
from comp_edge.optim import Optimizer, load_state, save_state, warmup_cosine


class Net(nn.Module):
    """A matrix, a table, a vector of each kind, a frozen parameter and one that an earlier surgery emptied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.hidden = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 7, bias=False)
        self.frozen = nn.Parameter(torch.ones(6, 6), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(6, 6))
        self.emptied = nn.Parameter(torch.ones(0, 6))

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.lm_head(self.norm(self.hidden(self.embed(ids) @ self.frozen)))
        return nn.functional.cross_entropy(logits, (ids + 1) % 7)


def make(net: Net) -> Optimizer:
    return Optimizer(net.named_parameters(), matrix_lr=0.02, lr=0.01)


def run(net: Net, optimizer: Optimizer, steps: range) -> list[float]:
    ids = torch.arange(7)
    return [optimizer.step(net.loss(ids), factor=warmup_cosine(step, 20, warmup=4)) for step in steps]


def test_a_restored_run_continues_bit_for_bit(tmp_path):
    net = Net()
    optimizer = make(net)
    run(net, optimizer, range(5))
    tensors = {f"model.{k}": v for k, v in net.state_dict().items()}
    tensors |= {f"optimizer.{k}": v for k, v in optimizer.state_tensors().items()}
    save_state(tmp_path / "state.safetensors", tensors, {"step": 5, "name": "ü"})
    norms = run(net, optimizer, range(5, 12))

    torch.manual_seed(99)
    other = Net()
    loaded, progress = load_state(tmp_path / "state.safetensors")
    assert progress == {"step": 5, "name": "ü"}
    other.load_state_dict({k.removeprefix("model."): v for k, v in loaded.items() if k.startswith("model.")})
    resumed = make(other)
    resumed.load_state_tensors(
        {k.removeprefix("optimizer."): v for k, v in loaded.items() if k.startswith("optimizer.")}
    )
    assert run(other, resumed, range(5, 12)) == norms
    for (name, expected), got in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(expected, got), name
    for name, expected in optimizer.state_tensors().items():
        assert torch.equal(expected, resumed.state_tensors()[name]), name


def test_without_its_state_a_run_goes_elsewhere():
    """Otherwise the test above would prove nothing."""
    net = Net()
    optimizer = make(net)
    run(net, optimizer, range(5))
    other = copy.deepcopy(net)
    run(net, optimizer, range(5, 8))
    run(other, make(other), range(5, 8))
    assert not torch.equal(net.hidden.weight, other.hidden.weight)
    assert not torch.equal(net.embed.weight, other.embed.weight)


def test_it_learns_and_leaves_the_frozen_alone():
    net = Net()
    before = float(net.loss(torch.arange(7)).detach())
    optimizer = make(net)
    norms = run(net, optimizer, range(20)) + run(net, optimizer, range(20))
    assert float(net.loss(torch.arange(7)).detach()) < 0.7 * before
    assert torch.equal(net.frozen, torch.ones(6, 6)) and torch.equal(net.unused, torch.ones(6, 6))
    assert all(math.isfinite(norm) and norm > 0 for norm in norms)


def test_matrices_go_to_muon_and_tables_to_adamw():
    """Muon's update of a matrix is orthogonal: all singular values alike. AdamW's of a table is not."""
    net = Net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    Optimizer(net.named_parameters(), matrix_lr=0.1, lr=0.1, weight_decay=0.0).step(
        net.loss(torch.tensor([1, 2])), factor=1.0
    )
    update = net.hidden.weight.detach() - before["hidden.weight"]
    rank = int(torch.linalg.matrix_rank(net.hidden.weight.grad, rtol=1e-3))
    singular = torch.linalg.svdvals(update)[:rank]
    assert float(singular.max() / singular.min()) < 2.5
    for name in ("embed", "lm_head"):
        moved = getattr(net, name).weight.detach() - before[f"{name}.weight"]
        touched = getattr(net, name).weight.grad != 0
        torch.testing.assert_close(moved[touched].abs(), torch.full_like(moved[touched], 0.1), rtol=1e-2, atol=0)


def test_a_factor_of_zero_changes_nothing():
    net = Net()
    before = copy.deepcopy(net.state_dict())
    make(net).step(net.loss(torch.arange(7)), factor=0.0)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(broken):
    net = Net()
    optimizer = make(net)
    run(net, optimizer, range(2))
    before = copy.deepcopy(net.state_dict())
    state = {name: value.clone() for name, value in optimizer.state_tensors().items()}
    with pytest.raises(FloatingPointError, match="not finite"):
        optimizer.step(net.loss(torch.arange(7)) * broken, factor=1.0)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(torch.equal(state[name], value) for name, value in optimizer.state_tensors().items())
    assert all(math.isfinite(norm) for norm in run(net, optimizer, range(2, 4)))


def test_warmup_cosine():
    assert warmup_cosine(0, 100, warmup=10) == pytest.approx(0.1)
    assert warmup_cosine(9, 100, warmup=10) == pytest.approx(0.02 + 0.98 * 0.5 * (1 + math.cos(0.09 * math.pi)))
    assert warmup_cosine(50, 100, warmup=10) == pytest.approx(0.51)
    assert warmup_cosine(100, 100) == pytest.approx(0.02)
    assert warmup_cosine(1000, 100) == pytest.approx(0.02)  # past the end it stays
    falling = [warmup_cosine(step, 100, warmup=10) for step in range(10, 101)]
    assert all(a >= b for a, b in zip(falling, falling[1:], strict=False))
    assert 0 < warmup_cosine(0, 0, warmup=0) <= 1


# ---- the file


def test_shared_and_odd_tensors_are_saved(tmp_path):
    weight = torch.randn(4, 4)
    tensors = {"a": weight, "b": weight, "view": weight.T, "step": torch.tensor(3.0), "empty": torch.ones(0, 3)}
    save_state(tmp_path / "deeper" / "state.safetensors", tensors, {})
    loaded, progress = load_state(tmp_path / "deeper" / "state.safetensors")
    assert progress == {} and set(loaded) == set(tensors)
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    assert [p.name for p in (tmp_path / "deeper").iterdir()] == ["state.safetensors"]


def test_nothing_to_resume(tmp_path):
    with pytest.raises(InputError, match="nothing to resume.*gone.safetensors.*does not exist"):
        load_state(tmp_path / "gone.safetensors")


def damage(content: bytes, how: str) -> bytes:
    if how == "truncated":
        return content[:-10]
    if how == "header only":
        return content[:40]
    if how == "empty":
        return b""
    if how == "garbage":
        return b"\x80\x04}" + bytes(range(256)) * 4
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    if how == "no metadata":
        del header["__metadata__"]
    if how == "progress is not JSON":
        header["__metadata__"]["progress"] = "{"
    changed = json.dumps(header).encode()
    return struct.pack("<Q", len(changed)) + changed + content[8 + size :]


@pytest.mark.parametrize("how", ["truncated", "header only", "empty", "garbage", "no metadata", "progress is not JSON"])
def test_damaged_checkpoints(tmp_path, how):
    path = tmp_path / "state.safetensors"
    save_state(path, {"a": torch.randn(30)}, {"step": 1})
    path.write_bytes(damage(path.read_bytes(), how))
    with pytest.raises(InputError, match="state.safetensors.*is damaged") as caught:
        load_state(path)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match=str(tmp_path)):
        load_state(tmp_path)


def test_a_state_that_cannot_be_written(tmp_path):
    """Below a file nothing can be created, whoever asks (root included)."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write.*state.safetensors"):
        save_state(tmp_path / "file" / "state.safetensors", {"a": torch.ones(1)}, {})


def test_a_failed_write_leaves_the_old_state(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    import comp_edge.optim as optim

    path = tmp_path / "state.safetensors"
    save_state(path, {"a": torch.ones(3)}, {"step": 1})
    genuine = optim.save_file

    def full_disk(tensors, name, **options):
        genuine(tensors, name, **options)
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(optim, "save_file", full_disk)
    with pytest.raises(InputError, match="cannot write.*No space left"):
        save_state(path, {"a": torch.zeros(3)}, {"step": 2})
    loaded, progress = load_state(path)
    assert progress == {"step": 1} and torch.equal(loaded["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_large_models_have_adamw_for_everything(monkeypatch):
    matrix = torch.nn.Parameter(torch.ones(8, 8))
    named = [("layer.weight", matrix)]
    assert len(Optimizer(named, matrix_lr=1e-3, lr=1e-3)._optimizers) == 1
    kinds = [type(Optimizer(named, matrix_lr=1e-3, lr=1e-3)._optimizers[0][0]).__name__]
    monkeypatch.setattr("comp_edge.optim.MUON_LIMIT", 63)
    kinds.append(type(Optimizer(named, matrix_lr=1e-3, lr=1e-3)._optimizers[0][0]).__name__)
    kinds.append(type(Optimizer(named, matrix_lr=1e-3, lr=1e-3, muon=True)._optimizers[0][0]).__name__)
    assert kinds == ["Muon", "AdamW", "Muon"]
