"""What an exporter needs of the source model: requests to try, and the answers of transformers' own `generate`.

Shared by every backend. An exporter knows no tasks: requests come from a file, or are made up from the tokenizer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comp_edge.checkpoint import load_any, load_processor
from comp_edge.cost import DEFAULT_PROMPT_TOKENS
from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.plan import Plan
from comp_edge.schedule import attach
from comp_edge.surgery import PLAN_ATTRIBUTE
from comp_edge.units import dense_plan
from export.bundle import PROCESSOR_FILES, BundleError, Golden, ImageSpec, PromptSpec, read_questions

RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


@dataclass
class Source:
    """A model to export, with its plan and processor.

    Attributes:
        template: the prompt with `{question}` and the image token once.
        new_tokens: tokens that may be generated after a prompt.
    """

    model: Any
    plan: Plan
    processor: Any
    template: str
    new_tokens: int

    @property
    def tokens(self) -> dict[str, tuple[int, ...]]:
        """The plan's token schedule of each stream."""
        return {name: stream.tokens for name, stream in self.plan.streams.items()}

    @property
    def image_tokens(self) -> int:
        """Rows of image features."""
        return family_of(self.model).image_tokens(self.model, self.tokens["vision"][-1])

    @property
    def text_tokens(self) -> int:
        """Text tokens of the longest prompt, the image not counted."""
        return self.tokens["language"][0] - self.image_tokens

    def prompt_ids(self, question: str) -> list[int]:
        """Token ids of the prompt, the image token once.

        Raises:
            InputError: the prompt is longer than the plan's.
        """
        ids = self.processor.tokenizer(self.template.replace("{question}", question), add_special_tokens=False)[
            "input_ids"
        ]
        if len(ids) - 1 > self.text_tokens:
            raise InputError(
                f"question {question!r} makes a prompt of {len(ids) - 1} text tokens; the plan's schedule has room for "
                f"{self.text_tokens}."
            )
        return ids


def load_source(
    ref: str | Path, *, template: str | None = None, new_tokens: int = 16, prompt_tokens: int | None = None
) -> Source:
    """Load a pruned folder or a dense model.

    Args:
        prompt_tokens: longest prompt of a dense model; a pruned one has it in its plan.

    Raises:
        InputError: the model, the template or the numbers cannot be used.
    """
    processor = load_processor(ref)
    template = template or _prompt_template(processor)
    if template.count(processor.image_token) != 1 or template.count("{question}") != 1:
        raise InputError(
            f"prompt template {template!r} must contain {processor.image_token!r} once and '{{question}}' once."
        )
    model = load_any(ref).eval().requires_grad_(False)
    plan = getattr(model, PLAN_ATTRIBUTE, None)
    if plan is None:
        plan = dense_plan(model, prompt_tokens=prompt_tokens or DEFAULT_PROMPT_TOKENS, base=str(ref))
    elif prompt_tokens is not None:
        raise InputError(f"prompt tokens {prompt_tokens} were given, but {str(ref)!r} has a plan that fixes them.")
    return Source(model=model, plan=plan, processor=processor, template=template, new_tokens=new_tokens)


def _prompt_template(processor: Any) -> str:
    """What the processor's chat template makes of an image and `{question}`; LLaVA's customary prompt without one."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": "{question}"}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return f"USER: {processor.image_token}\n{{question}} ASSISTANT:"


def without_language_drops(source: Source) -> Source:
    """The same model with every drop inside the language model lifted (the live model's schedule changes with it)."""
    language = source.tokens["language"]
    lifted = source.plan.with_tokens("language", (language[0],) * len(language))
    attach(source.model, {name: stream.tokens for name, stream in lifted.streams.items()})
    return Source(
        model=source.model,
        plan=lifted,
        processor=source.processor,
        template=source.template,
        new_tokens=source.new_tokens,
    )


# ---- requests


@dataclass(frozen=True)
class Requests:
    """Images [n, 3, H, W], prepared, and one question for each."""

    pixel_values: Tensor
    questions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.questions)


def read_requests(path: str | Path, source: Source, *, count: int) -> Requests:
    """The first `count` requests of a safetensors file: `pixel_values`, and metadata `questions` (a JSON list).

    Raises:
        InputError: the file cannot be used, or its images have another size than the model's.
    """
    try:
        tensors, questions = read_questions(path)
    except BundleError as error:
        raise InputError(str(error)) from None
    pixels = tensors["pixel_values"]
    side = source.model.config.vision_config.image_size
    if tuple(pixels.shape[1:]) != (3, side, side):
        raise InputError(
            f"golden file {str(path)!r} has images of shape {list(pixels.shape[1:])}; the model takes [3, {side}, {side}]."
        )
    if len(questions) < count:
        raise InputError(f"golden file {str(path)!r} has {len(questions)} questions; {count} are to be verified.")
    requests = Requests(pixel_values=pixels[:count].float().contiguous(), questions=questions[:count])
    for question in requests.questions:
        source.prompt_ids(question)
    return requests


