"""A generative model to export: loaded with its plan and processor, its prompt and images as the processor makes them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from comp_edge.checkpoint import load_any, load_processor, resolve
from comp_edge.cost import DEFAULT_PROMPT_TOKENS
from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.families.base import Request
from comp_edge.plan import Plan, plan_of
from comp_edge.schedule import attach
from comp_edge.units import dense_plan
from export.inputs import image_grid, image_inputs
from export.positions import ImageGrid

Size = tuple[int, int]


@dataclass
class Source:
    """A generative model to export, with its plan and processor.

    Attributes:
        template: the prompt with `{question}` and the image token once, and what the processor writes around an image.
        new_tokens: tokens that may be generated after a prompt.
        size: height and width of the images in pixels; None for the model's usual size.
        notes: what the user should know of the export, a sentence each.
    """

    model: Any
    plan: Plan
    processor: Any
    template: str
    new_tokens: int
    size: Size | None = None
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> dict[str, tuple[int, ...]]:
        """The plan's token schedule of each stream."""
        return self.plan.schedules

    @property
    def image_size(self) -> Size:
        """Height and width of the images in pixels."""
        if self.size is not None:
            return self.size
        side = family_of(self.model).image_size(self.model)
        return side, side

    @property
    def grid(self) -> ImageGrid | None:
        """The image in the prompt, where its tokens have positions in two dimensions."""
        grid = image_grid(self.model, self.image_size)
        return None if grid is None else ImageGrid(*grid, self.image_tokens)

    @property
    def image_token_id(self) -> int:
        """The token that stands for an image token."""
        return self.model.config.image_token_id

    @property
    def image_tokens(self) -> int:
        """Rows of image features."""
        return family_of(self.model).delivered(self.model, self.tokens["vision"])

    @property
    def dense_image_tokens(self) -> int:
        """Rows of image features of the dense model."""
        return family_of(self.model).image_tokens(self.model, self.tokens["vision"][0])

    @property
    def text_tokens(self) -> int:
        """Text tokens of the longest prompt, the image not counted."""
        return self.tokens["language"][0] - self.image_tokens

    def prompt_ids(self, question: str) -> list[int]:
        """Token ids of the prompt, the image token once.

        Raises:
            InputError: the prompt is longer than the plan's.
        """
        ids = self.tokenize(question)
        if len(ids) - 1 > self.text_tokens:
            raise InputError(
                f"question {question!r} makes a prompt of {len(ids) - 1} text tokens; the plan's schedule has room for "
                f"{self.text_tokens}."
            )
        return ids

    def tokenize(self, question: str) -> list[int]:
        """Token ids of a prompt of any length."""
        text = self.template.replace("{question}", question)
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def load_source(
    ref: str | Path,
    *,
    template: str | None = None,
    new_tokens: int = 16,
    prompt_tokens: int | None = None,
    size: Size | None = None,
) -> Source:
    """Load a pruned folder or a dense model, in fp32.

    Args:
        template: the prompt as the processor takes it, with the image token and `{question}` once each.
        prompt_tokens: longest prompt of a dense model; a pruned one has it in its plan.
        size: height and width of the images, where the model takes any.

    Raises:
        InputError: the model, the template or the numbers cannot be used.
    """
    processor = load_processor(ref)
    template = template or _prompt_template(processor)
    model = load_any(ref, dtype=torch.float32).eval().requires_grad_(False)
    if family_of(model).fusion(model) is None:
        raise InputError(
            f"model type {model.config.model_type!r} does not put images into the prompt of a language model; it cannot be "
            "exported as a whole."
        )
    plan = plan_of(model)
    if plan is not None and prompt_tokens is not None:
        raise InputError(f"prompt tokens {prompt_tokens} were given, but {str(ref)!r} has a plan that fixes them.")
    if plan is not None and plan.images > 1:
        raise InputError(
            f"the plan is for {plan.images} images or tiles in a prompt; a bundle takes one: prune with requests of one image."
        )
    size = _image_size(model, plan, size)
    if plan is None:
        plan = _dense_plan(model, str(ref), prompt_tokens or DEFAULT_PROMPT_TOKENS, size)
    template = _with_image_text(template, processor, model, size)
    if template.count(processor.image_token) != 1 or template.count("{question}") != 1:
        raise InputError(
            f"prompt template {template!r} must contain {processor.image_token!r} once and '{{question}}' once."
        )
    notes = []
    if (stored := stored_type(ref)) != "float32":
        notes.append(f"the weights are stored as {stored}; the program computes in float32 with the same values")
    if _cuts_tiles(processor):
        notes.append(
            f"the processor may cut an image into several; the bundle takes one image of {size[0]}x{size[1]} pixels, whole"
        )
    return Source(
        model=model,
        plan=plan,
        processor=processor,
        template=template,
        new_tokens=new_tokens,
        size=size,
        notes=tuple(notes),
    )


