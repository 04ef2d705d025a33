"""`python -m export.executorch FOLDER -o BUNDLE`"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from comp_edge.cli.common import Parser, progress_bar
from export.arguments import add_common, load_encoder_requests, load_requests, run_exporter, takes_texts

NAME = "python -m export.executorch"
EXAMPLE = """example:
  python -m export.executorch runs/pruned -o bundle
  python -m export.executorch runs/pruned -o bundle --profile scheduled --golden questions.safetensors --verify 200 --json
  python -m export.executorch random:clip-vit-b-16 -o bundle      encoders alone: BUNDLE/encoders, without profiles
"""
PROFILE_DEFAULT = "both"


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
        default=PROFILE_DEFAULT,
        help="of models with an image in their prompt. stock: for ExecuTorch's MultimodalRunner; scheduled: tokens dropped in "
        "the language model too (default: both)",
    )
    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code: 0 written and right, 1 the program is not right, 2 bad input."""
    return run_exporter(parser(), _export, _wrong, argv)


def _wrong() -> type[Exception]:
    from export.executorch.build import VerificationError

    return VerificationError


def _export(args: argparse.Namespace) -> dict[str, Any]:
    with progress_bar("exporting") as report:
        manifests = _encoders(args, report) if takes_texts(args) else _profiles(args, report)
    return {profile: _summary(profile, manifest, args) for profile, manifest in manifests.items()}


def _encoders(args: argparse.Namespace, report: Any) -> Mapping[str, Any]:
    from comp_edge.errors import InputError
    from export.executorch.encoders import build_encoders

    if args.profile != PROFILE_DEFAULT:
        raise InputError(
            f"--profile {args.profile} was given, but {args.model!r} reads its text apart from the image and has no profiles."
        )
    return build_encoders(*load_encoder_requests(args), args.out, report=report)


def _profiles(args: argparse.Namespace, report: Any) -> Mapping[str, Any]:
    from export.executorch.build import build_bundle
    from export.executorch.profiles import PROFILES

    profiles = PROFILES if args.profile == PROFILE_DEFAULT else (args.profile,)
    manifests = build_bundle(profiles, *load_requests(args), args.out, report=report)
    return {profile: manifests[profile] for profile in profiles if profile in manifests}


def _summary(profile: str, manifest: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Say on stderr what was written; what `--json` prints of it."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    folder, verified = args.out / profile, manifest.verification
    size = (folder / manifest.methods[0].file).stat().st_size
    for warning in manifest.warnings:
        console.print(f"[yellow]warning[/]: {profile}: {warning}")
    if manifest.lifted_language_drops:
        console.print(
            f"[yellow]note[/]: stock lifts the plan's token drops inside the language model "
            f"({list(manifest.lifted_language_drops)}): its runner prefills the image before it knows the question."
        )
    equal = "within the tolerance" if verified.tokens_equal is None else "tokens equal"
    console.print(
        f"{profile}: {folder} ({size / 1e6:.2f} MB), largest error {verified.max_abs_error:.1e}, {equal} on "
        f"{verified.matched} of {verified.questions} requests"
    )
    return {
        "path": str(folder),
        "bytes": size,
        **verified.model_dump(mode="json"),
        "lifted_language_drops": manifest.lifted_language_drops,
        "delegates": {name: report.delegates for name, report in manifest.delegation.items()},
        "warnings": list(manifest.warnings),
    }


if __name__ == "__main__":
    sys.exit(main())
