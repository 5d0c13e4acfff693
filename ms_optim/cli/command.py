"""The command: what is typed is read here, and what happens becomes an exit code.

0     done
1     done, and something was found: a problem (doctor), a function that changed (balance, symmetries --check)
2     bad input, said in one line on stderr
130   interrupted, as of any program that Ctrl-C ends; 141: whoever read the output has left
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

import torch

from .. import __version__
from ..errors import CommandLineError, MsOptimError, NoEffectWarning
from . import balance, doctor, measure, symmetries

_DESCRIPTION = """\
Sharpness that does not depend on how a network happens to be scaled: measure a checkpoint, read its scale symmetries,
move it to its balanced representative, examine a training loop."""

_EPILOG = """\
exit codes: 0 done; 1 something was found (doctor) or a verification failed; 2 bad input; 130 interrupted
each command has examples: ms-optim measure --help"""


class Parser(argparse.ArgumentParser):
    """A parser that raises: what is wrong with a command line is said in one line, as everything else."""

    def error(self, message: str) -> NoReturn:
        """Refuse.

        Args:
            message: What is wrong.

        Raises:
            CommandLineError: Always.
        """
        raise CommandLineError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The whole command line.

    Returns:
        A parser whose result has ``run``, the command that was asked for.
    """
    whole = Parser(
        prog="ms-optim",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"ms_optim {__version__}, torch {torch.__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (measure, symmetries, balance, doctor):
        added = command.add_to(commands)
        common = added.add_argument_group("the run")
        common.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default: 0)")
        common.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
        common.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The command line; the process's own by default.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            options = parser().parse_args(arguments)
            with _surroundings(options):
                code: int = options.run(options)
                return code
        finally:
            sys.stdout.flush()  # here, so that a reader who has left is noticed here, after --help as well
    except KeyboardInterrupt:
        print("ms-optim: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python would say so once more as it ends and flushes what nobody reads.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:  # noqa: BLE001 - the border
        if "--traceback" in arguments:
            traceback.print_exc()
        print(f"ms-optim: error: {in_one_line(error)}", file=sys.stderr)
        return 2


def in_one_line(error: BaseException) -> str:
    """What an error says; the package's own are sentences, others are introduced by their type.

    Args:
        error: The error.

    Returns:
        One line.
    """
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = " ".join(str(error).split())
    if isinstance(error, MsOptimError):
        return text
    return f"{type(error).__name__}: {text or 'no message'} (--traceback shows where)"


@contextmanager
def _surroundings(options: argparse.Namespace) -> Iterator[None]:
    """Where a command runs: the working directory can be imported from, and warnings take a line each."""
    if options.threads is not None and options.threads < 1:
        raise CommandLineError(f"--threads must be at least 1, got {options.threads}")
    path, threads = list(sys.path), torch.get_num_threads()
    try:
        sys.path.insert(0, os.getcwd())
        torch.set_num_threads(options.threads or threads)
        torch.manual_seed(options.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("always", NoEffectWarning)
            warnings.showwarning = _show_warning
            yield
    finally:
        sys.path[:] = path
        torch.set_num_threads(threads)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> Any:
    """A warning as one line: at a command line, the place in the source helps nobody."""
    print(f"ms-optim: warning: {' '.join(str(message).split())}", file=sys.stderr)
