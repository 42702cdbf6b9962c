"""Several processes: who they are, how they meet, and what happens when one is missing.

A run of one process never comes here. `together` starts what jax needs before it touches a device; from then on a
thread of each process asks the coordination service which processes live, and ends its own with one line, naming the
missing one, when they are no longer all.
"""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

from ... import InputError
from ..config import shorten
from .processes import (
    detect_cluster,
    heartbeat_timeout,
    meet_processes,
    mute,
    parse_processes,
    start_coordinator,
    startup_timeout,
)

STOPPED = 75  # the exit code (EX_TEMPFAIL) when signals ended it and all is saved
BARRIER = 1800.0  # seconds for all to come to one place of a run; a dead process is noticed sooner


class _State:
    """What `together` sets; one process without it."""

    index = 0
    peers: tuple[str, ...] = ("",)  # `host, pid n` of each process
    client: Any = None
    coordinator: Any = None
    ended = False  # nothing that is found from here on is an error
    failing = threading.Lock()


_used: Counter[str] = Counter()  # how often a name was shared


def index() -> int:
    """This process's number."""
    return _State.index


def count() -> int:
    """How many processes run this run."""
    return len(_State.peers)


def name(i: int) -> str:
    """`process 1 of 4 (host, pid 123)`."""
    return f"process {i} of {count()} ({_State.peers[i]})"


def run_processes(processes: str | None, work: Callable[[], Any]) -> Any:
    """work() in each process of the run; what fails in one ends all of them, each with one line.

    processes: `ADDRESS:PORT,N,I` (process 0 listens at the address; this is process I of N), `1` for one, or None to
    take GRAFTAX_PROCESSES, or what a TPU slice, SLURM, Kubernetes or Open MPI says, or one.
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
        if stop.code and stop.code != STOPPED:  # that one is of all of them
            _fail(f"stopped with code {stop.code}", int(stop.code))
        _end()
        raise
    except BaseException as error:
        if type(error).__name__ == "JaxRuntimeError":
            time.sleep(
                heartbeat_timeout() + 5
            )  # a collective that broke: the watch will know whose fault it is, and end here
        lines = "".join(traceback.format_exception(error))
        _fail(f"{type(error).__name__}: {error}".splitlines()[0], 1, lines)


def barrier_gather(what: str, text: str = "", seconds: float = BARRIER) -> list[str]:
    """Each process's text, in order, when all are here: a barrier that names who is missing. Safe in any thread."""
    if count() == 1:
        return [text]
    _used[what] += 1
    key = f"graftax/{what}/{_used[what]}"
    _State.client.key_value_set(f"{key}/{index()}", json.dumps(text))
    try:
        _State.client.wait_at_barrier(key, int(seconds * 1000))
    except Exception as error:
        here = {int(k.rsplit("/", 1)[1]) for k, _ in _State.client.key_value_dir_get(key)}
        missing = ", ".join(name(i) for i in range(count()) if i not in here)
        raise InputError(f"{what}: {missing or error} did not come within {seconds:.0f} s") from None
    found = {int(k.rsplit("/", 1)[1]): json.loads(v) for k, v in _State.client.key_value_dir_get(key)}
    if _used[what] > 1:  # who is here has read what was said the time before
        _State.client.key_value_delete(f"graftax/{what}/{_used[what] - 1}/{index()}")
    return [found[i] for i in range(count())]


def check_agreement(what: str, mine: dict[str, Any]) -> None:
    """InputError in all processes if one has another value of something than process 0."""
    if count() == 1:
        return
    said = [json.loads(text) for text in barrier_gather(what, json.dumps(mine, sort_keys=True))]
    for i, theirs in enumerate(said):
        for key in said[0]:
            if theirs.get(key) != said[0][key]:
                raise InputError(
                    f"{name(i)} has {key} {shorten(theirs.get(key))}, process 0 has {shorten(said[0][key])}; "
                    "start all processes with the same command and the same files"
                )


def report_failure(reason: str) -> None:
    """End all processes with a reason, from a thread whose own error nobody may wait for."""
    if count() > 1:
        _State.client.key_value_set(f"graftax/failed/{index()}", reason, allow_overwrite=True)


