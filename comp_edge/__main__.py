"""`python -m comp_edge`: the `comp-edge` command for what starts modules, such as `accelerate launch -m`."""

import sys

from comp_edge.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
