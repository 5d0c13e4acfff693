"""Command line of a training: ``python -m ms_optim.train --help``."""

from __future__ import annotations

import json
import shlex
import sys
import traceback
from collections.abc import Sequence

from ..cli.command import in_one_line
from .config import read_arguments
from .training import train


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and print the outcome as timm's ``train.py`` does.

    Args:
        argv: The command line; the process's own by default.

    Returns:
        The exit code: 0 done, 2 bad input or a training that diverged, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        outcome = train(read_arguments(arguments), shlex.join(["python", "-m", "ms_optim.train", *arguments]))
    except KeyboardInterrupt:
        print("ms_optim.train: interrupted; --resume FOLDER goes on from the last epoch", file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001 - the border
        if "--traceback" in arguments:
            traceback.print_exc()
        print(f"ms_optim.train: error: {in_one_line(error)}", file=sys.stderr)
        return 2
    if outcome:
        print(f"--result\n{json.dumps([outcome], indent=4)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
