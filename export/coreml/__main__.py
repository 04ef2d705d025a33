"""`python -m export.coreml FOLDER -o BUNDLE`"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comp_edge.cli.common import Parser, progress_bar
from export.arguments import add_common, load_encoder_requests, load_requests, run_exporter, takes_texts
from export.bundle import largest

NAME = "python -m export.coreml"
EXAMPLE = """example:
  python -m export.coreml runs/pruned -o bundle
  python -m export.coreml runs/pruned -o bundle --precision fp16 --golden questions.safetensors --verify 200 --json
  python -m export.coreml random:clip-vit-b-16 -o bundle          an image and a text package

BUNDLE/fp16 and BUNDLE/fp32 each hold a vision and a language package and what an application needs beside them.
"""


def parser() -> Parser:
    """The command line."""
    parse = Parser(
        prog=NAME,
        description="Convert a model to Core ML packages, run what was saved, and compare it with the model.",
        epilog=EXAMPLE,
    )
    add_common(parse)
    parse.add_argument("--precision", choices=("fp16", "fp32", "both"), default="both", help="(default: both)")
    parse.add_argument(
        "--select",
        choices=("topk", "rank"),
        default="topk",
        help="how tokens are chosen: topk and gather, or pairwise ranks and a one-hot matmul, which the Neural Engine runs "
        "(default: topk)",
    )
    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code: 0 written and right, 1 the packages are not right, 2 bad input."""
    return run_exporter(parser(), _export, _wrong, argv)


def _wrong() -> type[Exception]:
    from export.coreml.convert import ExportError

    return ExportError


def _export(args: argparse.Namespace) -> dict[str, Any]:
    from rich.console import Console

    from export.coreml.build import build_bundle
    from export.coreml.encoders import build_encoders
    from export.coreml.functions import PRECISIONS

    begin = time.monotonic()
    if takes_texts(args):
        build: Any = build_encoders
        source: Any
        source, requests = load_encoder_requests(args)
    else:
        build = build_bundle
        source, requests = load_requests(args)
    precisions = PRECISIONS if args.precision == "both" else (args.precision,)
    with progress_bar("exporting") as report:
        manifests = build(precisions, source, requests, args.out, selection=args.select, report=report)
    result = summary(manifests, args.out)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for precision, manifest in manifests.items():
        for warning in manifest.warnings:
            console.print(f"[yellow]warning[/]: {warning}")
        console.print(_line(precision, result))
    return {**result, "select": args.select, "seconds": round(time.monotonic() - begin, 1)}


def summary(manifests: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """What `--json` prints of an exported bundle; null for a precision that was not asked for.

    Args:
        manifests: by precision, see `build_bundle`.
    """
    verified = {precision: manifest.verification for precision, manifest in manifests.items()}
    # The agreement of the precision that devices run, where it was exported.
    main = verified.get("fp16") or verified["fp32"]
    declared = main.details["declared"]
    equal = [one.tokens_equal for one in verified.values()]
    return {
        "path": str(out),
        **{f"{precision}_max_abs_error": _largest(verified.get(precision)) for precision in ("fp32", "fp16")},
        "fp16_declared_max_abs_error": _declared(verified.get("fp16")),
        "fp32_declared_max_abs_error": _declared(verified.get("fp32")),
        "kept_set_agreement": main.details["kept_sets"]["agreement"],
        "kept_sets": main.details["kept_sets"],
        # Null where nothing is generated.
        "tokens_equal": None if None in equal else all(equal),
        "declared_tokens_matched": declared["tokens_matched"],
        "questions": main.questions,
        "bundles": {
            precision: {
                "path": str(out / precision),
                "bytes": {
                    name: sum(file.stat().st_size for file in (out / precision / name).rglob("*") if file.is_file())
                    for name in sorted({method.file for method in manifest.methods})
                },
                **manifest.verification.model_dump(mode="json"),
            }
            for precision, manifest in manifests.items()
        },
        "warnings": [warning for manifest in manifests.values() for warning in manifest.warnings],
    }


def _largest(verification: Any) -> float | None:
    """Largest error of all outputs: logits and image features, or what encoders give."""
    if verification is None:
        return None
    return largest([verification.max_abs_error, verification.details.get("image_features_max_abs_error", 0.0)])


def _declared(verification: Any) -> float | None:
    if verification is None:
        return None
    declared = verification.details["declared"]
    errors = [declared["max_abs_error"], declared.get("image_features_max_abs_error", 0.0)]
    return None if None in errors else max(errors)


def _line(precision: str, result: Mapping[str, Any]) -> str:
    bundle = result["bundles"][precision]
    declared, kept = bundle["details"]["declared"], bundle["details"]["kept_sets"]
    rounded = result[f"{precision}_declared_max_abs_error"]
    size, questions = sum(bundle["bytes"].values()) / 1e6, bundle["questions"]
    writes = bundle["tokens_equal"] is not None
    matched = f"{declared['tokens_matched']} of {questions}"
    return (
        f"{precision}: {bundle['path']} ({size:.2f} MB), largest error {result[f'{precision}_max_abs_error']:.1e} (at most "
        f"{bundle['tolerance']:.0e}), {'tokens equal' if writes else 'within it'} on {bundle['matched']} of {questions} "
        f"requests; rounded as declared: {'not comparable' if rounded is None else f'error {rounded:.1e}'}, "
        f"{f'tokens {matched}, ' if writes else ''}kept sets {kept['agreeing']} of {kept['compared']}"
    )


if __name__ == "__main__":
    sys.exit(main())
