"""The `comp-edge` command."""

from __future__ import annotations

from collections.abc import Sequence

import comp_edge
from comp_edge.cli import bench, common, demo, evaluate, inspect, prune, report, train

DESCRIPTION = """\
Prune a vision-language model's parameters and tokens together until it meets a budget, and show that it still answers.

  comp-edge demo                                     everything, in a few minutes
  comp-edge inspect llava-digits                     what can be pruned, and what it costs
  comp-edge prune --model llava-digits --task digit_vqa --keep 0.3 -o pruned
  comp-edge eval pruned --task digit_vqa
  python -m export.executorch pruned -o bundle       then: python -m runtime_tests bundle
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = common.Parser(prog="comp-edge", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"comp-edge {comp_edge.__version__}")
    return common.main((demo, inspect, train, prune, evaluate, bench, report), parser=parser, argv=argv)
