"""The coordinator of a run of several processes, a process of its own: `coordinator.py PORT PROCESSES WAIT HEARTBEAT`.

jax puts the coordination service into process 0 and ends all others with a C++ abort when that one dies. Beside it the
service outlives process 0 for long enough to say so. Before the service starts, each process says who it is, so that
one that never comes is known by its number. Ends soon after `bye` on stdin; if stdin is closed without, when
the others have had time to notice.
"""

import json
import socket
import sys
import time
from typing import Any

LINGER = 20  # seconds beyond the heartbeat that it outlives process 0


def gather(server: socket.socket, count: int, wait: float) -> tuple[dict[int, Any], list[socket.socket], str]:
    """({process: {host, pid}}, the open connections, what is wrong) of those that come within `wait` seconds."""
    found: dict[int, Any] = {}
    open_, end = [], time.monotonic() + wait
    while len(found) < count:
        server.settimeout(max(end - time.monotonic(), 0.001))
        try:
            connection = server.accept()[0]
        except TimeoutError:
            missing = ", ".join(str(i) for i in range(count) if i not in found)
            return found, open_, f"process {missing} of {count} did not come within {wait:.0f} s"
        connection.settimeout(5)
        try:
            hello = json.loads(connection.makefile().readline())
            index, said = hello["index"], f"{hello['host']}, pid {hello['pid']}"
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no process of ours
        open_.append(connection)
        if hello["count"] != count:
            return found, open_, f"process {index} ({said}) was told of {hello['count']} processes, not of {count}"
        if index in found:
            return found, open_, f"two processes say that they are process {index}: {found[index]}; {said}"
        found[index] = said
    return found, open_, ""


def main(port: int, count: int, wait: float, heartbeat: int) -> None:
    """Gather the processes, tell each of all, and be their coordination service."""
    both, end = socket.has_dualstack_ipv6(), time.monotonic() + heartbeat + LINGER + 10
    where: Any = {"family": socket.AF_INET6, "dualstack_ipv6": True} if both else {}
    while True:
        try:
            server = socket.create_server(("", port), backlog=4096, **where)
            break
        except OSError as error:
            if time.monotonic() > end:  # it is not the coordinator of a run that was killed a moment ago
                print(f"port {port}: {error.strerror}", flush=True)
                return
            time.sleep(0.5)
    print("ready", flush=True)
    found, open_, wrong = gather(server, count, wait)
    server.close()
    service = None
    if not wrong:
        from jaxlib import _jax

        address = f"{'[::]' if both else '0.0.0.0'}:{port}"
        # Recoverable: when a process dies the others are told (get_live_nodes), not aborted.
        service = _jax.get_distributed_runtime_service(
            address, count, heartbeat_timeout=heartbeat, cluster_register_timeout=int(wait), recoverable=True
        )
    for connection in open_:
        line = {"wrong": wrong} if wrong else {"peers": [found[i] for i in range(count)]}
        connection.sendall((json.dumps(line) + "\n").encode())
        connection.close()
    if service is not None:
        # At `bye` only process 0 is left, which leaves now; without, the others have to find out that it is gone.
        time.sleep(2 if sys.stdin.read().strip() == "bye" else heartbeat + LINGER)
        service.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
