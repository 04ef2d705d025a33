"""Small tokenizers of the families' own kinds, with the special tokens that their processors need.

Each is trained on a corpus that the caller gives and can still write what the corpus lacks: any byte, or for the
word-piece and unigram kinds any ASCII character. Special tokens stand first, as in most released vocabularies; CLIP's
stand last.
"""

from __future__ import annotations

import json
import string
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
ASCII = [character for character in string.printable if not character.isspace()]
QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
                 "<|image_pad|>", "<|video_pad|>")  # fmt: skip
TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))


def _trained(tokenizer: Tokenizer, corpus: list[str], trainer: Any) -> tuple[Any, list[tuple[str, str]]]:
    """Vocabulary (unigrams with their scores) and merges.

    Letters that carry a mark (`##a`, `a</w>`) should be among the trainer's special tokens: it numbers the others in the
    order of a hash table, which is another one in every process, and breaks ties between merges by these numbers.
    """
    tokenizer.train_from_iterator(corpus, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model.get("merges", [])]


def _byte_pairs(blank: Any, corpus: list[str], vocabulary: int, specials: tuple[str, ...]) -> dict[str, Any]:
    """Byte-level BPE with the word boundaries of `blank`: what its class is constructed with."""
    tokenizer = Tokenizer(models.BPE())
    if blank.normalizer is not None:
        tokenizer.normalizer = blank.normalizer
    tokenizer.pre_tokenizer = blank.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(specials), initial_alphabet=BYTES, show_progress=False
    )
    vocab, merges = _trained(tokenizer, corpus, trainer)
    return {"vocab": vocab, "merges": merges}


def clip(corpus: list[str], vocabulary: int, *, length: int) -> Any:
    """CLIP's BPE: lower case, words marked at their end; `<|startoftext|>` and `<|endoftext|>` are the last entries."""
    blank = transformers.CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        special_tokens=[byte + "</w>" for byte in BYTES],  # see `_trained`
        initial_alphabet=BYTES,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    vocab, merges = _trained(tokenizer, corpus, trainer)
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocab.setdefault(token, len(vocab))
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def siglip(corpus: list[str], vocabulary: int, *, length: int) -> Any:
    """SigLIP's unigrams: lower case without punctuation, closed and padded by `</s>`, no attention mask.

    The released class reads a SentencePiece file; this is the same kind of model in the Rust library.
    """
    specials = ("<pad>", "</s>", "<unk>")
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary,
        special_tokens=list(specials),
        unk_token="<unk>",
        initial_alphabet=["▁", *string.ascii_lowercase, *string.digits],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
        model_input_names=["input_ids"],
        model_max_length=length,
    )


def siglip2(corpus: list[str], vocabulary: int, *, length: int) -> Any:
    """SigLIP 2's: Gemma's BPE with bytes to fall back on, lower case, closed by `<eos>`, no attention mask."""
    specials = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    # Gemma's own leaves the text in one piece; a small corpus would have whole sentences for tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(specials),
        initial_alphabet=["▁", *string.ascii_lowercase, *string.digits],
        show_progress=False,
    )
    vocab, merges = _trained(tokenizer, corpus, trainer)
    return transformers.Siglip2Tokenizer(
        vocab=vocab,
        merges=merges,
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
        model_input_names=["input_ids"],
        model_max_length=length,
    )


def blip(corpus: list[str], vocabulary: int, *, length: int) -> Any:
    """BERT's word pieces, with BLIP's `[DEC]` (what an answer begins with) and `[ENC]`."""
    specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]")
    blank = transformers.BertTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    letters = [character for character in ASCII if not character.isupper()]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary,
        special_tokens=[*specials, *(f"##{letter}" for letter in letters)],  # see `_trained`
        initial_alphabet=letters,
        show_progress=False,
    )
    vocab, _ = _trained(tokenizer, corpus, trainer)
    return transformers.BertTokenizer(
        vocab=vocab, bos_token="[DEC]", additional_special_tokens=["[ENC]"], model_max_length=length
    )


def smolvlm(corpus: list[str], vocabulary: int, *, length: int) -> Any:
    """SmolLM2's byte-level BPE with the image tokens of Idefics3's processor."""
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<image>",
                "<end_of_utterance>", "<global-img>", *TILES)  # fmt: skip
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trained = _byte_pairs(tokenizer, corpus, vocabulary, specials)
    tokenizer.model = models.BPE(**trained)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        extra_special_tokens={
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "end_of_utterance_token": "<end_of_utterance>",
            "global_image_token": "<global-img>",
        },
        padding_side="left",
        truncation_side="left",
        model_max_length=length,
    )


def qwen(corpus: list[str], vocabulary: int, *, length: int) -> Any:
    """Qwen2's byte-level BPE."""
    return _qwen(corpus, vocabulary, QWEN_SPECIALS, length=length)


def internvl(corpus: list[str], vocabulary: int, *, length: int) -> Any:
    """Qwen2's byte-level BPE with the image tokens of InternVL's processor."""
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return _qwen(corpus, vocabulary, (*QWEN_SPECIALS, *names.values()), length=length, extra_special_tokens=names)


def _qwen(corpus: list[str], vocabulary: int, specials: tuple[str, ...], *, length: int, **options: Any) -> Any:
    trained = _byte_pairs(transformers.Qwen2Tokenizer().backend_tokenizer, corpus, vocabulary, specials)
    tokenizer = transformers.Qwen2Tokenizer(
        **trained,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=length,
        **options,
    )
    # They are in the vocabulary already; this keeps them whole wherever a text has them.
    tokenizer.add_tokens([AddedToken(special, special=True) for special in specials])
    return tokenizer
