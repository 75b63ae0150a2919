"""Bandwidth between nodes over TCP, in the words of the pre-flight: a sink on each node, and senders to it."""

import contextlib
import hmac
import json
import socket
import threading
import time

from megascale.errors import LaunchError

SEND_BYTES = 64 << 20
SEND_S = 1.0
CHUNK_BYTES = 1 << 20
SINK_S = 2.0
"""A sink measures for so long at most, and then answers: a slow link is told by its first seconds."""
CONNECT_S = 5.0
TOKEN_BYTES = 32
SOCKET_BACKLOG = 64


class Sink:
    """Takes what other nodes of the same pre-flight send, and tells them how fast it came.

    Args:
        host: this node's address; the sink is bound to it alone.
        token: what a sender says first; `TOKEN_BYTES` characters.

    Raises:
        OSError: the address isn't this node's, or no port is free.
    """

    def __init__(self, host: str, token: str):
        self._token = token.encode()
        self._listener = socket.create_server((host, 0), backlog=SOCKET_BACKLOG)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._take, args=(connection,), daemon=True).start()

    def _take(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(SINK_S)
            if not hmac.compare_digest(_receive_exactly(connection, TOKEN_BYTES), self._token):
                return
            num_bytes, took_s = _drain(connection)
            connection.sendall((json.dumps({"bytes": num_bytes, "seconds": took_s}) + "\n").encode())
            connection.shutdown(socket.SHUT_WR)
            _drain(connection)  # closing with unread bytes would reset the connection before the answer is read


def measure_gbps(host: str, port: int, token: str) -> float:
    """Gigabits per second from here to a sink; 1 s or 64 MiB are sent, `CONNECT_S` + 4 s is the longest it takes.

    Raises:
        LaunchError: the sink isn't reached, doesn't answer, or wants another token.
    """
    try:
        with socket.create_connection((host, port), timeout=CONNECT_S) as connection:
            connection.settimeout(SEND_S + SINK_S + 1)
            connection.sendall(token.encode())
            _send(connection)
            connection.shutdown(socket.SHUT_WR)
            with connection.makefile("rb") as file:
                line = file.readline(200)
        if not line:
            raise LaunchError("it hung up: another program has this port, or another pre-flight")
        answer = json.loads(line)
        return round(answer["bytes"] * 8 / max(answer["seconds"], 1e-6) / 1e9, 4)
    except TimeoutError:
        raise LaunchError(f"no answer within {CONNECT_S:g} s: a firewall, or no route on this interface") from None
    except (OSError, ValueError, KeyError) as error:
        raise LaunchError(getattr(error, "strerror", None) or str(error)) from None


def _send(connection: socket.socket) -> None:
    chunk, sent, began_s = bytes(CHUNK_BYTES), 0, time.monotonic()
    while sent < SEND_BYTES and time.monotonic() - began_s < SEND_S:
        sent += connection.send(chunk)


def _drain(connection: socket.socket) -> tuple[int, float]:
    """Reads to the end, or for `SINK_S`; returns bytes and the seconds from the first to the last of them."""
    buffer, num_bytes, began_s = bytearray(CHUNK_BYTES), 0, time.monotonic()
    last_s = began_s
    with contextlib.suppress(TimeoutError):
        while time.monotonic() - began_s < SINK_S and (count := connection.recv_into(buffer)):
            num_bytes, last_s = num_bytes + count, time.monotonic()
    return num_bytes, last_s - began_s


def _receive_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    content = b""
    while len(content) < num_bytes and (part := connection.recv(num_bytes - len(content))):
        content += part
    return content
