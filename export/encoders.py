"""What an exporter needs of a model that reads an image and a whole text: requests to try, and transformers' own answers.

The counterpart of `export.reference`, which is for language models with an image in their prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comp_edge.checkpoint import load_any, load_processor
from comp_edge.cost import DEFAULT_PROMPT_TOKENS
from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.families.base import Request
from comp_edge.plan import Plan, plan_of
from comp_edge.units import dense_plan
from export.bundle import AnswerSpec, BundleError, TextGolden, TextSpec, read_questions
from export.encoder_methods import Kind, Part, Shape, Size, kind_of, parts_of
from export.graph.options import GraphOptions
from export.progress import Progress
from export.reference import Requests, made_up_images
from export.source import stored_type

# What the released SigLIP models were trained to read: they look at the last position, padding or not.
SIGLIP_TOKENS = 64


@dataclass
class EncoderSource:
    """A model to export, with its plan and processor.

    Attributes:
        size: height and width of the images in pixels.
        new_tokens: that may be generated, where the model answers or captions.
        notes: what the user should know of the export, a sentence each.
    """

    model: Any
    plan: Plan
    processor: Any
    size: Size
    new_tokens: int
    text: TextSpec
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        """What the model does."""
        return kind_of(self.model)

    @property
    def generates(self) -> bool:
        """Whether it writes text."""
        return self.kind in ("answers", "captions")

    @property
    def tokens(self) -> dict[str, tuple[int, ...]]:
        """The plan's token schedule of each stream."""
        return self.plan.schedules

    @property
    def image_size(self) -> Size:
        """Height and width of the images in pixels."""
        return self.size

    @property
    def shape(self) -> Shape:
        """What a program is made for."""
        tokenizer = self.processor.tokenizer
        return Shape(self.tokens, self.size, self.text.pad_token_id, tokenizer.eos_token_id, self.new_tokens)

    @property
    def answer(self) -> AnswerSpec | None:
        """How answers are generated."""
        if not self.generates:
            return None
        return AnswerSpec(
            start_token_id=self.model.decoder_start_token_id if self.kind == "answers" else None,
            eos_token_ids=(self.model.config.text_config.sep_token_id,),
            max_new_tokens=self.new_tokens,
        )

    def parts(self, options: GraphOptions) -> dict[str, Part]:
        """The methods in their deployment form.

        Raises:
            InputError: the model has none.
        """
        return parts_of(self.model, self.shape, options)

    def token_ids(self, text: str) -> list[int]:
        """Ids of a text as the model's own tokenizer gives them, cut to the schedule's length, not padded."""
        ids = self.processor.tokenizer(text, truncation=True, max_length=self._own_length)["input_ids"]
        if self.kind != "captions":
            return ids
        # transformers begins with the start of captions instead of [CLS], and leaves [SEP] off.
        return [*self.text.prefix, *ids[1:-1]]

    @property
    def _own_length(self) -> int:
        return self.text.max_tokens + (self.kind == "captions")

    def input_ids(self, text: str) -> Tensor:
        """[1, n], padded."""
        ids = self.token_ids(text)
        pads = [self.text.pad_token_id] * (self.text.max_tokens - len(ids))
        return torch.tensor([pads + ids if self.text.padding == "left" else ids + pads])

    def counted(self, text: str) -> int:
        """Tokens of a text that are not padding to the model; SigLIP reads padding as it reads everything."""
        return self.text.max_tokens if _reads_padding(self.model) else len(self.token_ids(text))


def load_encoders(
    ref: str | Path, *, new_tokens: int = 8, text_tokens: int | None = None, size: Size | None = None
) -> EncoderSource:
    """Load a pruned folder or a dense model, in fp32.

    Args:
        text_tokens: longest text of a dense model; a pruned one has it in its plan.
        size: height and width of the images, where the model takes any.

    Raises:
        InputError: the model or the numbers cannot be used.
    """
    processor = load_processor(ref)
    model = load_any(ref, dtype=torch.float32).eval().requires_grad_(False)
    plan = plan_of(model)
    if plan is not None and text_tokens is not None:
        raise InputError(f"prompt tokens {text_tokens} were given, but {str(ref)!r} has a plan that fixes them.")
    size = _image_size(model, plan, size)
    plan = plan or _dense_plan(model, str(ref), text_tokens, size)
    notes = []
    if (stored := stored_type(ref)) != "float32":
        notes.append(f"the weights are stored as {stored}; the program computes in float32 with the same values")
    if family_of(model).variable_images:
        notes.append(
            f"the processor keeps an image's aspect ratio; the bundle takes images of {size[0]}x{size[1]} pixels, resized"
        )
    if not _fast(processor.tokenizer):
        notes.append(
            "the tokenizer reads a SentencePiece model, which the bundle carries; that the rules in its manifest make the "
            "same token ids was not tested"
        )
    return EncoderSource(
        model=model,
        plan=plan,
        processor=processor,
        size=size,
        new_tokens=new_tokens,
        text=text_spec(model, processor, plan),
        notes=tuple(notes),
    )


