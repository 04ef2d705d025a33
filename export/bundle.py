"""The bundle: a folder with a program and everything that a mobile developer needs beside it.

    manifest.json        what the program takes and gives, how to prepare an image and a prompt, what was verified
    model.pte | *.mlpackage
    golden.safetensors   inputs, the reference's outputs and the tokens it generates (`Golden`, or `TextGolden` of encoders)
    tokenizer.json, ...  files of the tokenizer and the image processor

This module reads and writes bundles of every backend and depends on nothing but pydantic, safetensors and torch, so that a
bundle can be checked where comp-edge is not installed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from export.manifest import (
    SCHEMA_FILE,
    AnswerSpec,
    BundleError,
    Delegation,
    DynamicSize,
    ImageSpec,
    Manifest,
    MethodSpec,
    PromptSpec,
    TensorSpec,
    TextSpec,
    Verification,
    json_schema,
    parse_manifest,
)

__all__ = [
    "GOLDEN_FILE",
    "MANIFEST_FILE",
    "PROCESSOR_FILES",
    "SCHEMA_FILE",
    "AnswerSpec",
    "Bundle",
    "BundleError",
    "Delegation",
    "DynamicSize",
    "Golden",
    "ImageSpec",
    "Manifest",
    "MethodSpec",
    "PromptSpec",
    "TensorSpec",
    "TextGolden",
    "TextSpec",
    "Verification",
    "find_bundles",
    "finish_bundle",
    "json_schema",
    "largest",
    "parse_manifest",
    "read_golden",
    "read_manifest",
    "read_questions",
    "read_text_golden",
    "sha256",
    "toolchain",
    "write_golden",
    "write_text_golden",
]

MANIFEST_FILE = "manifest.json"
GOLDEN_FILE = "golden.safetensors"
GOLDEN_KEPT = 8  # requests that a bundle carries; verification may run on many more
TOOLS = ("torch", "transformers", "executorch", "coremltools", "torchao", "numpy")
PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "spiece.model",  # SigLIP's tokenizer
)


@dataclass(frozen=True)
class Golden:
    """Reference inputs and outputs of `len(questions)` requests.

    Attributes:
        pixel_values: [n, 3, H, W].
        image_features: [n, k, d], what the reference gives the language model for each image.
        tokens: per question, the tokens that the reference generates (end-of-sequence included).
        logits: per question, [len(tokens), vocabulary] the logits that each token was taken from.
    """

    questions: tuple[str, ...]
    pixel_values: Tensor
    image_features: Tensor
    tokens: tuple[tuple[int, ...], ...]
    logits: tuple[Tensor, ...]

    def take(self, indices: Sequence[int]) -> Golden:
        """Some of the requests."""
        return Golden(
            questions=tuple(self.questions[i] for i in indices),
            pixel_values=self.pixel_values[list(indices)],
            image_features=self.image_features[list(indices)],
            tokens=tuple(self.tokens[i] for i in indices),
            logits=tuple(self.logits[i] for i in indices),
        )


def write_golden(path: Path, golden: Golden) -> None:
    """Write `golden.safetensors`: `pixel_values`, `image_features`, and flat `tokens` and `logits` with `lengths`."""
    tensors = {
        "pixel_values": golden.pixel_values.float(),
        "image_features": golden.image_features.float(),
        "tokens": torch.tensor([token for row in golden.tokens for token in row], dtype=torch.int64),
        "logits": torch.cat([row.float() for row in golden.logits]),
        "lengths": torch.tensor([len(row) for row in golden.tokens], dtype=torch.int64),
    }
    metadata = {"questions": json.dumps(list(golden.questions), ensure_ascii=False)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


def read_golden(path: str | Path) -> Golden:
    """Read `golden.safetensors`.

    Raises:
        BundleError: missing, truncated or inconsistent.
    """
    tensors, questions = read_questions(path)
    missing = {"pixel_values", "image_features", "tokens", "logits", "lengths"} - set(tensors)
    if missing:
        raise BundleError(f"golden file {str(path)!r} lacks {', '.join(sorted(missing))}.")
    lengths = tensors["lengths"].tolist()
    if len(lengths) != len(questions) or not sum(lengths) == len(tensors["tokens"]) == len(tensors["logits"]):
        raise BundleError(
            f"golden file {str(path)!r} is inconsistent: {len(lengths)} lengths, {len(questions)} questions."
        )
    return Golden(
        questions=questions,
        pixel_values=tensors["pixel_values"],
        image_features=tensors["image_features"],
        tokens=tuple(tuple(row.tolist()) for row in tensors["tokens"].split(lengths)),
        logits=tuple(tensors["logits"].split(lengths)),
    )


@dataclass(frozen=True)
class TextGolden:
    """Reference inputs and outputs of `len(texts)` requests of an image and a text, for methods that take whole texts.

    Attributes:
        tensors: [n, ...] by the name of the input or output, of every method that is called once a request.
        tokens, logits: of generated answers, as in `Golden`; empty where nothing is generated.
    """

    texts: tuple[str, ...]
    tensors: dict[str, Tensor]
    tokens: tuple[tuple[int, ...], ...] = ()
    logits: tuple[Tensor, ...] = ()

    def take(self, indices: Sequence[int]) -> TextGolden:
        """Some of the requests."""
        return TextGolden(
            texts=tuple(self.texts[i] for i in indices),
            tensors={name: tensor[list(indices)] for name, tensor in self.tensors.items()},
            tokens=tuple(self.tokens[i] for i in indices) if self.tokens else (),
            logits=tuple(self.logits[i] for i in indices) if self.logits else (),
        )


def write_text_golden(path: Path, golden: TextGolden) -> None:
    """Write `golden.safetensors`: a tensor for each input and output, and flat `tokens` and `logits` with `lengths`."""
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in golden.tensors.items()}
    if golden.tokens:
        tensors["tokens"] = torch.tensor([token for row in golden.tokens for token in row], dtype=torch.int64)
        tensors["logits"] = torch.cat([row.float() for row in golden.logits])
        tensors["lengths"] = torch.tensor([len(row) for row in golden.tokens], dtype=torch.int64)
    metadata = {"questions": json.dumps(list(golden.texts), ensure_ascii=False)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


def read_text_golden(path: str | Path) -> TextGolden:
    """Read what `write_text_golden` wrote.

    Raises:
        BundleError: missing, truncated or inconsistent.
    """
    tensors, texts = read_questions(path)
    lengths, tokens, logits = (tensors.pop(name, None) for name in ("lengths", "tokens", "logits"))
    if "input_ids" not in tensors:
        raise BundleError(f"golden file {str(path)!r} lacks input_ids.")
    short = next((name for name, tensor in tensors.items() if len(tensor) != len(texts)), None)
    if short is not None:
        raise BundleError(
            f"golden file {str(path)!r} is inconsistent: {len(tensors[short])} rows of {short}, {len(texts)} questions."
        )
    if lengths is None:
        return TextGolden(texts=texts, tensors=tensors)
    counts = lengths.tolist()
    if tokens is None or logits is None or len(counts) != len(texts) or not sum(counts) == len(tokens) == len(logits):
        raise BundleError(f"golden file {str(path)!r} is inconsistent: {len(counts)} lengths, {len(texts)} questions.")
    return TextGolden(
        texts=texts,
        tensors=tensors,
        tokens=tuple(tuple(row.tolist()) for row in tokens.split(counts)),
        logits=tuple(logits.split(counts)),
    )


def read_questions(path: str | Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors and questions of a safetensors file with one `pixel_values` row a question.

    Raises:
        BundleError: missing, truncated, or without questions or images.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
        questions = json.loads(metadata.get("questions", "null"))
    except FileNotFoundError:
        raise BundleError(f"golden file {str(path)!r} does not exist.") from None
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise BundleError(f"golden file {str(path)!r} is corrupt or truncated ({error}).") from None
    images = tensors.get("pixel_values")
    if not isinstance(questions, list) or not all(isinstance(q, str) for q in questions) or not questions:
        raise BundleError(f"golden file {str(path)!r} has no metadata 'questions', a JSON list of strings.")
    if images is None or images.ndim != 4 or len(images) != len(questions):
        shape = None if images is None else list(images.shape)
        raise BundleError(
            f"golden file {str(path)!r} needs pixel_values [{len(questions)}, 3, H, W], one image a question; it has {shape}."
        )
    return tensors, tuple(questions)


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk, its manifest read and validated."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path) -> Bundle:
        """Read the manifest of a bundle folder.

        Raises:
            BundleError: no folder, no manifest, or one that is not valid; says where.
        """
        folder = Path(folder)
        return cls(folder=folder, manifest=parse_manifest(read_manifest(folder)))

    def path(self, name: str) -> Path:
        """The path of a file of the bundle."""
        return self.folder / name

    def golden(self) -> Golden:
        """The golden inputs and outputs.

        Raises:
            BundleError: missing or corrupt.
        """
        return read_golden(self.folder / GOLDEN_FILE)

    def text_golden(self) -> TextGolden:
        """The same of a bundle whose methods take whole texts.

        Raises:
            BundleError: missing or corrupt.
        """
        return read_text_golden(self.folder / GOLDEN_FILE)

    def hash_errors(self) -> list[str]:
        """What differs between the files and the manifest's list: changed, missing and unlisted files."""
        errors = []
        have = {path.relative_to(self.folder).as_posix() for path in _files(self.folder)}
        for name, expected in self.manifest.files.items():
            if name not in have:
                errors.append(f"{name} is missing")
            elif sha256(self.folder / name) != expected:
                errors.append(f"{name} has changed: its sha256 is not the manifest's")
        errors += [f"{name} is not in the manifest" for name in sorted(have - set(self.manifest.files))]
        return errors


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The JSON object of a bundle's manifest, not yet validated.

    Raises:
        BundleError: no folder, no manifest or no JSON object.
    """
    path = Path(folder) / MANIFEST_FILE
    if not Path(folder).is_dir():
        raise BundleError(f"{str(folder)!r} is not a folder; give the folder of a bundle.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{str(folder)!r} is not a bundle: it has no {MANIFEST_FILE}.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"manifest {str(path)!r} cannot be read: {error}.") from None
    if not isinstance(value, dict):
        raise BundleError(f"manifest {str(path)!r} must hold a JSON object, not a {type(value).__name__}.")
    return value


def find_bundles(folder: str | Path) -> list[Path]:
    """The bundle at `folder`, or those directly below it.

    Raises:
        BundleError: there is none.
    """
    folder = Path(folder)
    if (folder / MANIFEST_FILE).is_file():
        return [folder]
    below = sorted(path.parent for path in folder.glob(f"*/{MANIFEST_FILE}")) if folder.is_dir() else []
    if not below:
        raise BundleError(f"{str(folder)!r} is not a bundle: neither it nor a folder in it has a {MANIFEST_FILE}.")
    return below


def finish_bundle(folder: Path, **fields: Any) -> Manifest:
    """Write the manifest of a folder whose other files are all there, and return it.

    Args:
        fields: of `Manifest`; `files` and `toolchain` are filled in here.
    """
    hashes = {path.relative_to(folder).as_posix(): sha256(path) for path in _files(folder)}
    manifest = Manifest(schema=1, files=hashes, toolchain=toolchain(), **fields)
    text = json.dumps(manifest.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
    return manifest


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def toolchain(names: Sequence[str] = TOOLS) -> dict[str, str]:
    """Versions of Python and of the packages that made the program."""
    versions = {"python": platform.python_version()}
    for name in names:
        versions[name] = importlib.metadata.version(name)
    return versions


def largest(errors: Iterable[float]) -> float:
    """The largest of some errors, 0 of none. A NaN is larger than anything (`max` would overlook it)."""
    values = list(errors)
    return float("nan") if any(math.isnan(value) for value in values) else max(values, default=0.0)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST_FILE)
