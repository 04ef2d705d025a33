"""What the command lines of all backends share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from comp_edge.cli.common import count

if TYPE_CHECKING:
    from export.reference import Requests, Source


def add_common(parser: argparse.ArgumentParser) -> None:
    """The model, the bundle, and what to compare on."""
    parser.add_argument(
        "model", metavar="FOLDER", help="pruned model folder, dense model folder, or a shipped model's name"
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
        help="prompt with the image token and {question} once each (default: the processor's chat template)",
    )
    parser.add_argument(
        "--prompt-tokens", type=count, metavar="N", help="longest prompt of a dense model, in text tokens"
    )
    parser.add_argument("--max-new-tokens", type=count, default=8, metavar="N", help="longest answer (default: 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def load_requests(args: argparse.Namespace) -> tuple[Source, Requests]:
    """The model to export and the requests to compare on, as the arguments say.

    Raises:
        InputError: the output cannot be written, or the model or the requests cannot be used.
    """
    from comp_edge.files import check_writable
    from export.reference import load_source, read_requests, synthetic_requests

    check_writable(args.out)
    source = load_source(
        args.model, template=args.prompt, new_tokens=args.max_new_tokens, prompt_tokens=args.prompt_tokens
    )
    if args.golden is None:
        return source, synthetic_requests(source, count=args.verify)
    return source, read_requests(args.golden, source, count=args.verify)
