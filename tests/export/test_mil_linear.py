"""Products, attention, convolutions and pooling of saved programs against torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil.ops.defs._utils import aggregated_pad
from mil_programs import assert_equal, run_cases

_RANDOM = np.random.default_rng(0)


def _array(*shape: int) -> np.ndarray:
    return _RANDOM.standard_normal(shape).astype(np.float32)


_W, _B, _K, _KG, _KB = _array(5, 4), _array(5), _array(6, 4, 3, 2), _array(8, 2, 3, 3), _array(8)


def _torch(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


def _same_padded(image: torch.Tensor, strides: list[int], kind: str) -> torch.Tensor:
    """Padded as much as coremltools takes "same" to be; an odd one goes after, with same_lower before."""
    halves = []
    for total in reversed(aggregated_pad(kind, list(_K.shape[2:]), list(image.shape[2:]), strides)):
        halves += sorted((total // 2, total - total // 2), reverse=kind == "same_lower")
    return F.pad(image, halves)


CASES = {
    "linear": (
        (lambda x: mb.linear(x=x, weight=_W, bias=_B)),
        (lambda x: F.linear(x, _torch(_W), _torch(_B))),
    ),
    "linear_no_bias": ((lambda x: mb.linear(x=x, weight=_W)), (lambda x: F.linear(x, _torch(_W)))),
    "matmul": ((lambda x, t: mb.matmul(x=x, y=t)), (lambda x, t: x @ t)),
    "matmul_transposed": (
        (lambda x: mb.matmul(x=x, y=x, transpose_y=True)),
        (lambda x: x @ x.transpose(-1, -2)),
    ),
    "matmul_transposed_x": (
        (lambda x: mb.matmul(x=x, y=x, transpose_x=True)),
        (lambda x: x.transpose(-1, -2) @ x),
    ),
    "einsum": (
        (lambda image, other: mb.einsum(values=[image, other], equation="nchw,nwhu->nchu")),
        (lambda image, other: torch.einsum("nchw,nwhu->nchu", image, other)),
    ),
    "attention": (
        (lambda q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v)),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v)),
    ),
    "attention_bool_mask": (
        (lambda q, k, v, allowed: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=allowed)),
        (lambda q, k, v, allowed: F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)),
    ),
    "attention_float_mask": (
        (lambda q, k, v, bias: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=bias)),
        (lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, attn_mask=bias)),
    ),
    "conv": (
        (lambda image: mb.conv(x=image, weight=_K, strides=[2, 1])),
        (lambda image: F.conv2d(image, _torch(_K), stride=(2, 1))),
    ),
    "conv_custom": (
        (
            lambda image: mb.conv(
                x=image, weight=_KG, bias=_KB, groups=2, pad_type="custom", pad=[1, 0, 2, 1], dilations=[1, 2]
            )
        ),
        (lambda image: F.conv2d(F.pad(image, [2, 1, 1, 0]), _torch(_KG), _torch(_KB), dilation=(1, 2), groups=2)),
    ),
    "conv_same": (
        (lambda image: mb.conv(x=image, weight=_K, strides=[2, 2], pad_type="same")),
        (lambda image: F.conv2d(_same_padded(image, [2, 2], "same"), _torch(_K), stride=2)),
    ),
    "conv_same_lower": (
        (lambda image: mb.conv(x=image, weight=_K, strides=[1, 1], pad_type="same_lower")),
        (lambda image: F.conv2d(_same_padded(image, [1, 1], "same_lower"), _torch(_K))),
    ),
    "conv_1d": (
        (lambda x: mb.conv(x=x, weight=_K[:, :3, 0], pad_type="custom", pad=[1, 1])),
        (lambda x: F.conv1d(x, _torch(_K[:, :3, 0]), padding=1)),
    ),
    "max_pool": (
        (lambda image: mb.max_pool(x=image, kernel_sizes=[2, 3], strides=[2, 1], pad_type="valid")),
        (lambda image: F.max_pool2d(image, (2, 3), (2, 1))),
    ),
    "max_pool_padded": (
        (lambda image: mb.max_pool(x=image, kernel_sizes=[3, 3], pad_type="custom", pad=[1, 1, 0, 1])),
        (lambda image: F.max_pool2d(F.pad(image, [0, 1, 1, 1], value=-torch.inf), 3, 1)),
    ),
    "avg_pool": (
        (lambda image: mb.avg_pool(x=image, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid")),
        (lambda image: F.avg_pool2d(image, 2)),
    ),
    "avg_pool_counts_padding": (
        (lambda image: mb.avg_pool(x=image, kernel_sizes=[3, 3], pad_type="custom", pad=[1, 1, 1, 1])),
        (lambda image: F.avg_pool2d(image, 3, 1, 1)),
    ),
    "avg_pool_excludes_padding": (
        (
            lambda image: mb.avg_pool(
                x=image,
                kernel_sizes=[3, 3],
                pad_type="custom",
                pad=[1, 1, 1, 1],
                exclude_padding_from_average=True,
            )
        ),
        (lambda image: F.avg_pool2d(image, 3, 1, 1, count_include_pad=False)),
    ),
    "avg_pool_one_sided": (
        (
            lambda image: mb.avg_pool(
                x=image,
                kernel_sizes=[2, 2],
                pad_type="custom",
                pad=[1, 0, 0, 0],
                exclude_padding_from_average=True,
            )
        ),
        (lambda image: torch.cat([F.avg_pool2d(image[:, :, :1], (1, 2), 1), F.avg_pool2d(image, 2, 1)], 2)),
    ),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    torch.manual_seed(0)
    allowed = torch.rand(1, 1, 5, 7) > 0.4
    allowed[..., 0] = True
    inputs = {
        "x": torch.randn(2, 3, 4),
        "t": torch.randn(1, 4, 6),
        "image": torch.randn(1, 4, 9, 8),
        "other": torch.randn(1, 8, 9, 5),
        "q": torch.randn(2, 3, 5, 8),
        "k": torch.randn(2, 3, 7, 8),
        "v": torch.randn(2, 3, 7, 6),
        "allowed": allowed,
        "bias": torch.randn(2, 1, 5, 7),
    }
    return run_cases(CASES, inputs, tmp_path_factory.mktemp("linear"))


@pytest.mark.parametrize("name", CASES)
def test_equals_torch(results, name):
    assert_equal(results[name], tolerance=5e-6)
