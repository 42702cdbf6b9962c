"""A contender: a process that builds a train step and runs it on request. Imports the standard library only."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO


def peak_rss() -> float:
    """Return the peak resident memory of this process in MB (10^6 bytes)."""
    try:
        with open("/proc/self/status") as lines:  # unlike ru_maxrss, not inherited from the parent
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def threads() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def protocol() -> Iterator[TextIO]:
    """Yield the real stdout, for messages to the parent; what libraries print goes to stderr meanwhile."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        yield out


def serve(build: Callable[[dict[str, Any]], tuple[Callable[[], float], dict[str, Any], Callable[[], Any]]]) -> None:
    """Build a step from the spec in argv[1]; run it once for each line of stdin.

    build(spec) -> (step() -> loss in nats, facts to report, peak device memory in MB or None). A step returns
    when it is finished. Each line written is JSON: the facts; after a step {"s": seconds, "cpu": seconds of all
    threads, "loss": nats}; at the end {"rss": MB, "device": MB}.
    """
    with protocol() as out:

        def say(**fact: Any) -> None:
            print(json.dumps(fact), file=out, flush=True)

        step, facts, device = build(json.loads(sys.argv[1]))
        say(**facts)
        for _ in sys.stdin:
            start, cpu = time.perf_counter(), time.process_time()
            loss = step()
            say(s=time.perf_counter() - start, cpu=time.process_time() - cpu, loss=loss)
        say(rss=peak_rss(), device=device())
