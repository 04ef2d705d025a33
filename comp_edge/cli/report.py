"""`comp-edge report`: the page that shows what a pruning did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comp_edge.cli import common

EXAMPLES = """\
examples:
  comp-edge report pruned --task digit_vqa
  comp-edge report pruned --task digit_vqa --verification demo.json -o report.html
"""


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "report",
        help="write the report of a pruned model",
        description="Write one self-contained HTML page about a pruned model folder.",
        epilog=EXAMPLES,
    )
    parser.add_argument("folder", type=Path, help="a folder that `comp-edge prune` wrote")
    parser.add_argument(
        "--task", help="draw kept tokens over its images: digit_vqa, easy_vqa or path/to/file.py:ClassName"
    )
    parser.add_argument("--verification", type=Path, help="a file with what `comp-edge demo --json` printed")
    parser.add_argument("-o", "--out", type=Path, help="the file to write (default: report.html in the folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.set_defaults(run=run)


def run(arguments: Any) -> None:
    """Write the page, say where it is."""
    from comp_edge.report import write_report
    from comp_edge.report.facts import read_verification
    from comp_edge.tasks import task_class

    if arguments.task is not None:
        task_class(arguments.task)
    verification = None if arguments.verification is None else read_verification(arguments.verification)
    path = write_report(arguments.folder, task=arguments.task, verification=verification, out=arguments.out)
    if arguments.json:
        common.print_json({"report": str(path), "bytes": path.stat().st_size})
    else:
        print(f"{path}: open it in any browser")
