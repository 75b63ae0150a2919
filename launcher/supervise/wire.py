"""Messages between the controller of a job and the agents on its nodes: one JSON object a line, over TCP.

Both sides prove that they know the job's token before anything else is said: each answers a random challenge with an
HMAC. The token lies in a file that only its owner reads, so it shows neither in `ps` nor in a log.
"""

import hashlib
import hmac
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from megascale.errors import LaunchError

MAX_LINE_BYTES = 16 << 20
HANDSHAKE_S = 10.0


class Channel:
    """One connection, without waiting: `send` keeps what the socket doesn't take, `receive` gives whole messages.

    Attributes:
        address: this side's own: the one that reaches the other side.
        peer: the other side's address.

    Raises:
        OSError: the other side is gone already.
    """

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received, self._unsent = bytearray(), bytearray()
        self.address, self.peer = connection.getsockname()[0], connection.getpeername()[0]

    def fileno(self) -> int:
        """For `selectors`."""
        return self._socket.fileno()

    def send(self, message: dict) -> None:
        """Sends as much as goes now; the rest at the next `flush`."""
        self._unsent += (json.dumps(message) + "\n").encode()
        self.flush()

    def flush(self) -> None:
        """Sends what an earlier call couldn't; errors show at `receive`."""
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent)
            except BlockingIOError:
                return
            except OSError:
                self._unsent.clear()
                return
            del self._unsent[:sent]

    def receive(self) -> Iterator[dict]:
        """Whole messages that have come.

        Raises:
            ConnectionError: the other side is gone, or says what is no message.
        """
        try:
            content = self._socket.recv(1 << 20)
        except BlockingIOError:
            return
        if not content:
            raise ConnectionError("closed by the other side")
        self._received += content
        while (end := self._received.find(b"\n")) >= 0:
            line = bytes(self._received[:end])
            del self._received[: end + 1]
            yield _parse(line)
        if len(self._received) > MAX_LINE_BYTES:
            raise ConnectionError(f"a line of more than {MAX_LINE_BYTES} bytes")

    def close(self) -> None:
        """Ends the connection."""
        self._socket.close()


def make_token(path: Path) -> bytes:
    """Draws a job's token and writes it where only this user reads it."""
    token = secrets.token_hex(32).encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(token)
    return token


def accept(connection: socket.socket, token: bytes) -> tuple[Channel, dict]:
    """Greets whoever has connected to the controller; returns the channel with what the agent says of itself.

    Cost: waits for the other side, `HANDSHAKE_S` at most: a stranger may say nothing.

    Raises:
        ConnectionError, OSError: whoever it is doesn't know the token, or is too slow; it has no effect.
    """
    try:
        challenge = secrets.token_hex(16)
        _write_line(connection, {"challenge": challenge})
        hello = _read_line(connection)
        _check_proof(token, f"agent:{challenge}", hello)
        _write_line(connection, {"proof": _proof(token, f"controller:{hello.get('challenge')}")})
    except Exception:
        connection.close()
        raise
    return Channel(connection), hello


def connect(host: str, port: int, token: bytes, introduction: dict) -> Channel:
    """Connects an agent.

    Raises:
        ConnectionError, OSError: nobody is there, or not the controller of this job.
    """
    connection = socket.create_connection((host, port), timeout=HANDSHAKE_S)
    try:
        challenge = secrets.token_hex(16)
        asked = _read_line(connection).get("challenge")
        _write_line(connection, introduction | {"challenge": challenge, "proof": _proof(token, f"agent:{asked}")})
        _check_proof(token, f"controller:{challenge}", _read_line(connection))
    except Exception:
        connection.close()
        raise
    return Channel(connection)


def read_token(path: Path) -> bytes:
    """The token of a job.

    Raises:
        LaunchError: this node doesn't see the run folder.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise LaunchError(f"{path}: can't be read on this node ({error.strerror}); is the run folder shared?") from None


def _proof(token: bytes, challenge: str) -> str:
    return hmac.new(token, challenge.encode(), hashlib.sha256).hexdigest()


def _check_proof(token: bytes, challenge: str, message: dict) -> None:
    if not hmac.compare_digest(_proof(token, challenge), str(message.get("proof"))):
        raise ConnectionError("doesn't know this job's token")


def _write_line(connection: socket.socket, message: dict) -> None:
    connection.settimeout(HANDSHAKE_S)
    connection.sendall((json.dumps(message) + "\n").encode())


def _read_line(connection: socket.socket) -> dict:
    line, deadline_s = bytearray(), time.monotonic() + HANDSHAKE_S
    while not line.endswith(b"\n"):
        connection.settimeout(max(0.001, deadline_s - time.monotonic()))  # of the line, not of each byte
        content = connection.recv(1)  # byte by byte, so that nothing behind the line is taken
        if not content or len(line) > 4096:
            raise ConnectionError("no handshake")
        line += content
    return _parse(bytes(line))


def _parse(line: bytes) -> dict:
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    if not isinstance(message, dict):
        raise ConnectionError("a line that is no message")
    return message
