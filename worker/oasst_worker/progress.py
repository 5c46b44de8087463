"""How much of a checkpoint has been read: a bar on a terminal, otherwise a log line now and then."""

import logging
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

__all__ = ["LoadingProgress"]

_logger = logging.getLogger(__name__)

_LINE_EVERY_S = 10.0


class LoadingProgress:
    """Called with the bytes read so far and those to read; tells a person about them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told_s = clock()
        self._bar = tqdm(unit="B", unit_scale=True, desc="loading", dynamic_ncols=True, disable=not sys.stderr.isatty())

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        now_s = self._clock()
        if self._bar.disable and now_s - self._told_s >= _LINE_EVERY_S:
            self._told_s = now_s
            _logger.info("loading gb=%.1f of_gb=%.1f", done / 1e9, total / 1e9)

    def close(self) -> None:
        """The bar is not drawn any more."""
        self._bar.close()