def synthetic_requests(source: Source, *, count: int, seed: int = 0) -> Requests:
    """Made-up requests: smooth noise as images, random words of the tokenizer as questions of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    side = source.model.config.vision_config.image_size
    coarse = torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1
    pixels = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)
    pixels = (pixels + 0.1 * torch.randn(pixels.shape, generator=generator)).clamp(-1, 1)
    return Requests(pixel_values=pixels, questions=tuple(_question(source, generator) for _ in range(count)))


def _question(source: Source, generator: torch.Generator) -> str:
    tokenizer = source.processor.tokenizer
    room = source.text_tokens - (len(source.prompt_ids("")) - 1)
    length = int(torch.randint(max(room // 2, 1), max(room, 1) + 1, (), generator=generator))
    ids = torch.randint(0, len(tokenizer), (length,), generator=generator).tolist()
    words = [tokenizer.decode([i]) for i in ids if i not in tokenizer.all_special_ids]
    question = "".join(word for word in words if word.isprintable() and "\ufffd" not in word)
    # Decoded and tokenized again, other merges may apply: shorten until the prompt fits.
    while len(tokenizer(source.template.replace("{question}", question), add_special_tokens=False)["input_ids"]) - 1 > (
        source.text_tokens
    ):
        question = question[:-1]
    return question


# ---- the reference


@torch.no_grad()
def reference(source: Source, requests: Requests, *, progress: Callable[[], None] = lambda: None) -> Golden:
    """What transformers' own `generate` makes of each request, alone and greedily; token schedule as attached.

    Args:
        progress: called after each request.
    """
    model, family = source.model, family_of(source.model)
    dense = family.image_tokens(model, family.dense_vision_tokens(model))
    image = model.config.image_token_id
    features, tokens, logits = [], [], []
    for index, question in enumerate(requests.questions):
        pixels = requests.pixel_values[index : index + 1]
        ids = [part for i in source.prompt_ids(question) for part in ([image] * dense if i == image else [i])]
        ids = torch.tensor([ids])
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            do_sample=False,
            max_new_tokens=source.new_tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens.append(tuple(output.sequences[0, ids.shape[1] :].tolist()))
        logits.append(torch.cat(output.logits).float())
        # A model with a schedule pads its features with zeros to the dense number.
        delivered = torch.stack(list(model.get_image_features(pixels, return_dict=True).pooler_output))
        features.append(delivered[0, : source.image_tokens])
        progress()
    return Golden(
        questions=requests.questions,
        pixel_values=requests.pixel_values,
        image_features=torch.stack(features),
        tokens=tuple(tokens),
        logits=tuple(logits),
    )


def compact_embeddings(source: Source, question: str, image_features: Tensor) -> tuple[Tensor, int]:
    """What `prefill` gets: [1, S, d] (left pads zero) and how many pads there are.

    Args:
        image_features: [k, d].
    """
    ids = source.prompt_ids(question)
    at = ids.index(source.model.config.image_token_id)
    table = source.model.get_input_embeddings().weight
    rows = torch.cat([table[ids[:at]], image_features, table[ids[at + 1 :]]])
    start = source.tokens["language"][0] - len(rows)
    return torch.cat([rows.new_zeros(start, rows.shape[1]), rows])[None].detach(), start


# ---- what the manifest says of inputs


def eos_token_ids(source: Source) -> tuple[int, ...]:
    """Tokens that end an answer."""
    eos = source.model.generation_config.eos_token_id
    if eos is None:
        eos = source.processor.tokenizer.eos_token_id
    return tuple(eos) if isinstance(eos, Iterable) else (eos,)


def prompt_spec(source: Source) -> PromptSpec:
    """How a question becomes token ids."""
    return PromptSpec(
        template=source.template,
        image_token=source.processor.image_token,
        image_token_id=source.model.config.image_token_id,
        image_tokens=source.image_tokens,
        max_text_tokens=source.text_tokens,
        pad_token_id=source.processor.tokenizer.pad_token_id,
        eos_token_ids=eos_token_ids(source),
        max_new_tokens=source.new_tokens,
    )


def image_spec(source: Source) -> ImageSpec:
    """How an image becomes pixel values.

    Raises:
        InputError: the processor prepares images of another size than the model's.
    """
    side, image = source.model.config.vision_config.image_size, source.processor.image_processor
    size = image.crop_size if image.do_center_crop else image.size
    height, width = size.get("height"), size.get("width")
    if (height, width) != (side, side):
        raise InputError(f"the image processor makes images of {dict(size)}; the model takes {side}x{side}.")
    return ImageSpec(
        height=height,
        width=width,
        resample=RESAMPLING[int(image.resample)],
        center_crop=bool(image.do_center_crop),
        rescale=float(image.rescale_factor) if image.do_rescale else 1.0,
        mean=tuple(image.image_mean) if image.do_normalize else (0.0,) * 3,
        std=tuple(image.image_std) if image.do_normalize else (1.0,) * 3,
    )


def pixel_range(spec: ImageSpec) -> tuple[float, float]:
    """Smallest and largest value that an image can have after normalization."""
    low = min((0.0 - mean) / std for mean, std in zip(spec.mean, spec.std, strict=True))
    high = max((255.0 * spec.rescale - mean) / std for mean, std in zip(spec.mean, spec.std, strict=True))
    return round(low, 6), round(high, 6)


def write_processor(source: Source, folder: Path) -> None:
    """Write the tokenizer's and the image processor's files that a bundle carries."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as staging:
        source.processor.save_pretrained(staging)
        for name in PROCESSOR_FILES:
            written = Path(staging) / name
            if written.is_file():
                (folder / name).write_bytes(written.read_bytes())
