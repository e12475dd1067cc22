"""Stopping a run with a checkpoint: by signal or when time is up, on all devices at the same step."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Why a run should stop, if it should.

    Attributes:
        reason: "SIGINT", "SIGTERM", "budget", or None while nothing asks it to stop.
        training: whether a checkpoint can be written, so that a first signal waits for the end of the step.
    """

    def __init__(self, budget: float | None = None) -> None:
        self.ends = None if budget is None else time.monotonic() + budget
        self.reason: str | None = None
        self.training = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came before training began.

        An interrupt that is raised inside an import or a callback may be swallowed there; it is raised again here.
        """
        if self.reason in _names():
            raise KeyboardInterrupt(self.reason)

    def due(self) -> bool:
        """Whether to stop after this step; once true, it stays so."""
        if self.reason is None and self.ends is not None and time.monotonic() > self.ends:
            self.reason = "budget"
        return self.reason is not None

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Handle a signal: the first one stops the run in order, the second one at once.

        torchrun passes an interrupt on as SIGTERM as well: there only a second signal of the same kind counts.
        """
        name = signal.Signals(number).name
        spread = "TORCHELASTIC_RUN_ID" in os.environ
        if self.reason == name or (self.reason in _names() and not spread):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.reason = name
        if not self.training:
            raise KeyboardInterrupt(name)
        # Unbuffered: the signal may have come while a writer of stderr holds its lock.
        os.write(2, f"\n{name}: stopping after this step, with a checkpoint; once more stops at once\n".encode())


def _names() -> tuple[str, ...]:
    return tuple(number.name for number in SIGNALS)


@contextmanager
def handle_signals(stop: Stop) -> Iterator[None]:
    """Within the context SIGINT and SIGTERM go to `stop`; other threads than the main one get no signals anyway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop.receive) for number in SIGNALS}
    report = sys.unraisablehook

    def leave_out_interrupts(raised: sys.UnraisableHookArgs) -> None:
        # An interrupt within a `__del__` is swallowed with a traceback on stderr; `Stop.check` raises it again.
        if not issubclass(raised.exc_type, KeyboardInterrupt):
            report(raised)

    sys.unraisablehook = leave_out_interrupts
    try:
        yield
    finally:
        sys.unraisablehook = report
        for number, handler in before.items():
            signal.signal(number, handler)
