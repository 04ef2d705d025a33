"""`clip-digits`: a CLIP of 1.1 M parameters, the genuine transformers classes at 64x64 pixels."""

from __future__ import annotations

from typing import Any

import torch

from comp_edge.reference.common import HEADS, PATCH, SIDE, WIDTH, captions, widen

VOCABULARY = 560  # CLIP's tokenizer has 514 entries without a single merge
LENGTH = 32  # positions of a text


def build(seed: int = 0) -> tuple[Any, Any]:
    """The untrained model and its processor.

    Vision tower: 6 layers, 64 patches + CLS. Text tower: 3 layers. Width 96, 6 heads and FFN 384 in both.
    """
    from transformers import CLIPConfig, CLIPModel

    from comp_edge.reference.processors import build_processor, config_for

    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": HEADS,
        "hidden_act": "gelu",
        "projection_dim": WIDTH,
    }
    config = CLIPConfig(
        vision_config={**tower, "num_hidden_layers": 6, "image_size": SIDE, "patch_size": PATCH},
        text_config={
            **tower,
            "num_hidden_layers": 3,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": LENGTH,
            "bos_token_id": None,  # the tokenizer says
            "eos_token_id": None,
        },
        projection_dim=WIDTH,
    )
    processor = build_processor("clip", config, captions(), vocabulary=VOCABULARY)
    config = config_for(processor, config)
    torch.manual_seed(seed)
    model = CLIPModel(config)
    widen(model, matrices="encoder.layers", tables="token_embedding")
    return model, processor
