"""Muon in float32 against torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from comp_edge.muon import Muon, orthogonal

OPTIONS = {"lr": 0.02, "weight_decay": 0.05, "adjust_lr_fn": "match_rms_adamw"}
SHAPES = [(12, 12), (12, 12), (24, 12), (12, 24), (5, 40)]


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_steps_are_torchs_but_for_bfloat16(nesterov: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    pair = [Muon(ours, nesterov=nesterov, **OPTIONS), torch.optim.Muon(theirs, nesterov=nesterov, **OPTIONS)]
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in pair:
            optimizer.step()
    for a, b, s in zip(ours, theirs, start, strict=True):
        moved = (b - s).norm()
        assert moved > 0.1 and (a - b).norm() < 0.02 * moved


def test_orthogonal() -> None:
    """Singular values end near one, the vectors stay."""
    matrices = torch.randn(4, 6, 20, generator=torch.Generator().manual_seed(1))
    got = orthogonal(matrices, coefficients=(3.4445, -4.775, 2.0315), steps=5, eps=1e-7)
    values = torch.linalg.svdvals(got)
    assert 0.6 < float(values.min()) and float(values.max()) < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert float(torch.nn.functional.cosine_similarity((u @ v).flatten(1), got.flatten(1)).min()) > 0.95


def test_state_moves_between_the_two() -> None:
    parameter = nn.Parameter(torch.ones(4, 6))
    parameter.grad = torch.full_like(parameter, 0.5)
    optimizer = Muon([parameter], **OPTIONS)
    optimizer.step()
    other = torch.optim.Muon([nn.Parameter(torch.ones(4, 6))], **OPTIONS)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (state,) = other.state.values()
    assert torch.equal(state["momentum_buffer"], optimizer.state[parameter]["momentum_buffer"])


def test_what_has_no_gradient_stays() -> None:
    still, moving = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    moving.grad = torch.eye(3)
    Muon([still, moving], **OPTIONS).step()
    assert torch.equal(still.detach(), torch.ones(3, 3)) and not torch.equal(moving.detach(), torch.ones(3, 3))
