"""`python -m export.executorch FOLDER -o BUNDLE`"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comp_edge.cli.common import Parser, count, print_json, progress_bar, quiet_libraries, run

NAME = "python -m export.executorch"
EXAMPLE = """example:
  python -m export.executorch runs/pruned -o bundle
  python -m export.executorch runs/pruned -o bundle --profile scheduled --golden questions.safetensors --verify 200 --json
"""


def parser() -> Parser:
    """The command line."""
    parse = Parser(
        prog=NAME,
        description="Lower a model to ExecuTorch (XNNPACK, fp32), load the program back and compare it with the model.",
        epilog=EXAMPLE,
    )
    parse.add_argument(
        "model", metavar="FOLDER", help="pruned model folder, dense model folder, or a shipped model's name"
    )
    parse.add_argument("-o", "--out", required=True, type=Path, metavar="BUNDLE", help="folder to write")
    parse.add_argument(
        "--profile",
        choices=("stock", "scheduled", "both"),
        default="both",
        help="stock: for ExecuTorch's MultimodalRunner; scheduled: tokens dropped in the language model too (default: both)",
    )
    parse.add_argument("--verify", type=count, default=16, metavar="N", help="requests to compare on (default: 16)")
    parse.add_argument(
        "--golden",
        type=Path,
        metavar="FILE",
        help="safetensors with pixel_values [n,3,H,W] and metadata 'questions' (JSON list); default: made-up requests",
    )
    parse.add_argument("--prompt", metavar="TEMPLATE", help="prompt with the image token and {question} once each")
    parse.add_argument(
        "--prompt-tokens", type=count, metavar="N", help="longest prompt of a dense model, in text tokens"
    )
    parse.add_argument("--max-new-tokens", type=count, default=8, metavar="N", help="longest answer (default: 8)")
    parse.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code: 0 written and right, 1 the program is not right, 2 bad input."""
    args = parser().parse_args(argv)
    quiet_libraries()
    return run(lambda: _command(args), name=NAME)


def _command(args: argparse.Namespace) -> int:
    from export.executorch.build import VerificationError

    try:
        result = _export(args)
    except VerificationError as error:
        print(f"{NAME}: {error} Nothing was written.", file=sys.stderr)
        return 1
    if args.json:
        print_json(result)
    return 0


def _export(args: argparse.Namespace) -> dict[str, Any]:
    from rich.console import Console

    from comp_edge.files import check_writable
    from export.executorch.build import build_bundle
    from export.executorch.profiles import PROFILES
    from export.reference import load_source, read_requests, synthetic_requests

    check_writable(args.out)
    console = Console(stderr=True)
    source = load_source(
        args.model, template=args.prompt, new_tokens=args.max_new_tokens, prompt_tokens=args.prompt_tokens
    )
    if args.golden is None:
        requests = synthetic_requests(source, count=args.verify)
    else:
        requests = read_requests(args.golden, source, count=args.verify)
    profiles = PROFILES if args.profile == "both" else (args.profile,)
    with progress_bar("exporting") as report:
        manifests = build_bundle(profiles, source, requests, args.out, report=report)
    result = {}
    for profile in profiles:
        manifest, folder = manifests[profile], args.out / profile
        for warning in manifest.warnings:
            console.print(f"[yellow]warning[/]: {profile}: {warning}", highlight=False, soft_wrap=True)
        if manifest.lifted_language_drops:
            console.print(
                f"[yellow]note[/]: stock lifts the plan's token drops inside the language model "
                f"({list(manifest.lifted_language_drops)}): its runner prefills the image before it knows the question.",
                highlight=False,
                soft_wrap=True,
            )
        verified = manifest.verification
        console.print(
            f"{profile}: {folder} ({(folder / 'model.pte').stat().st_size / 1e6:.2f} MB), largest error "
            f"{verified.max_abs_error:.1e}, tokens equal on {verified.matched} of {verified.questions} requests",
            highlight=False,
            soft_wrap=True,
        )
        result[profile] = {
            "path": str(folder),
            "bytes": (folder / "model.pte").stat().st_size,
            **verified.model_dump(mode="json"),
            "lifted_language_drops": manifest.lifted_language_drops,
            "delegates": {name: report.delegates for name, report in manifest.delegation.items()},
            "warnings": list(manifest.warnings),
        }
    return result


if __name__ == "__main__":
    sys.exit(main())
