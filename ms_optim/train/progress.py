"""Progress: a bar on a terminal, plain lines in a file; and the run's own log beside its results."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

logger = logging.getLogger("ms_optim.train")


@contextmanager
def log_to(folder: Path | None, primary: bool) -> Iterator[None]:
    """Write what is logged to the terminal and to ``train.log``.

    Args:
        folder: The run's; ``None``: nowhere but the terminal.
        primary: Whether this process writes anything at all.

    Yields:
        Nothing; inside, lines are written.
    """
    handlers: list[logging.Handler] = []
    if primary:
        handlers.append(_Terminal())
        if folder is not None:
            handlers.append(logging.FileHandler(folder / "train.log", encoding="utf-8"))
            handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    else:
        handlers.append(logging.NullHandler())
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(level)
        logger.propagate = propagate


class _Terminal(logging.Handler):
    """Lines on standard output that leave a bar whole."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        line = self.format(record)
        if sys.stdout.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                pass
            else:
                tqdm.write(line, file=sys.stdout)
                return
        print(line, flush=True)


class Bar:
    """The bar of an epoch: on a terminal with tqdm installed, else nothing.

    Args:
        total: Steps.
        title: What stands before it.
        shown: Whether this process shows one.
    """

    def __init__(self, total: int, title: str, shown: bool) -> None:
        self._bar: Any = None
        if shown and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, desc=title, unit="step", leave=False)

    @property
    def shown(self) -> bool:
        """Whether there is one, so that lines within an epoch are not needed."""
        return self._bar is not None

    def advance(self, text: str = "") -> None:
        """One step further.

        Args:
            text: What stands behind it; empty: as before.
        """
        if self._bar is not None:
            if text:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()

    def __enter__(self) -> Bar:
        """The bar."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take it away."""
        if self._bar is not None:
            self._bar.close()
