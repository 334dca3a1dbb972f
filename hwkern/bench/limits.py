"""Time limits: one for a single step, and the budget of a whole run."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

#: A limit that strikes inside code that swallows everything strikes again after so many seconds.
AGAIN = 0.5


class _Stop(BaseException):
    """What the signal raises: no `except Exception` on the way (torch.compile has many) may take it for an error."""


@contextlib.contextmanager
def at_most(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError in the main thread after so many seconds.

    No limit for None and for infinity, in other threads, and where there are no signals for it. May be nested: the
    nearer limit holds.
    """
    main = threading.current_thread() is threading.main_thread()
    if seconds is None or math.isinf(seconds) or not hasattr(signal, "setitimer") or not main:
        yield
        return
    if seconds <= 0:
        raise TimeoutError("no time left")
    started = time.monotonic()
    outer, again = signal.getitimer(signal.ITIMER_REAL)
    if outer and outer < seconds:
        yield
        return
    mine = _Stop(f"not ready after {seconds:.3g} s")

    def stop(*_: Any) -> None:
        raise mine

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    except _Stop as stopped:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if stopped is mine:
            raise TimeoutError(str(stopped)) from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, outer - (time.monotonic() - started)), again)


class Budget:
    """Seconds that may be spent, from now on; infinitely many for None or 0."""

    def __init__(self, seconds: float | None, started: float | None = None) -> None:
        started = time.monotonic() if started is None else started
        self._until = started + seconds if seconds else math.inf

    @property
    def left(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self._until - time.monotonic())

    @property
    def spent(self) -> bool:
        """Whether nothing is left."""
        return self.left <= 0

    def share(self, part: float) -> Budget:
        """A budget of this part (0 … 1) of what is left now."""
        return self if math.isinf(self._until) else Budget(max(1e-6, self.left * part))
