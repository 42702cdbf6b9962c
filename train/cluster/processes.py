"""Where the processes of a run are, and how they meet, before jax knows of any of them."""

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

CLUSTERS = ("SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES",
             "TPU_PROCESS_ADDRESSES")  # fmt: skip


def seconds_from_env(variable: str, default: int) -> int:
    """The seconds that an environment variable says. InputError if they are no whole number from 1 to 86,400."""
    text = os.environ.get(variable, str(default))
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= 86_400:
        raise InputError(f"{variable}={text!a}: wanted whole seconds, 1 to 86400; correct or unset it")
    return int(text)


def heartbeat_timeout() -> int:
    """Seconds without a sign of life until a process is dead."""
    return seconds_from_env("GRAFTAX_HEARTBEAT", 25)


def startup_timeout() -> int:
    """Seconds for all processes to come."""
    return seconds_from_env("GRAFTAX_WAIT", 300)


def parse_processes(text: str) -> tuple[Any, ...] | None:
    """(address, N, I, None) of `ADDRESS:PORT,N,I`; InputError for anything else."""
    if not text:
        return None
    if text == "1":
        return "", 1, 0, None
    found = re.fullmatch(r"(.+:([0-9]{1,5})),([0-9]{1,5}),([0-9]{1,5})", text)
    if not found or not 0 < int(found[2]) < 1 << 16 or int(found[4]) >= int(found[3]):
        raise InputError(
            f"--processes {text}: wanted ADDRESS:PORT,N,I (where process 0 listens, how many there are, which this is "
            "from 0), e.g. 10.0.0.1:8476,2,0"
        )
    return found[1], int(found[3]), int(found[4]), None


def detect_cluster() -> tuple[Any, ...] | None:
    """(address, N, I, local devices) as jax finds them; None where nothing says that there are several processes."""
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
            f"the processes of this cluster were not found ({error}); say them with --processes ADDRESS:PORT,N,I, or "
            "--processes 1 for one alone"
        ) from None
    return None if None in found[:3] else found


def start_coordinator(port: str, n: int) -> Any:
    """The coordinator, a child of process 0, that listens already."""
    script = str(Path(__file__).with_name("coordinator.py"))
    command = [sys.executable, "-P", script, port, str(n), str(startup_timeout()), str(heartbeat_timeout())]
    # In a session of its own: Ctrl-C is for the processes of the run.
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    said = child.stdout.readline().decode().strip() if child.stdout else ""
    if said != "ready":
        raise InputError(f"--processes: process 0 cannot listen on {said or f'port {port}'}; take another port")
    return child


def meet_processes(host: str, port: int, n: int, i: int) -> tuple[str, ...]:
    """Say who this is, and be told who all are; InputError naming who does not come."""
    end, line = time.monotonic() + startup_timeout(), ""
    hello = {"index": i, "count": n, "host": socket.gethostname(), "pid": os.getpid()}
    while not line:
        try:
            with socket.create_connection((host, port), timeout=10) as there:
                there.sendall((json.dumps(hello) + "\n").encode())
                there.settimeout(startup_timeout() + 10)
                line = there.makefile().readline()
        except OSError:
            line = ""
        if not line:
            if time.monotonic() > end:
                raise InputError(
                    f"process 0 of {n} did not come within {startup_timeout()} s: nothing answers at {host}:{port}"
                )
            time.sleep(0.5)
    said = json.loads(line)
    if "wrong" in said:
        raise InputError(said["wrong"])
    return tuple(said["peers"])


def mute(i: int) -> None:
    """Process 0 speaks for all; C++ libraries that print on stdout are heard in none."""
    from ..progress import console

    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = os.fdopen(own, "w") if i == 0 else open(os.devnull, "w")  # noqa: SIM115
    if i:
        console.quiet = True
        warnings.filterwarnings("ignore")
