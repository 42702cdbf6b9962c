"""SIGTERM and SIGINT: finish and save the step, the same one in all processes; a second signal ends at once."""

import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from ..progress import console
from . import distributed
from .distributed import STOPPED

GRACE = 5.0  # seconds that reading or compiling, which may be in C++, has to notice a signal
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_AGAIN = signal.SIGURG  # ignored by default: runs the handler once more


class Stopped(SystemExit):
    """Raised when a signal stops a run."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


class Stop:
    """Handle signals in a `with` block; before each step of the loop, `stop.may_step(step)` says whether to run it.

    A thread notices the signals, whatever the main thread does. In a run of several processes, each then tells the
    others through the coordinator which step it began last, and begins no other until all have done so; all stop after
    the latest of these steps. So no step waits for other processes unless there was a signal.
    """

    def __init__(self) -> None:
        self.asked, self.last, self.limit = False, 0, None  # the last step that began; the last one to run
        self._change, self._over = threading.Condition(), threading.Event()
        self._free, self._begun = True, False  # whether the main thread may be interrupted; whether steps have begun

    limit: int | None

    def __enter__(self) -> "Stop":
        self._handles = threading.current_thread() is threading.main_thread()
        if self._handles:  # Python handles signals there only
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._before = [signal.signal(s, self._in_main) for s in (*_SIGNALS, _AGAIN)]
            self._hook, sys.unraisablehook = sys.unraisablehook, self._lost
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._handles:
            for s, before in zip((*_SIGNALS, _AGAIN), self._before, strict=True):
                signal.signal(s, before)
            sys.unraisablehook = self._hook
            signal.set_wakeup_fd(self._wakeup)
            self._over.set()
            os.close(self._write)  # the thread reads the end

    def begin_steps(self, step: int) -> None:
        """Say that the loop begins after this step; from here on a signal interrupts nothing."""
        with self._change:
            self.last, self._free, self._begun = step, False, True

    def end_steps(self) -> None:
        """Say that the loop is over: a signal may interrupt what follows, until another loop begins."""
        with self._change:
            self._free, self._begun = True, False

    def may_step(self, step: int) -> bool:
        """Return whether to run a step."""
        with self._change:
            while self.asked and self.limit is None:
                self._change.wait()
            if self.limit is not None and step > self.limit:
                return False
            self.last = step
            return True

    def check(self) -> None:
        """Raise Stopped if a signal came: for long loops without steps, where the exception may have been lost."""
        if self.asked:
            raise Stopped

    def interruptible(self, call: Callable[[], Any]) -> Any:
        """Return call(), or None if a signal interrupts it. Several processes call together, so none is interrupted."""
        if distributed.count() > 1:
            return call()
        before, self._free = self._free, True
        try:
            return None if self.asked else call()
        except Stopped:
            return None
        finally:
            self._free = before

    def _in_main(self, *_: Any) -> None:
        if distributed.count() > 1:
            return
        with self._change:
            self.asked, self.limit = True, self.last
        if self._free:
            self._free = False
            raise Stopped

    def _lost(self, error: Any) -> None:
        """Raise Stopped again, a moment later, if it came up where it cannot be raised, as in jax's callback of the
        garbage collector."""
        if not issubclass(error.exc_type, Stopped):
            return self._hook(error)
        self._free = True
        threading.Timer(0.05, signal.pthread_kill, (threading.get_ident(), _AGAIN)).start()

    def _watch(self) -> None:
        several, signals = distributed.count() > 1, 0
        while not self._over.is_set():
            ready = select.select([self._read], [], [], 0.5 if several else None)[0]
            numbers = [n for n in os.read(self._read, 64) if n in _SIGNALS] if ready else []
            for n in numbers:
                signals += 1
                if signals > 1:
                    self._leave(f"{signal.Signals(n).name} again: stopped at once")
                action = "this step is finished and saved" if self._begun and not self._free else "stopping"
                console.print(f"{signal.Signals(n).name}: {action}, exit code {STOPPED}; again: at once")
                if several:
                    distributed.set_flag("stop")
                self._settle(several)
            if several and not self.asked and distributed.flag_is_set("stop"):
                self._settle(several)
        os.close(self._read)

    def _settle(self, several: bool) -> None:
        """Decide, with the other processes, after which step all stop."""
        if not several and not self._begun:
            threading.Thread(target=self._leave_after_grace, daemon=True).start()
        with self._change:
            self.asked, last = True, self.last
        steps = distributed.barrier_gather("the step to stop after", str(last)) if several else [str(last)]
        with self._change:
            self.limit = max(map(int, steps))
            self._change.notify_all()

    def _leave_after_grace(self) -> None:
        if not self._over.wait(GRACE) and not self._begun:
            self._leave("stopped before a step was done")

    def _leave(self, reason: str) -> None:
        sys.stderr.write(f"graftax: {reason}; continue with --resume\n")
        sys.stderr.flush()
        os._exit(STOPPED)
