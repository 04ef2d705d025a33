"""What is folded into weights, and what is refused."""

import pytest
import torch
from torch import nn

from comp_edge.errors import InputError
from export.graph import COREML, EXECUTORCH, LanguageModel, VisionEncoder
from export.graph.fold import activation_form, folded_linear
from export.graph.layers import rotate_half_matrix
from export.graph.norms import AffineNorm, NormParts


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_folded_linear(bias):
    linear, x = nn.Linear(6, 4, bias=bias), torch.randn(3, 6)
    scale, shift = torch.randn(6), torch.randn(6)
    expected = 0.25 * linear(x * scale + shift)
    got = folded_linear(linear, input_scale=scale, input_shift=shift, output_scale=0.25)(x)
    assert torch.allclose(got, expected, atol=1e-6)
    assert folded_linear(nn.Linear(6, 4, bias=False)).bias is None


@pytest.mark.parametrize("options", [EXECUTORCH, COREML], ids=["linear", "mean"])
@torch.no_grad()
def test_affine_norm(options):
    norm = nn.LayerNorm(8, eps=1e-5)
    norm.weight.normal_()
    norm.bias.normal_()
    x = torch.randn(1, 5, 8) * 3 + 1
    assert torch.allclose(AffineNorm(norm, options)(x), norm(x), atol=1e-5)


@pytest.mark.parametrize("name", ["quick_gelu", "silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu"])
@torch.no_grad()
def test_activation_forms(name):
    from transformers.activations import ACT2FN

    form, x = activation_form(ACT2FN[name]), torch.linspace(-6, 6, 101)
    assert torch.allclose(form.function(form.inner * x) / form.inner, ACT2FN[name](x), atol=1e-6)


def test_unknown_parts_are_refused_by_name():
    with pytest.raises(InputError, match="'Tanh'"):
        activation_form(nn.Tanh())
    with pytest.raises(InputError, match="'GroupNorm'"):
        NormParts.of(nn.GroupNorm(2, 4))


def test_rotate_half_matrix():
    x = torch.arange(6.0)
    assert nn.functional.linear(x, rotate_half_matrix(6)).tolist() == [-3, -4, -5, 0, 1, 2]


def test_a_schedule_that_does_not_fit_is_refused(case):
    one = case("dense")
    with pytest.raises(InputError, match=r"\[17, 9\]"):
        VisionEncoder(one.model, (17, 9), EXECUTORCH)
    with pytest.raises(InputError, match="3 entries"):
        LanguageModel(one.model, (18, 18, 18), new_tokens=4, options=EXECUTORCH)
    with pytest.raises(InputError, match="128"):
        LanguageModel(one.model, (18,) * 4, new_tokens=111, options=EXECUTORCH)


def test_unsupported_configurations_are_refused(case):
    import copy

    one = case("dense")
    model = copy.deepcopy(one.model)
    model.config.vision_feature_layer = [-2, -1]
    with pytest.raises(InputError, match=r"\[-2, -1\]"):
        VisionEncoder(model, one.tokens["vision"], EXECUTORCH)
    model = copy.deepcopy(one.model)
    model.model.language_model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(InputError, match="'dynamic'"):
        LanguageModel(model, one.tokens["language"], new_tokens=4, options=EXECUTORCH)
