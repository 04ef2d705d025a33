"""Half-precision products in fp32: closer to the truth than the halves, for every model and only where it pays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from comp_edge.precision import Fp32Products, fast_products
from tests.families import CASES, FamilyCase


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_are_rounded_once(case: FamilyCase) -> None:
    """In fp32 on the same rounded weights is the truth; what the mode computes is at least as near to it."""
    model, inputs = case.model(), case.inputs([0])
    model.bfloat16().float()
    truth = case.outputs(model, inputs)[0]
    model.bfloat16()
    halves = {name: v.bfloat16() if v.is_floating_point() else v for name, v in inputs.items()}
    with Fp32Products():
        wide = case.outputs(model, halves)[0]
    assert wide.dtype == torch.bfloat16
    plain = case.outputs(model, halves)[0]
    scale = truth.abs().max()
    assert (wide.float() - truth).abs().max() <= 2 * (plain.float() - truth).abs().max() + 0.02 * scale


def test_what_is_not_a_half_is_left_alone() -> None:
    x = torch.randn(3, 4)
    with Fp32Products():
        assert torch.equal(torch.nn.functional.linear(x, x), x @ x.T)


@pytest.mark.parametrize("bias", [True, False])
def test_a_large_weight_goes_in_parts(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = torch.nn.Linear(7, 50, bias=bias).bfloat16(), torch.randn(2, 3, 7).bfloat16()
    with Fp32Products():
        whole = layer(x)
        monkeypatch.setattr("comp_edge.precision.LARGEST", 64)
        assert torch.equal(layer(x), whole)


def test_only_where_the_processor_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(2, 2)
    monkeypatch.setattr("comp_edge.precision.CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("flags : fpu avx avx2")
    assert not isinstance(fast_products(layer), Fp32Products)
    assert isinstance(fast_products(layer.bfloat16()), Fp32Products)
    (tmp_path / "cpuinfo").write_text("flags : fpu avx2 avx512_bf16")
    assert not isinstance(fast_products(layer), Fp32Products)
    (tmp_path / "cpuinfo").unlink()
    assert not isinstance(fast_products(layer), Fp32Products)