def _image_size(model: Any, plan: Plan | None, size: Size | None) -> Size:
    """Height and width of the images.

    Raises:
        InputError: the model takes another size, or the plan was made for another.
    """
    family, config = family_of(model), model.config.vision_config
    if not family.variable_images:
        side = config.image_size
        if size not in (None, (side, side)):
            raise InputError(f"image size {size[0]}x{size[1]} was given; the model takes {side}x{side}.")
        return side, side
    patches = family.dense_vision_tokens(model) if plan is None else plan.schedules["vision"][0]
    if size is None:
        side = round(patches**0.5) * config.patch_size
        if side * side != patches * config.patch_size**2:
            raise InputError(
                f"the plan is for images of {patches} patches, which are not square; give --image-size HxW."
            )
        return side, side
    if size[0] % config.patch_size or size[1] % config.patch_size:
        raise InputError(
            f"image size {size[0]}x{size[1]} does not fit; height and width must be multiples of {config.patch_size}."
        )
    given = size[0] * size[1] // config.patch_size**2
    if plan is not None and given != patches:
        raise InputError(
            f"image size {size[0]}x{size[1]} makes {given} patches of {config.patch_size} pixels; the plan is for images of "
            f"{patches}."
        )
    return size


def _dense_plan(model: Any, base: str, text_tokens: int | None, size: Size) -> Plan:
    family, config = family_of(model), model.config
    most = config.text_config.max_position_embeddings
    if text_tokens is None:
        usual = {"clip": most, "blip": DEFAULT_PROMPT_TOKENS}.get(config.model_type, SIGLIP_TOKENS)
        text_tokens = min(usual, most)
    shortest = 1 if config.model_type == "blip" else 2
    if not shortest <= text_tokens <= most:
        raise InputError(f"prompt tokens {text_tokens} were given; the model reads texts of {shortest} to {most}.")
    vision = family.default_request(model, text_tokens).vision_tokens
    if family.variable_images:
        vision = size[0] * size[1] // config.vision_config.patch_size**2
    return dense_plan(model, base=base, request=Request(vision_tokens=vision, text_tokens=text_tokens))


def _reads_padding(model: Any) -> bool:
    return family_of(model).streams(model)["language"].protected == "final"


