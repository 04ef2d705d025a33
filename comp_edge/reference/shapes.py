"""Released models at their true sizes, from their genuine configurations, with random weights.

Structure, memory, speed and parity do not depend on what the weights say; these serve where no weights can be
downloaded. The configurations lie in `assets/shapes/NAME.json`, as transformers writes them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from comp_edge.errors import InputError
from comp_edge.files import read_json
from comp_edge.structure import empty_model

SHAPE_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "shapes"


@dataclass(frozen=True)
class ShapeInfo:
    """A released model.

    Attributes:
        hub_id: the model on the Hugging Face hub that this is the shape of.
        parameters: their number, tied ones counted once.
        note: what it is, in a line.
    """

    hub_id: str
    parameters: int
    note: str


SHAPES: dict[str, ShapeInfo] = {
    "clip-vit-b-16": ShapeInfo(
        "openai/clip-vit-base-patch16", 149_620_737, "CLIP: two towers, ViT-B/16 at 224 px and 12 text layers."
    ),
    "siglip-base-patch16-224": ShapeInfo(
        "google/siglip-base-patch16-224", 203_155_970, "SigLIP: two towers, pooled by an attention head, no CLS token."
    ),
    "siglip2-base-patch16-naflex": ShapeInfo(
        "google/siglip2-base-patch16-naflex", 375_234_050, "SigLIP 2: any aspect ratio, up to 256 patches an image."
    ),
    "blip-vqa-base": ShapeInfo(
        "Salesforce/blip-vqa-base", 361_230_140, "BLIP: ViT-B/16 at 384 px, question encoder and answer decoder."
    ),
    "blip-itm-base-coco": ShapeInfo(
        "Salesforce/blip-itm-base-coco", 223_744_258, "BLIP: image-text retrieval, one encoder with cross-attention."
    ),
    "blip-image-captioning-base": ShapeInfo(
        "Salesforce/blip-image-captioning-base", 223_971_644, "BLIP: captioning, one decoder with cross-attention."
    ),
    "llava-1.5-7b-hf": ShapeInfo(
        "llava-hf/llava-1.5-7b-hf", 7_063_427_072, "LLaVA 1.5: CLIP ViT-L/14 at 336 px before Vicuna 7B, 32 heads."
    ),
    "idefics3-8b-llama3": ShapeInfo(
        "HuggingFaceM4/Idefics3-8B-Llama3", 8_462_086_384, "Idefics3: SigLIP-So400m before Llama 3.1 8B, 32/8 heads."
    ),
    "smolvlm-256m": ShapeInfo(
        "HuggingFaceTB/SmolVLM-256M-Instruct", 256_484_928, "Idefics3: SigLIP-B/16 at 512 px before SmolLM2, 9/3 heads."
    ),
    "smolvlm-500m": ShapeInfo(
        "HuggingFaceTB/SmolVLM-500M-Instruct", 507_482_304, "Idefics3: SigLIP-B/16 at 512 px, SmolLM2, 15/5 heads."
    ),
    "smolvlm2-2.2b": ShapeInfo(
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct", 2_246_784_880, "SmolVLM: SigLIP-So400m at 384 px, SmolLM2, 32 heads."
    ),
    "qwen2.5-vl-3b": ShapeInfo(
        "Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976, "Qwen2.5-VL: windowed vision, M-RoPE, 16/2 heads, tied output."
    ),
    "internvl3-1b": ShapeInfo(
        "OpenGVLab/InternVL3-1B-hf", 938_193_024, "InternVL 3: InternViT-300M before Qwen2.5 0.5B, 14/2 heads."
    ),
}


def shape_config(name: str) -> Any:
    """The model's configuration, `architectures` included.

    Raises:
        InputError: no shape has this name.
    """
    from transformers import AutoConfig

    if name not in SHAPES:
        raise InputError(f"no shape is named {name!r}; known are {', '.join(SHAPES)}.")
    return AutoConfig.for_model(**read_json(SHAPE_FOLDER / f"{name}.json", what="shape"))


def build_random(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, config: Any = None) -> Any:
    """The model with random weights in eval mode, the same for the same seed.

    Args:
        config: takes the place of the shape's own configuration: the same with other token ids, say.

    Raises:
        InputError: no shape has this name.
    """
    return random_model(shape_config(name) if config is None else config, dtype=dtype, seed=seed)


def random_model(config: Any, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The class that `config.architectures` names with random weights in eval mode, the same for the same seed.

    The weights are drawn in `dtype` in place: memory never holds more than the model. Matrices keep the variance of
    what goes through them, so that hidden states and logits stay finite at every width.
    """
    config = copy.deepcopy(config)
    config.dtype = dtype
    model = empty_model(config)
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for key, empty in list(module._parameters.items()):
            if empty is None:
                continue
            if empty not in drawn:
                drawn[empty] = nn.Parameter(_draw(module, key, empty.shape, dtype, generator))
            module._parameters[key] = drawn[empty]
    return model.eval()


@torch.no_grad()
def _draw(
    module: nn.Module, key: str, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    config = getattr(module, "config", None)
    if key.endswith("bias"):  # `in_proj_bias` and `logit_bias`, too
        return tensor.zero_()
    if key == "logit_scale":
        return tensor.fill_(getattr(config, "logit_scale_init_value", 0.0))
    if key.startswith("lambda_"):  # LayerScale, at the released models' initial value
        return tensor.fill_(0.1)
    if "Norm" in type(module).__name__:
        return tensor.fill_(1.0)
    if isinstance(module, nn.Embedding):
        tensor.normal_(0.0, 0.02, generator=generator)
        if module.padding_idx is not None:
            tensor[module.padding_idx] = 0.0
        return tensor
    if key == "weight" or key.endswith("proj_weight"):
        return tensor.normal_(0.0, tensor[0].numel() ** -0.5, generator=generator)
    return tensor.normal_(0.0, 0.02, generator=generator)  # class tokens, learnt positions, pooling queries
