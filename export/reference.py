"""What an exporter needs of the source model: requests to try, and the answers of transformers' own `generate`.

Shared by every backend. An exporter knows no tasks: requests come from a file, or are made up from the tokenizer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comp_edge.errors import InputError
from comp_edge.families import family_of
from export.bundle import PROCESSOR_FILES, BundleError, Golden, ImageSpec, PromptSpec, read_questions
from export.inputs import image_grid, image_inputs, request_inputs
from export.positions import prompt_positions
from export.progress import Progress
from export.source import Size, Source

RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


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
    height, width = source.image_size
    if tuple(pixels.shape[1:]) != (3, height, width):
        raise InputError(
            f"golden file {str(path)!r} has images of shape {list(pixels.shape[1:])}; the model takes [3, {height}, {width}]."
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
    pixels = made_up_images(count, source.image_size, generator)
    return Requests(pixel_values=pixels, questions=tuple(_question(source, generator) for _ in range(count)))


def made_up_images(count: int, size: Size, generator: torch.Generator) -> Tensor:
    """[count, 3, H, W]: smooth noise in -1..1."""
    coarse = torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1
    pixels = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
    return (pixels + 0.1 * torch.randn(pixels.shape, generator=generator)).clamp(-1, 1)


def _question(source: Source, generator: torch.Generator) -> str:
    tokenizer = source.processor.tokenizer
    room = source.text_tokens - (len(source.prompt_ids("")) - 1)
    length = int(torch.randint(max(room // 2, 1), max(room, 1) + 1, (), generator=generator))
    ids = torch.randint(0, len(tokenizer), (length,), generator=generator).tolist()
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    words = [tokenizer.decode([i]) for i in ids if i not in special]
    question = "".join(word for word in words if word.isprintable() and "\ufffd" not in word)
    # Decoded and tokenized again, other merges may apply: shorten until the prompt fits.
    while question and len(source.tokenize(question)) - 1 > source.text_tokens:
        question = question[:-1]
    return question


# ---- the reference


@torch.no_grad()
def reference(source: Source, requests: Requests, *, progress: Progress = lambda: None) -> Golden:
    """What transformers' own `generate` makes of each request, alone and greedily; token schedule as attached.

    Args:
        progress: called after each request.
    """
    features, tokens, logits = [], [], []
    for index, question in enumerate(requests.questions):
        pixels = requests.pixel_values[index : index + 1]
        ids = source.prompt_ids(question)
        inputs = request_inputs(source.model, pixels, ids, image_tokens=source.dense_image_tokens)
        output = source.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=source.new_tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens.append(tuple(output.sequences[0, inputs["input_ids"].shape[1] :].tolist()))
        logits.append(torch.cat(output.logits).float())
        features.append(_delivered(source, pixels))
        progress()
    return Golden(
        questions=requests.questions,
        pixel_values=requests.pixel_values,
        image_features=torch.stack(features),
        tokens=tuple(tokens),
        logits=tuple(logits),
    )


def _delivered(source: Source, pixels: Tensor) -> Tensor:
    """[k, d], the features that the language model gets of an image.

    A model with a schedule pads its features with zeros to the dense number: behind them, or where dropped tokens were.
    """
    model = source.model
    found = model.get_image_features(**image_inputs(model, pixels), return_dict=True).pooler_output
    rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in found])
    if family_of(model).absolute_positions:
        rows = rows[(rows != 0).any(-1)]
    return rows[: source.image_tokens]


def prefill_inputs(
    source: Source, question: str, image_features: Tensor, kept: Tensor | None = None
) -> tuple[Tensor, ...]:
    """What `prefill` gets: [1, S, d] (left pads zero), how many pads there are, and positions where it takes them.

    Args:
        image_features: [k, d].
        kept: [k], see `export.graph.VisionEncoder`.
    """
    ids = source.prompt_ids(question)
    at = ids.index(source.image_token_id)
    table = source.model.get_input_embeddings().weight
    rows = torch.cat([table[ids[:at]], image_features, table[ids[at + 1 :]]])
    start = source.tokens["language"][0] - len(rows)
    inputs = (torch.cat([rows.new_zeros(start, rows.shape[1]), rows])[None].detach(), torch.tensor([start]))
    if (grid := source.grid) is None:
        return inputs
    return *inputs, prompt_positions(grid, slots=source.tokens["language"][0], first=start + at, kept=kept)


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
        image_token_id=source.image_token_id,
        image_tokens=source.image_tokens,
        max_text_tokens=source.text_tokens,
        pad_token_id=source.processor.tokenizer.pad_token_id,
        eos_token_ids=eos_token_ids(source),
        max_new_tokens=source.new_tokens,
        grid=image_grid(source.model, source.image_size),
    )


def image_spec(source: Source) -> ImageSpec:
    """How an image becomes pixel values.

    Raises:
        InputError: the processor prepares images of another size than the model's.
    """
    image, (height, width) = source.processor.image_processor, source.image_size
    crops = bool(getattr(image, "do_center_crop", False))
    if not family_of(source.model).variable_images:
        _check_size(image, crops, source.image_size)
    return ImageSpec(
        height=height,
        width=width,
        resample=RESAMPLING[int(image.resample)],
        center_crop=crops,
        rescale=float(image.rescale_factor) if image.do_rescale else 1.0,
        mean=tuple(image.image_mean) if image.do_normalize else (0.0,) * 3,
        std=tuple(image.image_std) if image.do_normalize else (1.0,) * 3,
    )


def _check_size(image: Any, crops: bool, wanted: Size) -> None:
    """Whether an image processor makes images of a size.

    Raises:
        InputError: it makes others.
    """
    size = image.crop_size if crops else image.size
    # Idefics3: tiles, and an image that is not cut, are squares of this side.
    if largest := getattr(image, "max_image_size", None):
        size = {"height": largest["longest_edge"], "width": largest["longest_edge"]}
    if (size.get("height"), size.get("width")) != wanted:
        raise InputError(f"the image processor makes images of {dict(size)}; the model takes {wanted[0]}x{wanted[1]}.")


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
