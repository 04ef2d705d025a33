"""The corrections to coremltools' torch front end: each is needed, and each is right.

Where "is still wrong" fails, coremltools has fixed the operator: drop its correction.
"""

import pytest
import torch
import torch.nn.functional as F
from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY
from mil_programs import save_module
from torch import Tensor, nn

from export.coreml_compat import UnsupportedOperatorError, corrected_frontend
from export.mil import Interpreter


class _Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Tensor) -> Tensor:
        return self.function(*arguments)


class _RmsNorm(nn.Module):
    def __init__(self, *, epsilon: float | None = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8, eps=epsilon, elementwise_affine=affine)
        if affine:
            nn.init.uniform_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def _run(module: nn.Module, arguments: tuple, folder, *, precision: str = "float32", **options) -> Tensor:
    interpreter = Interpreter(save_module(module, arguments, folder, **options), precision=precision)
    names = (port.name for port in interpreter.signature.inputs)
    (output,) = interpreter.run(dict(zip(names, arguments, strict=True))).values()
    return output


def _error(module: nn.Module, arguments: tuple, folder) -> float:
    with torch.no_grad():
        wanted = module(*arguments)
    return (_run(module, arguments, folder) - wanted).abs().max().item()


_X = torch.linspace(-4, 4, 64).reshape(8, 8)
_Y = torch.linspace(1, 2, 64).reshape(8, 8)


# -- gelu


def test_tanh_gelu_is_still_wrong(tmp_path):
    assert _error(_Function(lambda x: F.gelu(x, approximate="tanh")), (_X,), tmp_path) > 1e-4


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_corrected_gelu(tmp_path, approximate):
    with corrected_frontend():
        assert _error(_Function(lambda x: F.gelu(x, approximate=approximate)), (_X,), tmp_path) < 1e-6


# -- add and sub

_ALPHAS = {
    "add": lambda x, y: torch.add(x, y, alpha=3),
    "sub": lambda x, y: torch.sub(x, y, alpha=0.5),
    "add_scalar": lambda x, y: torch.add(x, 2.0, alpha=3) * y,
}


@pytest.mark.parametrize("name", _ALPHAS)
def test_alpha_is_still_forgotten(tmp_path, name):
    assert _error(_Function(_ALPHAS[name]), (_X, _Y), tmp_path) > 0.1


@pytest.mark.parametrize("name", _ALPHAS)
def test_alpha_is_rejected(tmp_path, name):
    with (
        corrected_frontend(),
        pytest.raises(UnsupportedOperatorError, match=r"(add|sub)\(alpha=.*would lose its alpha"),
    ):
        _run(_Function(_ALPHAS[name]), (_X, _Y), tmp_path)


@pytest.mark.parametrize(
    "function",
    [lambda x, y: x + y - 2 * y + 1, lambda x, y: torch.add(x, y, alpha=1) - 1, lambda x, y: 1 - x + y],
    ids=["operators", "alpha_1", "reversed"],
)
def test_sums_without_alpha_convert(tmp_path, function):
    with corrected_frontend():
        assert _error(_Function(function), (_X, _Y), tmp_path) < 1e-6


# -- rms_norm


def test_rms_norm_is_still_wrong(tmp_path):
    assert _error(_RmsNorm(), (_X * 1e-3,), tmp_path) > 0.1


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5, None])
def test_corrected_rms_norm(tmp_path, epsilon):
    torch.manual_seed(0)
    scales = torch.tensor([[1e-4], [1e-2], [1.0], [1e3]])
    with corrected_frontend():
        assert _error(_RmsNorm(epsilon=epsilon), (torch.randn(4, 8) * scales,), tmp_path) < 2e-6


def test_corrected_rms_norm_of_zeros_and_without_weight(tmp_path):
    rows = torch.cat([torch.zeros(1, 8), torch.ones(1, 8)])
    with corrected_frontend():
        assert _error(_RmsNorm(affine=False), (rows,), tmp_path) < 1e-6


def test_corrected_rms_norm_does_not_overflow_in_fp16(tmp_path):
    module, x = _RmsNorm(), torch.randn(4, 8) * 5000
    with corrected_frontend():
        given = _run(module, (x,), tmp_path, precision="declared", fp16=True)
    with torch.no_grad():
        torch.testing.assert_close(given.float(), module(x), atol=5e-3, rtol=5e-3)


# -- the context


def test_the_frontend_is_restored():
    before = dict(_TORCH_OPS_REGISTRY.name_to_func_mapping)
    with corrected_frontend():
        assert _TORCH_OPS_REGISTRY.get_func("gelu") is not before["gelu"]
    assert _TORCH_OPS_REGISTRY.name_to_func_mapping == before
    with pytest.raises(KeyError), corrected_frontend():
        raise KeyError
    assert _TORCH_OPS_REGISTRY.name_to_func_mapping == before


# -- operators that deployment graphs are made of, which need no correction


class _Block(nn.Module):
    """Attention with a written-out softmax, token selection by two top-k, and a gated feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.norm = nn.LayerNorm(16)
        self.register_buffer("mask", torch.zeros(1, 1, 16))

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)
        y = self.norm(x)
        q, k, v = (project(y).view(16, 4, 4).permute(1, 0, 2) for project in (self.q, self.k, self.v))
        attention = torch.softmax(torch.bmm(q, k.transpose(1, 2)) / 2 + self.mask, -1)
        x = x + self.out(torch.bmm(attention, v).permute(1, 0, 2).reshape(1, 16, 16))
        scores = attention[0:1]
        for head in range(1, 4):
            scores = torch.maximum(scores, attention[head : head + 1])
        best = torch.topk(scores.sum(1), 9, dim=-1, sorted=False).indices
        kept = torch.topk(best, 9, dim=-1, largest=False, sorted=True).values.view(9)
        x = torch.index_select(x, 1, kept)
        rms = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)
        return x + self.down(F.silu(self.gate(rms)) * self.up(rms))


def test_a_block_with_token_selection(tmp_path):
    image = torch.rand(1, 3, 16, 16)
    with corrected_frontend():
        assert _error(_Block(), (image,), tmp_path) < 5e-6


def test_a_block_in_fp16(tmp_path):
    """At precision "float32" an fp16 package equals the model with rounded weights; see the interpreter."""
    module, image = _Block(), torch.rand(1, 3, 16, 16)
    with corrected_frontend():
        given = _run(module, (image,), tmp_path, fp16=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.half().float())
        torch.testing.assert_close(given, module(image), atol=2e-4, rtol=1e-3)
