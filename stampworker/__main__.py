"""``python -m stampworker``: the console command."""

import sys

from stampworker.cli import main

if __name__ == "__main__":
    sys.exit(main())
