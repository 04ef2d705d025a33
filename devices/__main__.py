"""`python -m devices list | run | profile | fit | import`"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from comp_edge.cli import common
from devices import commands
from devices.errors import DeviceAbsent, DeviceError, DeviceGone, DeviceTimeout

NAME = "python -m devices"
FAILED = 1  # exit code


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, 1 where the device failed in the middle, 2 for bad input."""
    parser = common.Parser(
        prog=NAME,
        description="Reach devices, measure pruned models on them, and learn what a plan costs there.",
        epilog=commands.EXAMPLES,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=common.Parser)
    for command in (commands.ListCommand, commands.Run, commands.ProfileCommand, commands.FitCommand, commands.Import):
        command.add(subparsers)
    arguments = parser.parse_args(argv)

    def run() -> int:
        try:
            arguments.run(arguments)
        except DeviceError as error:
            print(f"{NAME} {arguments.command}: {error}", file=sys.stderr)
            failed = isinstance(error, DeviceGone | DeviceTimeout) and not isinstance(error, DeviceAbsent)
            return FAILED if failed else common.BAD_INPUT
        return 0

    return common.run(run, name=f"{NAME} {arguments.command}")


if __name__ == "__main__":
    sys.exit(main())