def set_flag(what: str) -> None:
    """Let all processes know of something, without waiting for any."""
    _State.client.key_value_set(f"graftax/{what}/posted", "", allow_overwrite=True)


def flag_is_set(what: str) -> bool:
    """Whether some process has let know of it."""
    return bool(_State.client.key_value_dir_get(f"graftax/{what}"))


def _start(address: str, n: int, i: int, devices: Any) -> None:
    """Meet the others, then start jax's client, before any device is touched."""
    import jax

    mute(i)
    host, port = address.rsplit(":", 1)
    _State.index = i
    if i == 0:
        _State.coordinator = start_coordinator(port, n)
    _State.peers = meet_processes(host.strip("[]"), int(port), n, i)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM and do nothing about it
    # jax starts a service in process 0 in any case: at a port that nobody knows.
    jax.distributed.initialize(
        address,
        n,
        i,
        devices,
        "deactivate",
        startup_timeout(),
        heartbeat_timeout(),
        10,
        "localhost:0" if i == 0 else None,
    )
    from jax._src import distributed

    _State.client = distributed.global_state.client
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    """End this process with one line when another is gone or says why it stops."""
    client, everyone = _State.client, list(range(count()))
    while not _State.ended:
        try:
            live = client.get_live_nodes(everyone)  # waits for all that live: their C++ threads say so
            said = {int(k.rsplit("/", 1)[1]): v for k, v in client.key_value_dir_get("graftax/failed")}
        except Exception as error:
            live, said = {}, {}
            reason = f"the coordinator beside process 0 ({_State.peers[0]}) is gone: {str(error).splitlines()[0]}"
        else:
            reason = _reason([i for i in everyone if i not in live], said)
        if not reason:
            time.sleep(1)
            continue
        time.sleep(3)  # what ends all of them at once is said once, by the thread that found it
        if not _State.ended and _State.failing.acquire(blocking=False):
            _log(reason)
            _leave(1)


def _reason(gone: list[int], said: dict[int, str]) -> str:
    if said:
        return f"{name(min(said))} stopped: {said[min(said)]}"
    who = ", ".join(name(i) for i in gone)
    return (
        f"{who} {'is' if len(gone) == 1 else 'are'} gone (killed, or down); start all again with --resume"
        if gone
        else ""
    )


def _fail(reason: str, code: int, details: str = "") -> NoReturn:
    """Tell the others, say it (once, if process 0 found the same), and leave."""
    if not _State.failing.acquire(blocking=False):
        time.sleep(60)  # the watch is about to end this process
    told = ""
    if _State.client is not None:
        try:
            _State.client.key_value_set(f"graftax/failed/{index()}", reason, allow_overwrite=True)
            if index():
                told = _State.client.blocking_key_value_get("graftax/failed/0", 5000)
        except Exception:  # process 0 did not fail, or all is gone: this one speaks
            told = ""
    if told != reason:
        _log(details.rstrip() or reason)
    _leave(code)


def _log(text: str) -> None:
    mine = f"[process {index()}] " if index() else ""
    sys.stderr.write("".join(f"graftax: {mine}{line}\n" if i == 0 else f"{mine}{line}\n"
                             for i, line in enumerate(text.splitlines())))  # fmt: skip


def _leave(code: int) -> NoReturn:
    """End at once: jax's own way out waits for collectives that will never come."""
    if _State.coordinator is not None:
        if _State.client is not None:
            time.sleep(6)  # the others read why, and leave first
        _bye()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end() -> None:
    """All are done: leave one after the other, process 0 last, because the coordinator goes with it."""
    import jax

    barrier_gather("end")
    _State.ended = True
    if index() == 0:
        last = threading.Thread(target=_alone, daemon=True)
        last.start()
        last.join(heartbeat_timeout() + 10)
    jax.distributed.shutdown()
    if _State.coordinator is not None:
        _bye()
    _State.client, _State.peers = None, ("",)


def _bye() -> None:
    """The coordinator is needed no more; it ends a moment after this process has left."""
    with contextlib.suppress(OSError):
        _State.coordinator.stdin.write(b"bye\n")
        _State.coordinator.stdin.close()


def _alone() -> None:
    while len(_State.client.get_live_nodes(list(range(count())))) > 1:
        time.sleep(0.2)
