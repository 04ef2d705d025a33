"""`python -m export.executorch FOLDER -o BUNDLE`"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from comp_edge.cli.common import Parser, print_json, progress_bar, quiet_libraries, run
from export.arguments import add_common, load_requests

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
    add_common(parse)
    parse.add_argument(
        "--profile",
        choices=("stock", "scheduled", "both"),
        default="both",
        help="stock: for ExecuTorch's MultimodalRunner; scheduled: tokens dropped in the language model too (default: both)",
    )
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

    from export.executorch.build import build_bundle
    from export.executorch.profiles import PROFILES

    console = Console(stderr=True)
    source, requests = load_requests(args)
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
