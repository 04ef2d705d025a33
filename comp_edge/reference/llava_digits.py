"""`llava-digits`: a LLaVA of 1.2 M parameters, the genuine transformers classes at 64x64 pixels."""

from __future__ import annotations

from typing import Any

import torch

from comp_edge.reference.common import HEADS, PATCH, SIDE, WIDTH, questions_and_answers, widen

SPECIALS = ("<pad>", "<s>", "</s>", "<image>")
VOCABULARY = 512
# The question ends the prompt: at this size a model learns to answer from the word that matters far sooner than from a
# fixed closing like "ASSISTANT:", which would first have to find that word.
CHAT_TEMPLATE = (
    "{% for message in messages %}USER:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def build_tokenizer(corpus: list[str]) -> Any:
    """A byte-level BPE tokenizer of 512 entries, trained on the corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    pad, bos, eos, image = SPECIALS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens={"image_token": image},
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    return fast


def build_processor(corpus: list[str]) -> Any:
    """LlavaProcessor with CLIP's image processing at 64x64 and the tokenizer above."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    size = {"height": SIDE, "width": SIDE}
    image_processor = CLIPImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(corpus),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build(seed: int = 0) -> tuple[Any, Any]:
    """The untrained model and its processor.

    CLIP vision tower: 6 layers, width 96, 6 heads, 64 patches + CLS. Llama decoder: 4 layers, width 96, 6 query
    heads in 3 key-value groups, FFN 256.
    """
    from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    processor = build_processor([f"USER: {text}" for text in questions_and_answers()])
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=6,
            num_attention_heads=HEADS,
            image_size=SIDE,
            patch_size=PATCH,
            hidden_act="gelu",
            projection_dim=WIDTH,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=HEADS,
            num_key_value_heads=3,
            max_position_embeddings=256,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    widen(model, matrices="encoder.layers", tables="embed_tokens")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=8,
    )
    return model, processor
