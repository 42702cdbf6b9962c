"""Start the processes of a run, watch them, and end all of them when one fails.

`run_processes` starts what jax needs before it touches a device. From then on a thread of each process asks the
coordination service which processes are alive, and ends its own process, with one line that names the missing one,
when they no longer all are.
"""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from ... import InputError
from .distributed import STOPPED, barrier_gather, count, index, name, report_failure, state, values_below
from .processes import (
    detect_cluster,
    heartbeat_timeout,
    meet_processes,
    mute,
    parse_processes,
    start_coordinator,
    startup_timeout,
)


class _Exit:
    """How this process ends."""

    coordinator: Any = None  # the child of process 0
    finished = False  # the run is over: a process that is gone is no error any more
    failing = threading.Lock()  # held by the thread that ends this process


def run_processes(processes: str | None, work: Callable[[], Any]) -> Any:
    """Return work() in each process of the run. A failure in one ends all of them, each with one line.

    processes: `ADDRESS:PORT,N,I` (process 0 listens at the address; this is process I of N); `1` for a single process;
    None for GRAFTAX_PROCESSES, or what a TPU slice, SLURM, Kubernetes or Open MPI says, or a single process.
    """
    found = parse_processes(processes or os.environ.get("GRAFTAX_PROCESSES", "")) or detect_cluster()
    if not found or found[1] == 1:
        return work()
    try:
        _start(*found)
        result = work()
        _end()
        return result
    except InputError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except SystemExit as stop:
        if stop.code and stop.code != STOPPED:  # all processes stop with STOPPED together
            _fail(f"stopped with code {stop.code}", int(stop.code))
        _end()
        raise
    except BaseException as error:
        if type(error).__name__ == "JaxRuntimeError":
            time.sleep(heartbeat_timeout() + 5)  # a broken collective: the watching thread knows the cause, and ends us
        details = "".join(traceback.format_exception(error))
        _fail(f"{type(error).__name__}: {error}".splitlines()[0], 1, details)


def _start(address: str, n: int, i: int, devices: Any) -> None:
    """Meet the other processes, then start jax's client, before any device is touched."""
    import jax

    mute(i)
    host, port = address.rsplit(":", 1)
    state.index = i
    if i == 0:
        _Exit.coordinator = start_coordinator(port, n)
    state.peers = meet_processes(host.strip("[]"), int(port), n, i)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM and do nothing about it
    # jax starts a service in process 0 in any case; this one is at a port that nobody knows.
    unused = "localhost:0" if i == 0 else None
    jax.distributed.initialize(address, n, i, devices, "deactivate", startup_timeout(), heartbeat_timeout(), 10, unused)
    from jax._src import distributed

    state.client = distributed.global_state.client
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    """End this process with one line when another one is gone or reports why it stops."""
    everyone = list(range(count()))
    while not _Exit.finished:
        try:
            alive = state.client.get_live_nodes(everyone)  # the C++ threads of living processes answer
            reason = _reason([i for i in everyone if i not in alive], values_below("graftax/failed"))
        except Exception as error:
            reason = f"the coordinator beside process 0 ({state.peers[0]}) is gone: {str(error).splitlines()[0]}"
        if not reason:
            time.sleep(1)
            continue
        time.sleep(3)  # a failure in all processes at once is reported once, by the thread that found it
        if not _Exit.finished and _Exit.failing.acquire(blocking=False):
            _log(reason)
            _leave(1)


def _reason(gone: list[int], failures: dict[int, str]) -> str:
    if failures:
        first = min(failures)
        return f"{name(first)} stopped: {failures[first]}"
    if not gone:
        return ""
    verb = "is" if len(gone) == 1 else "are"
    return f"{', '.join(map(name, gone))} {verb} gone (killed, or down); start all again with --resume"


def _fail(reason: str, code: int, details: str = "") -> NoReturn:
    """Tell the other processes the reason, print it unless process 0 prints the same, and leave."""
    if not _Exit.failing.acquire(blocking=False):
        time.sleep(60)  # the watching thread is about to end this process
    printed = ""
    if state.client is not None:
        try:
            report_failure(reason)
            if index():
                printed = state.client.blocking_key_value_get("graftax/failed/0", 5000)
        except Exception:  # process 0 did not fail, or the coordinator is gone: this process prints
            printed = ""
    if printed != reason:
        _log(details.rstrip() or reason)
    _leave(code)


def _log(text: str) -> None:
    prefix = f"[process {index()}] " if index() else ""
    first, *rest = text.splitlines()
    sys.stderr.write("".join([f"graftax: {prefix}{first}\n", *(f"{prefix}{line}\n" for line in rest)]))


def _leave(code: int) -> NoReturn:
    """End at once: jax's own exit waits for collectives that will never come."""
    if _Exit.coordinator is not None:
        if state.client is not None:
            time.sleep(6)  # the other processes read the reason and leave first
        _dismiss_coordinator()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end() -> None:
    """Leave after all have finished: process 0 last, because the coordinator ends with it."""
    import jax

    barrier_gather("end")
    _Exit.finished = True
    if index() == 0:
        last = threading.Thread(target=_wait_for_others, daemon=True)
        last.start()
        last.join(heartbeat_timeout() + 10)
    jax.distributed.shutdown()
    if _Exit.coordinator is not None:
        _dismiss_coordinator()
    state.client, state.peers = None, ("",)


def _dismiss_coordinator() -> None:
    """Tell the coordinator to end, a moment after this process has left."""
    with contextlib.suppress(OSError):
        _Exit.coordinator.stdin.write(b"bye\n")
        _Exit.coordinator.stdin.close()


def _wait_for_others() -> None:
    while len(state.client.get_live_nodes(list(range(count())))) > 1:
        time.sleep(0.2)
