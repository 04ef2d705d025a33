"""What the command lines of all backends share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comp_edge.cli.common import Parser, count, print_json, run

if TYPE_CHECKING:
    from export.encoders import EncoderSource
    from export.reference import Requests
    from export.source import Source

NEW_TOKENS = 8


def add_common(parser: argparse.ArgumentParser) -> None:
    """The model, the bundle, and what to compare on."""
    parser.add_argument(
        "model",
        metavar="FOLDER",
        help="pruned model folder, dense model folder, hub id, a shipped model's name, or random:SHAPE",
    )
    parser.add_argument("-o", "--out", required=True, type=Path, metavar="BUNDLE", help="folder to write")
    parser.add_argument("--verify", type=count, default=16, metavar="N", help="requests to compare on (default: 16)")
    parser.add_argument(
        "--golden",
        type=Path,
        metavar="FILE",
        help="safetensors with pixel_values [n,3,H,W] and metadata 'questions' (JSON list); default: made-up requests",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEMPLATE",
        help="prompt with the image token and {question} once each (default: the processor's chat template); not for models "
        "that read image and text apart",
    )
    parser.add_argument(
        "--prompt-tokens", type=count, metavar="N", help="longest prompt or text of a dense model, in text tokens"
    )
    parser.add_argument(
        "--image-size",
        type=image_size,
        metavar="HxW",
        help="pixels of the images, for a model that takes any size (default: square)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=count,
        metavar="N",
        help=f"longest answer, for models that generate (default: {NEW_TOKENS})",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def image_size(text: str) -> tuple[int, int]:
    """Height and width, as `HxW`.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not HxW, height and width in pixels like 448x448")
    return int(parts[0]), int(parts[1])


def run_exporter(
    parser: Parser,
    export: Callable[[argparse.Namespace], dict[str, Any]],
    wrong: Callable[[], type[Exception]],
    argv: Sequence[str] | None,
) -> int:
    """Parse, export, print; the exit code: 0 written and right, 1 what was written is not right, 2 bad input.

    Args:
        export: does the work; what `--json` prints.
        wrong: the exception for a program that is not right (asked for when libraries may be imported).
    """
    args = parser.parse_args(argv)

    def command() -> int:
        error_type = wrong()
        try:
            result = export(args)
        except error_type as error:
            print(f"{parser.prog}: {error} Nothing was written.", file=sys.stderr)
            return 1
        if args.json:
            print_json(result)
        return 0

    return run(command, name=parser.prog)


def takes_texts(args: argparse.Namespace) -> bool:
    """Whether the model reads image and text apart (CLIP, SigLIP, BLIP), so that there is no prompt with an image in it.

    Raises:
        InputError: the output cannot be written, or nothing is known of the model.
    """
    from comp_edge.families import family_of
    from comp_edge.files import check_writable
    from comp_edge.inspection import structure

    check_writable(args.out)
    model = structure(args.model)
    return family_of(model).fusion(model) is None


def load_requests(args: argparse.Namespace) -> tuple[Source, Requests]:
    """The model to export and the requests to compare on, as the arguments say.

    Raises:
        InputError: the model or the requests cannot be used.
    """
    from export.reference import read_requests, synthetic_requests
    from export.source import load_source

    source = load_source(
        args.model,
        template=args.prompt,
        new_tokens=args.max_new_tokens or NEW_TOKENS,
        prompt_tokens=args.prompt_tokens,
        size=args.image_size,
    )
    if args.golden is None:
        return source, synthetic_requests(source, count=args.verify)
    return source, read_requests(args.golden, source, count=args.verify)


def load_encoder_requests(args: argparse.Namespace) -> tuple[EncoderSource, Requests]:
    """The same for a model that reads image and text apart.

    Raises:
        InputError: the model or the requests cannot be used, or an argument says nothing to such a model.
    """
    from comp_edge.errors import InputError
    from export.encoders import load_encoders, read_encoder_requests, synthetic_encoder_requests

    if args.prompt is not None:
        raise InputError(f"--prompt {args.prompt!r} was given, but {args.model!r} reads its text apart from the image.")
    source = load_encoders(
        args.model,
        new_tokens=args.max_new_tokens or NEW_TOKENS,
        text_tokens=args.prompt_tokens,
        size=args.image_size,
    )
    if args.max_new_tokens is not None and not source.generates:
        raise InputError(f"--max-new-tokens {args.max_new_tokens} was given, but {args.model!r} generates nothing.")
    if args.golden is None:
        return source, synthetic_encoder_requests(source, count=args.verify)
    return source, read_encoder_requests(args.golden, source, count=args.verify)
