"""`python -m moemesh` is the `moemesh` command."""

import sys

from moemesh.cli import main

if __name__ == "__main__":
    sys.exit(main())