def text_spec(model: Any, processor: Any, plan: Plan) -> TextSpec:
    """How the tokenizer's own rules are written down for those who have its vocabulary alone.

    Raises:
        InputError: it has no token to pad with, or does not put the same around every text.
    """
    tokenizer = processor.tokenizer
    if tokenizer.pad_token_id is None:
        raise InputError("the processor's tokenizer has no pad token; a text of static length needs one.")
    word = "a"
    bare, whole = tokenizer(word, add_special_tokens=False)["input_ids"], tokenizer(word)["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
    if at is None:
        raise InputError(f"the processor's tokenizer changes {word!r} where it adds special tokens.")
    prefix, suffix = whole[:at], whole[at + len(bare) :]
    if kind_of(model) == "captions":
        prefix, suffix = [model.config.text_config.bos_token_id], []
    # SigLIP's own tokenizer cleans texts before its SentencePiece model sees them.
    cleans = not _fast(tokenizer)
    return TextSpec(
        max_tokens=plan.schedules["language"][0],
        prefix=tuple(prefix),
        suffix=tuple(suffix),
        pad_token_id=tokenizer.pad_token_id,
        # The others do not read padding, and count positions from the left.
        padding=tokenizer.padding_side if _reads_padding(model) else "right",
        lowercase=cleans and bool(getattr(tokenizer, "do_lower_case", False)),
        strip_punctuation=cleans and hasattr(tokenizer, "canonicalize_text"),
    )


def _fast(tokenizer: Any) -> bool:
    """Whether everything that a tokenizer does is in its `tokenizer.json`."""
    return bool(getattr(tokenizer, "is_fast", True))


# ---- requests


def read_encoder_requests(path: str | Path, source: EncoderSource, *, count: int) -> Requests:
    """The first `count` requests of a safetensors file: `pixel_values`, and metadata `questions` (a JSON list of texts).

    Raises:
        InputError: the file cannot be used, or its images have another size than the model's.
    """
    try:
        tensors, texts = read_questions(path)
    except BundleError as error:
        raise InputError(str(error)) from None
    pixels, (height, width) = tensors["pixel_values"], source.size
    if tuple(pixels.shape[1:]) != (3, height, width):
        raise InputError(
            f"golden file {str(path)!r} has images of shape {list(pixels.shape[1:])}; the model takes [3, {height}, {width}]."
        )
    if len(texts) < count:
        raise InputError(f"golden file {str(path)!r} has {len(texts)} questions; {count} are to be verified.")
    return Requests(pixel_values=pixels[:count].float().contiguous(), questions=texts[:count])


def synthetic_encoder_requests(source: EncoderSource, *, count: int, seed: int = 0) -> Requests:
    """Made-up requests: smooth noise as images, random words of the tokenizer as texts, of every length; the first text is
    empty, and some are longer than the model reads."""
    generator = torch.Generator().manual_seed(seed)
    pixels = made_up_images(count, source.size, generator)
    return Requests(pixels, tuple(_text(source, generator, first=index == 0) for index in range(count)))


def _text(source: EncoderSource, generator: torch.Generator, *, first: bool) -> str:
    tokenizer, room = source.processor.tokenizer, source.text.max_tokens
    # A few tokens more than there is room for, so that some are cut.
    wanted = 0 if first else int(torch.randint(2, room + 4, (), generator=generator))
    words: list[str] = []
    for _ in range(8 * wanted):  # most entries are words, few vocabularies have none
        if len(tokenizer(" ".join(words))["input_ids"]) >= wanted:
            break
        entry = int(torch.randint(0, len(tokenizer), (), generator=generator))
        word = "" if entry in tokenizer.all_special_ids else tokenizer.decode([entry]).strip()
        if word and word.isprintable() and "\ufffd" not in word:
            words.append(word)
    return " ".join(words)


# ---- the reference


@torch.no_grad()
def encoder_reference(source: EncoderSource, requests: Requests, *, progress: Progress = lambda: None) -> TextGolden:
    """What transformers makes of each request, alone; token schedule as attached.

    Texts are given to transformers as it wants them, so that padding can only do harm here: without any, but for SigLIP.

    Args:
        progress: called after each request.
    """
    found: list[dict[str, Tensor]] = []
    tokens, logits = [], []
    for index, text in enumerate(requests.questions):
        pixels, padded = requests.pixel_values[index : index + 1], source.input_ids(text)
        ids = padded if _reads_padding(source.model) else torch.tensor([source.token_ids(text)])
        tensors = _REFERENCES[source.kind](source, pixels, ids)
        if source.generates:
            tokens.append(tensors.pop("tokens"))
            logits.append(tensors.pop("logits"))
        found.append({"pixel_values": pixels, "input_ids": padded, **tensors})
        progress()
    return TextGolden(
        texts=requests.questions,
        tensors={name: torch.cat([one[name] for one in found]) for name in found[0]},
        tokens=tuple(tokens),
        logits=tuple(logits),
    )


def _towers(source: EncoderSource, pixels: Tensor, ids: Tensor) -> dict[str, Any]:
    model = source.model
    image = model.get_image_features(**_image_arguments(model, pixels)).pooler_output
    return {"image_embeds": image, "text_embeds": model.get_text_features(input_ids=ids).pooler_output}


def _image_arguments(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """What `get_image_features` takes for an image [1, 3, H, W]."""
    if not family_of(model).variable_images:
        return {"pixel_values": pixels}
    # Patches as SigLIP 2's processor writes them, pixel by pixel, row by row.
    side = model.config.vision_config.patch_size
    height, width = pixels.shape[-2] // side, pixels.shape[-1] // side
    patches = pixels.reshape(1, 3, height, side, width, side).permute(0, 2, 4, 3, 5, 1)
    return {
        "pixel_values": patches.reshape(1, height * width, -1),
        "pixel_attention_mask": torch.ones(1, height * width, dtype=torch.int32),
        "spatial_shapes": torch.tensor([[height, width]]),
    }


def _matcher(source: EncoderSource, pixels: Tensor, ids: Tensor) -> dict[str, Any]:
    output = source.model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
    return {"image_features": output.last_hidden_state, "itm_scores": output.itm_score}


def _writer(source: EncoderSource, pixels: Tensor, ids: Tensor) -> dict[str, Any]:
    model, captions = source.model, source.kind == "captions"
    # A caption's text ends in a [SEP] that transformers leaves off.
    given = torch.cat([ids, ids.new_tensor([[model.config.text_config.sep_token_id]])], 1) if captions else ids
    output = model.generate(
        # transformers writes into the ids that a captioning model is given.
        input_ids=given.clone(),
        attention_mask=torch.ones_like(given),
        pixel_values=pixels,
        do_sample=False,
        num_beams=1,
        max_new_tokens=source.new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return {
        "image_features": model.vision_model(pixel_values=pixels).last_hidden_state,
        "tokens": tuple(output.sequences[0, ids.shape[1] if captions else 1 :].tolist()),
        "logits": torch.cat(output.logits).float(),
    }


_REFERENCES: dict[Kind, Callable[[EncoderSource, Tensor, Tensor], dict[str, Any]]] = {
    "towers": _towers,
    "matcher": _matcher,
    "answers": _writer,
    "captions": _writer,
}
