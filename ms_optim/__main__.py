"""``python -m ms_optim``: the command line, as ``ms-optim``."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
