"""SIGTERM and SIGINT: the step is finished and saved, the same one in all processes; a second signal ends at once."""

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

GRACE = 5.0  # seconds that reading or compiling has to notice a signal; they may be deep in C++
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_AGAIN = signal.SIGURG  # ignored by default: runs the handler once more


class Stopped(SystemExit):
    """Raised when a run stops because a signal asked for it."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


class Stop:
    """`with Stop() as stop:` takes the signals; before each step of the loop `stop.may_step(step)` says if it is to run.

    A thread notices the signals, whatever the main thread is in. In a run of several processes each says through the
    coordinator which step it began last and begins none until all have said it; all stop after the latest of them. So
    no step waits for the others, unless there was a signal.
    """

    def __init__(self) -> None:
        self.asked, self.last, self.limit = False, 0, None  # the last step begun; the last one to run
        self._change, self._over = threading.Condition(), threading.Event()
        self._free, self._begun = True, False  # whether the main thread may be left where it is

    limit: int | None

    def __enter__(self) -> "Stop":
        self._taken = threading.current_thread() is threading.main_thread()
        if self._taken:  # elsewhere Python takes no signals
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._before = [signal.signal(s, self._in_main) for s in (*_SIGNALS, _AGAIN)]
            self._hook, sys.unraisablehook = sys.unraisablehook, self._lost
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._taken:
            for s, before in zip((*_SIGNALS, _AGAIN), self._before, strict=True):
                signal.signal(s, before)
            sys.unraisablehook = self._hook
            signal.set_wakeup_fd(self._wakeup)
            self._over.set()
            os.close(self._write)  # the thread reads the end

    def begin_steps(self, step: int) -> None:
        """The loop begins behind this step; from here on it is not left in the middle of something."""
        with self._change:
            self.last, self._free, self._begun = step, False, True

    def end_steps(self) -> None:
        """The loop is over, and what comes now may be left at any place until the next one begins."""
        with self._change:
            self._free, self._begun = True, False

    def may_step(self, step: int) -> bool:
        """Whether a step is to run."""
        with self._change:
            while self.asked and self.limit is None:
                self._change.wait()
            if self.limit is not None and step > self.limit:
                return False
            self.last = step
            return True

    def check(self) -> None:
        """Raises Stopped if a signal came: for a long loop outside of the steps, where it may have been lost."""
        if self.asked:
            raise Stopped

    def interruptible(self, call: Callable[[], Any]) -> Any:
        """What `call` returns; None if a signal ends it. (Several processes do it together: none leaves it.)"""
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
        """Called for an exception that cannot be raised where it came up, as in jax's callback of the garbage
        collector: Stopped is raised again behind that place."""
        if not issubclass(error.exc_type, Stopped):
            return self._hook(error)
        self._free = True
        threading.Timer(0.05, signal.pthread_kill, (threading.get_ident(), _AGAIN)).start()

    def _watch(self) -> None:
        several, heard = distributed.count() > 1, 0
        while not self._over.is_set():
            ready = select.select([self._read], [], [], 0.5 if several else None)[0]
            got = [n for n in os.read(self._read, 64) if n in _SIGNALS] if ready else []
            for n in got:
                heard += 1
                if heard > 1:
                    self._leave(f"{signal.Signals(n).name} again: stopped at once")
                then = "this step is finished and saved" if self._begun and not self._free else "stopping"
                console.print(f"{signal.Signals(n).name}: {then}, exit code {STOPPED}; again: at once")
                if several:
                    distributed.set_flag("stop")
                self._settle(several)
            if several and not self.asked and distributed.flag_is_set("stop"):
                self._settle(several)
        os.close(self._read)

    def _settle(self, several: bool) -> None:
        """Say where all stop."""
        if not several and not self._begun:
            threading.Thread(target=self._lose_patience, daemon=True).start()
        with self._change:
            self.asked, here = True, self.last
        said = distributed.barrier_gather("the step to stop after", str(here)) if several else [str(here)]
        with self._change:
            self.limit = max(map(int, said))
            self._change.notify_all()

    def _lose_patience(self) -> None:
        if not self._over.wait(GRACE) and not self._begun:
            self._leave("stopped before a step was done")

    def _leave(self, why: str) -> None:
        sys.stderr.write(f"graftax: {why}; go on with --resume\n")
        sys.stderr.flush()
        os._exit(STOPPED)
