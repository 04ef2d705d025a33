"""What `manifest.json` of a bundle says: the schema, as pydantic models and as JSON Schema.

`manifest.schema.json` beside this file is the JSON Schema, for readers that are not Python.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SCHEMA_FILE = Path(__file__).with_name("manifest.schema.json")
Size = Annotated[int, Field(ge=0)]


class BundleError(ValueError):
    """A bundle cannot be read; the message is one sentence that says which file and why."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DynamicSize(_Part):
    """A dimension that the caller chooses, within bounds."""

    min: Size
    max: Size


class TensorSpec(_Part):
    """One input or output of a method."""

    name: str
    shape: tuple[Size | DynamicSize, ...]
    dtype: Literal["float32", "float16", "int64", "int32"]
    layout: str = Field(description="what each dimension is, e.g. 'batch, channel (RGB), height, width'")
    range: tuple[float, float] | None = Field(default=None, description="smallest and largest value; null: any")
    about: str = ""


class MethodSpec(_Part):
    """One callable of the program. Inputs are in calling order."""

    name: str
    file: str
    function: str | None = Field(
        default=None, description="function of a multifunction package; null: the method's name"
    )
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[TensorSpec, ...] = ()
    about: str = ""


class ImageSpec(_Part):
    """How an image becomes `pixel_values`: resize, optionally crop, scale, normalize."""

    height: Size
    width: Size
    channels: Literal["RGB"] = "RGB"
    resample: str
    center_crop: bool
    rescale: float = Field(description="multiplies 0..255 values")
    mean: tuple[float, ...]
    std: tuple[float, ...]


class PromptSpec(_Part):
    """How a question becomes token ids: fill the template, tokenize without special tokens, replace the image token."""

    template: str = Field(description="contains {question} and the image token once")
    image_token: str
    image_token_id: Size
    image_tokens: Size = Field(description="rows of image features that take the place of the image token")
    max_text_tokens: Size = Field(description="longest prompt, image token not counted")
    pad_token_id: Size
    eos_token_ids: tuple[Size, ...]
    max_new_tokens: Size
    grid: tuple[Size, Size] | None = Field(
        default=None,
        description="height and width of the dense image in tokens, where image tokens have positions in two dimensions "
        "(M-RoPE); null: tokens follow each other",
    )


class TextSpec(_Part):
    """How a text becomes `input_ids`, where a method takes a whole text: tokenize without special tokens, keep as many tokens
    as fit, put `prefix` before and `suffix` behind them, and pad to `max_tokens`."""

    max_tokens: Size = Field(description="length of input_ids")
    prefix: tuple[Size, ...]
    suffix: tuple[Size, ...]
    pad_token_id: Size
    padding: Literal["left", "right"] = "right"
    lowercase: bool = Field(
        default=False, description="put the text in lower case first; false: the tokenizer does what it needs"
    )
    strip_punctuation: bool = Field(
        default=False, description="then remove ASCII punctuation and join words by single spaces"
    )


class AnswerSpec(_Part):
    """How an answer is generated: prefill once, then decode token by token with what prefill handed on."""

    start_token_id: Size | None = Field(
        description="decode this token at position 0 for the answer's first; null: prefill gives its logits, and the first "
        "generated token has the position behind the text, its number of tokens"
    )
    eos_token_ids: tuple[Size, ...]
    max_new_tokens: Size


class Delegation(_Part):
    """Where the operations of a method run."""

    delegates: Size
    delegated_ops: Size
    other_ops: dict[str, Size] = Field(description="operations outside the backend, and how many")


class Verification(_Part):
    """The written program, loaded back and run, against the transformers model: its own `generate`, or its embeddings."""

    reference: str
    questions: Size
    matched: Size = Field(
        description="questions whose generated tokens equal the reference's; of encoders, requests within the tolerance"
    )
    tokens_equal: bool | None = Field(description="null where nothing is generated")
    max_abs_error: float = Field(
        description="logits of every generated token, over all questions that are not ambiguous; of encoders, every output"
    )
    tolerance: float
    ambiguous: Size = Field(
        default=0,
        description="questions that rounding decides: two tokens at the cut of a drop score alike within it, or the model's "
        "own logits move between fp32 and fp64",
    )
    ambiguous_max_abs_error: float | None = None
    details: dict[str, Any] = Field(default_factory=dict, description="what else a backend measures")


class Manifest(_Part):
    """`manifest.json`."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    backend: Literal["executorch", "coreml"]
    profile: str
    model_type: str
    base: str
    precision: str
    methods: tuple[MethodSpec, ...]
    constants: dict[str, int | bool | list[int]] = Field(
        default_factory=dict, description="constant methods of the program"
    )
    image: ImageSpec
    prompt: PromptSpec | None = Field(
        default=None, description="where the image lies in the prompt of a language model"
    )
    text: TextSpec | None = Field(default=None, description="where a method takes a whole text")
    answer: AnswerSpec | None = Field(default=None, description="where an answer follows a text")
    tokens: dict[str, tuple[Size, ...]] = Field(description="tokens that each layer of a stream computes on")
    lifted_language_drops: tuple[Size, ...] | None = Field(
        default=None, description="the plan's language schedule, where this profile could not apply it"
    )
    delegation: dict[str, Delegation] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    toolchain: dict[str, str]
    files: dict[str, str] = Field(description="sha256 of every file but this one, by path within the bundle")
    verification: Verification | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if (self.prompt is None) == (self.text is None):
            raise ValueError("exactly one of 'prompt' and 'text' says how a request is tokenized")
        names = [method.name for method in self.methods]
        if len(set(names)) != len(names):
            raise ValueError(f"methods must have different names, got {names}")
        for method in self.methods:
            inside = [path for path in self.files if path == method.file or path.startswith(f"{method.file}/")]
            if not inside:
                raise ValueError(f"method {method.name!r} is in {method.file!r}, which 'files' does not list")
        for path in self.files:
            if Path(path).is_absolute() or ".." in Path(path).parts:
                raise ValueError(f"file {path!r} must be a path within the bundle")
        return self

    def method(self, name: str) -> MethodSpec:
        """The method of this name.

        Raises:
            BundleError: there is none.
        """
        for method in self.methods:
            if method.name == name:
                return method
        have = ", ".join(method.name for method in self.methods)
        raise BundleError(f"the bundle has no method {name!r}; it has {have}.")


def json_schema() -> dict[str, Any]:
    """The JSON Schema of `manifest.json`, which `manifest.schema.json` holds."""
    schema = Manifest.model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def parse_manifest(value: dict[str, Any]) -> Manifest:
    """Validate a decoded manifest.

    Raises:
        BundleError: says which entry is wrong.
    """
    if value.get("schema") != 1:
        raise BundleError(f"the manifest has schema {value.get('schema')!r}; this version reads schema 1.")
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise BundleError(f"manifest: {place}: {first['msg'].removeprefix('Value error, ')}.") from None
