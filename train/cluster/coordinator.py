"""The coordinator of a run of several processes, a process of its own: `coordinator.py PORT PROCESSES WAIT HEARTBEAT`.

jax puts the coordination service into process 0 and ends all others with a C++ abort when that one dies. In a process
of its own, the service outlives process 0 for long enough to report its death; jax has no public call for that. Before
the service starts, each process says who it is, so that a missing one is known by its number. The coordinator ends soon
after `bye` on stdin; if stdin closes without it, when the other processes have had time to notice.
"""

import json
import socket
import sys
import time
from typing import Any

LINGER = 20  # seconds beyond the heartbeat for which it outlives process 0


def gather(server: socket.socket, count: int, wait: float) -> tuple[dict[int, str], list[socket.socket], str]:
    """Return ({process: host and pid}, the open connections, an error or "") of the processes that come within `wait`
    seconds."""
    peers: dict[int, str] = {}
    connections, end = [], time.monotonic() + wait
    while len(peers) < count:
        server.settimeout(max(end - time.monotonic(), 0.001))
        try:
            connection = server.accept()[0]
        except TimeoutError:
            missing = ", ".join(str(i) for i in range(count) if i not in peers)
            return peers, connections, f"process {missing} of {count} did not come within {wait:.0f} s"
        connection.settimeout(5)
        try:
            hello = json.loads(connection.makefile().readline())
            index, peer = hello["index"], f"{hello['host']}, pid {hello['pid']}"
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not a process of this run
        connections.append(connection)
        if hello["count"] != count:
            error = f"process {index} ({peer}) was told of {hello['count']} processes, not of {count}"
            return peers, connections, error
        if index in peers:
            return peers, connections, f"two processes say that they are process {index}: {peers[index]}; {peer}"
        peers[index] = peer
    return peers, connections, ""


def main(port: int, count: int, wait: float, heartbeat: int) -> None:
    """Gather the processes, tell each who all are, and be their coordination service."""
    dualstack, end = socket.has_dualstack_ipv6(), time.monotonic() + heartbeat + LINGER + 10
    options: Any = {"family": socket.AF_INET6, "dualstack_ipv6": True} if dualstack else {}
    while True:
        try:
            server = socket.create_server(("", port), backlog=4096, **options)
            break
        except OSError as error:
            if time.monotonic() > end:  # until then it may be the coordinator of a run that was killed a moment ago
                print(f"port {port}: {error.strerror}", flush=True)
                return
            time.sleep(0.5)
    print("ready", flush=True)
    peers, connections, error = gather(server, count, wait)
    server.close()
    service = None
    if not error:
        from jaxlib import _jax

        address = f"{'[::]' if dualstack else '0.0.0.0'}:{port}"
        # Recoverable: when a process dies the others are told (get_live_nodes), not aborted.
        service = _jax.get_distributed_runtime_service(
            address, count, heartbeat_timeout=heartbeat, cluster_register_timeout=int(wait), recoverable=True
        )
    answer = {"wrong": error} if error else {"peers": [peers[i] for i in range(count)]}
    for connection in connections:
        connection.sendall((json.dumps(answer) + "\n").encode())
        connection.close()
    if service is not None:
        # At `bye` only process 0 is left, and about to leave. Without it the others must find out that it is gone.
        time.sleep(2 if sys.stdin.read().strip() == "bye" else heartbeat + LINGER)
        service.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
