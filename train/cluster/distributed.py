"""The processes of a run: who they are, barriers between them, and flags. A run of one process waits for nobody.

The client of the coordination service is private in jax (`jax._src.distributed`). Its public users do not replace it:
`process_allgather` and `sync_global_devices` are collectives on devices, which a thread that saves must not start
between those of the steps, and they wait forever for a process that is dead; `reached_preemption_sync_point` reacts to
SIGTERM alone, and not to a second one.
"""

import json
from collections import Counter
from typing import Any

from ... import InputError
from ..config import shorten

STOPPED = 75  # exit code (EX_TEMPFAIL) of a run that a signal ended and that is saved
BARRIER = 1800.0  # seconds that a barrier waits for all processes; a dead process is noticed sooner


class State:
    """What `launch.run_processes` sets; these are the values of a run of one process."""

    index = 0
    peers: tuple[str, ...] = ("",)  # `host, pid n` of each process
    client: Any = None  # of the coordination service


state = State()
_barriers: Counter[str] = Counter()  # number of barriers of each name


def index() -> int:
    """Return the number of this process."""
    return state.index


def count() -> int:
    """Return the number of processes of the run."""
    return len(state.peers)


def name(i: int) -> str:
    """Return `process 1 of 4 (host, pid 123)`."""
    return f"process {i} of {count()} ({state.peers[i]})"


def barrier_gather(what: str, text: str = "", seconds: float = BARRIER) -> list[str]:
    """Wait until all processes are here and return the text of each, in order. May be called in any thread.

    Raises InputError naming the processes that do not come.
    """
    if count() == 1:
        return [text]
    _barriers[what] += 1
    key = f"graftax/{what}/{_barriers[what]}"
    state.client.key_value_set(f"{key}/{index()}", json.dumps(text))
    try:
        state.client.wait_at_barrier(key, int(seconds * 1000))
    except Exception as error:
        missing = ", ".join(name(i) for i in sorted(set(range(count())) - set(values_below(key))))
        raise InputError(f"{what}: {missing or error} did not come within {seconds:.0f} s") from None
    texts = {i: json.loads(value) for i, value in values_below(key).items()}
    if _barriers[what] > 1:  # every process that is here has read the values of the time before
        state.client.key_value_delete(f"graftax/{what}/{_barriers[what] - 1}/{index()}")
    return [texts[i] for i in range(count())]


def check_agreement(what: str, values: dict[str, Any]) -> None:
    """Raise InputError in all processes if the values of one differ from those of process 0."""
    if count() == 1:
        return
    expected, *others = [json.loads(text) for text in barrier_gather(what, json.dumps(values, sort_keys=True))]
    for i, theirs in enumerate(others, 1):
        for key in expected:
            if theirs.get(key) != expected[key]:
                raise InputError(
                    f"{name(i)} has {key} {shorten(theirs.get(key))}, process 0 has {shorten(expected[key])}; "
                    "start all processes with the same command and the same files"
                )


def report_failure(reason: str) -> None:
    """End all processes with a reason, from a thread whose own error nobody may wait for."""
    if count() > 1:
        state.client.key_value_set(f"graftax/failed/{index()}", reason, allow_overwrite=True)


def set_flag(what: str) -> None:
    """Set a flag for all processes, without waiting for any."""
    state.client.key_value_set(f"graftax/{what}/posted", "", allow_overwrite=True)


def flag_is_set(what: str) -> bool:
    """Return whether some process has set a flag."""
    return bool(state.client.key_value_dir_get(f"graftax/{what}"))


def values_below(key: str) -> dict[int, str]:
    """Return {process: value} of the entries below a key of the coordination service."""
    return {int(k.rsplit("/", 1)[1]): value for k, value in state.client.key_value_dir_get(key)}