def stored_type(ref: str | Path) -> str:
    """What the weights of a local folder are stored as; `float32` where it is none."""
    source = resolve(ref)
    files = sorted(source.glob("*.safetensors")) if isinstance(source, Path) else []
    names = {"BF16": "bfloat16", "F16": "float16"}
    for path in files[:1]:
        with safe_open(path, framework="pt") as file:
            types = {file.get_slice(name).get_dtype() for name in file.keys()}
        return next((names[kind] for kind in names if kind in types), "float32")
    return "float32"


def _image_size(model: Any, plan: Plan | None, size: Size | None) -> Size:
    """Height and width of the images.

    Raises:
        InputError: the model takes another size, or the plan was made for another.
    """
    family = family_of(model)
    side = family.image_size(model)
    if not family.variable_images:
        if size not in (None, (side, side)):
            raise InputError(f"image size {size[0]}x{size[1]} was given; the model takes {side}x{side}.")
        return side, side
    patch = model.config.vision_config.patch_size
    patches = family.dense_vision_tokens(model) if plan is None else plan.schedules["vision"][0]
    if size is None:
        side = round(patches**0.5) * patch
        if side * side != patches * patch * patch:
            raise InputError(
                f"the plan is for images of {patches} patches, which are not square; give --image-size HxW."
            )
        return side, side
    step = patch * model.config.vision_config.spatial_merge_size
    if size[0] % step or size[1] % step:
        raise InputError(f"image size {size[0]}x{size[1]} does not fit; height and width must be multiples of {step}.")
    given = size[0] * size[1] // patch**2
    if plan is not None and given != patches:
        raise InputError(
            f"image size {size[0]}x{size[1]} makes {given} patches of {patch} pixels; the plan is for images of {patches}."
        )
    return size


def _dense_plan(model: Any, base: str, prompt_tokens: int, size: Size) -> Plan:
    family = family_of(model)
    request = family.default_request(model, prompt_tokens)
    if family.variable_images:
        patch = model.config.vision_config.patch_size
        request = Request(vision_tokens=size[0] * size[1] // patch**2, text_tokens=prompt_tokens)
    return dense_plan(model, base=base, request=request)


def _prompt_template(processor: Any) -> str:
    """What the processor's chat template makes of an image and `{question}`; LLaVA's customary prompt without one."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": "{question}"}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return f"USER: {processor.image_token}\n{{question}} ASSISTANT:"


def _with_image_text(template: str, processor: Any, model: Any, size: Size) -> str:
    """The template as the processor completes it: what it writes around the image tokens, these once."""
    pixels = torch.zeros(1, 3, *size)
    one_image = {
        "pixel_values": pixels,
        "num_patches": [1],
        "rows": [[0]],
        "cols": [[0]],
        **image_inputs(model, pixels),
    }
    one_image["pixel_values"] = pixels
    text = processor.replace_image_token(one_image, 0)
    tokens = text.count(processor.image_token)
    return template.replace(processor.image_token, text.replace(processor.image_token * tokens, processor.image_token))


def _cuts_tiles(processor: Any) -> bool:
    """Whether the processor, left alone, makes several images of a large one."""
    image, defaults = processor.image_processor, getattr(processor, "images_kwargs", None) or {}
    names = ("do_image_splitting", "crop_to_patches")
    return any(defaults.get(name, getattr(image, name, False)) for name in names)


def without_language_drops(source: Source) -> Source:
    """The same model with every drop inside the language model lifted (the live model's schedule changes with it)."""
    language = source.tokens["language"]
    lifted = source.plan.with_tokens("language", (language[0],) * len(language))
    attach(source.model, lifted.schedules)
    return dataclasses.replace(source, plan=lifted)
