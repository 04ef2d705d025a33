"""`blip-digits`: a BLIP for question answering of 1.7 M parameters, the genuine transformers classes at 64x64 pixels."""

from __future__ import annotations

from typing import Any

import torch

from comp_edge.reference.common import HEADS, PATCH, SIDE, WIDTH, questions_and_answers, widen

VOCABULARY = 256
LENGTH = 64  # positions of a text


def build(seed: int = 0) -> tuple[Any, Any]:
    """The untrained model and its processor.

    Vision tower: 6 layers, width 96, 6 heads, 64 patches + CLS. Text encoder with cross-attention to the image, and the
    decoder that writes the answer (they share a configuration): 3 layers, width 96, 6 heads. FFN 384 everywhere.
    """
    from transformers import BlipConfig, BlipForQuestionAnswering, GenerationConfig

    from comp_edge.reference.processors import build_processor, config_for

    config = BlipConfig(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "num_hidden_layers": 6,
            "num_attention_heads": HEADS,
            "image_size": SIDE,
            "patch_size": PATCH,
            "initializer_range": 0.02,  # BLIP's own is 1e-10: nothing would be learned in a day
        },
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "encoder_hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": HEADS,
            "max_position_embeddings": LENGTH,
            "bos_token_id": None,  # the tokenizer says
        },
        projection_dim=WIDTH,
        image_text_hidden_size=WIDTH,
    )
    processor = build_processor("blip", config, questions_and_answers(), vocabulary=VOCABULARY)
    config = config_for(processor, config)
    torch.manual_seed(seed)
    model = BlipForQuestionAnswering(config)
    widen(model, matrices="layer", tables="embeddings.word_embeddings")
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=8,
    )
    return model, processor
