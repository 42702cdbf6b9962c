"""Find the processes of a run and let them meet, before jax knows of any of them."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from ... import InputError

CLUSTERS = (
    "SLURM_STEP_NODELIST",
    "OMPI_COMM_WORLD_SIZE",
    "JOB_COMPLETION_INDEX",
    "TPU_WORKER_HOSTNAMES",
    "TPU_PROCESS_ADDRESSES",
)


def seconds_from_env(variable: str, default: int) -> int:
    """Return the seconds in an environment variable. Raises InputError unless they are whole, 1 to 86,400."""
    text = os.environ.get(variable, str(default))
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= 86_400:
        raise InputError(f"{variable}={text!a}: wanted whole seconds, 1 to 86400; correct or unset it")
    return int(text)


def heartbeat_timeout() -> int:
    """Return the seconds without a heartbeat after which a process is dead."""
    return seconds_from_env("GRAFTAX_HEARTBEAT", 25)


def startup_timeout() -> int:
    """Return the seconds within which all processes must come."""
    return seconds_from_env("GRAFTAX_WAIT", 300)


def parse_processes(text: str) -> tuple[Any, ...] | None:
    """Return (address, N, I, None) of `ADDRESS:PORT,N,I`. Raises InputError for anything else."""
    if not text:
        return None
    if text == "1":
        return "", 1, 0, None
    match = re.fullmatch(r"(.+:([0-9]{1,5})),([0-9]{1,5}),([0-9]{1,5})", text)
    if not match or not 0 < int(match[2]) < 1 << 16 or int(match[4]) >= int(match[3]):
        raise InputError(
            f"--processes {text}: wanted ADDRESS:PORT,N,I (where process 0 listens, how many there are, which this is "
            "from 0), e.g. 10.0.0.1:8476,2,0"
        )
    return match[1], int(match[3]), int(match[4]), None


def detect_cluster() -> tuple[Any, ...] | None:
    """Return (address, N, I, local devices) as jax detects them; None where nothing says that there are several.

    `jax.distributed.initialize()` detects the same, but starts at once, before the processes can be checked; the
    detection alone is private in jax.
    """
    import jax
    from jax._src import cloud_tpu_init
    from jax._src.clusters import ClusterEnv

    if not cloud_tpu_init.running_in_cloud_tpu_vm and not any(os.environ.get(k) for k in CLUSTERS):
        return None
    if os.environ.get("SLURM_STEP_NODELIST") and os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return None  # an interactive shell, or a batch script's own step
    if jax.distributed.is_initialized():
        return None
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, startup_timeout())
    except Exception as error:
        raise InputError(
            f"the processes of this cluster were not found ({error}); name them with --processes ADDRESS:PORT,N,I, or "
            "use --processes 1 for a single one"
        ) from None
    return None if None in found[:3] else found


def start_coordinator(port: str, n: int) -> Any:
    """Start the coordinator, a child of process 0, and return it when it listens."""
    script = str(Path(__file__).with_name("coordinator.py"))
    command = [sys.executable, "-P", script, port, str(n), str(startup_timeout()), str(heartbeat_timeout())]
    # In a session of its own: Ctrl-C is for the processes of the run.
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    answer = child.stdout.readline().decode().strip() if child.stdout else ""
    if answer != "ready":
        raise InputError(f"--processes: process 0 cannot listen on {answer or f'port {port}'}; choose another port")
    return child


def meet_processes(host: str, port: int, n: int, i: int) -> tuple[str, ...]:
    """Tell the coordinator who this is, and return who all are. Raises InputError naming the processes that are
    missing."""
    end, answer = time.monotonic() + startup_timeout(), ""
    hello = {"index": i, "count": n, "host": socket.gethostname(), "pid": os.getpid()}
    while not answer:
        try:
            with socket.create_connection((host, port), timeout=10) as connection:
                connection.sendall((json.dumps(hello) + "\n").encode())
                connection.settimeout(startup_timeout() + 10)
                answer = connection.makefile().readline()
        except OSError:
            answer = ""
        if not answer:
            if time.monotonic() > end:
                raise InputError(
                    f"process 0 of {n} did not come within {startup_timeout()} s: nothing answers at {host}:{port}"
                )
            time.sleep(0.5)
    message = json.loads(answer)
    if "wrong" in message:
        raise InputError(message["wrong"])
    return tuple(message["peers"])


def mute(i: int) -> None:
    """Let only process 0 print, and drop what C++ libraries print on stdout in any process."""
    from ..progress import console

    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = os.fdopen(stdout, "w") if i == 0 else open(os.devnull, "w")  # noqa: SIM115
    if i:
        console.quiet = True
        warnings.filterwarnings("ignore")
