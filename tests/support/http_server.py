"""A local http server of a folder, with faults: what the other side of a fetch can do wrong."""

import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Faults:
    """What the server does wrong. Fields may be changed while it runs.

    Attributes:
        statuses: answers of the next requests, each used once; 0 for the file itself.
        drops: bytes after which the connections of the next answers are closed, each used once.
        drop_fraction: share of the answers of which the connection is closed at a random byte.
        flip_fraction: share of the answers with one bit flipped.
        ignores_range: whole files are sent, whatever was asked for.
        announced_extra: added to Content-Length.
        redirect_to: where every request is sent on to.
        chunk_pause_s: before each 64 KiB.
    """

    statuses: list[int] = field(default_factory=list)
    drops: list[int] = field(default_factory=list)
    drop_fraction: float = 0.0
    flip_fraction: float = 0.0
    ignores_range: bool = False
    announced_extra: int = 0
    redirect_to: str = ""
    chunk_pause_s: float = 0.0


@dataclass
class Server:
    """A running server.

    Attributes:
        url: of the folder that it serves.
        faults: what it does wrong.
        requests: (path, Range header) of each request so far.
        headers: of each request so far.
        paused: set once an answer pauses.
    """

    url: str
    faults: Faults
    requests: list[tuple[str, str | None]]
    headers: list[dict[str, str]]
    paused: threading.Event = field(default_factory=threading.Event)


class QuietServer(ThreadingHTTPServer):
    """Says nothing about clients that go away: they are part of the tests."""

    def handle_error(self, *args) -> None:
        pass


@contextmanager
def serve(folder: Path, seed: int = 0, **faults) -> Iterator[Server]:
    """Serves a folder at a free port, for as long as the context lasts."""
    server = Server("", Faults(**faults), [], [])
    listener = QuietServer(("127.0.0.1", 0), make_handler(folder, server, random.Random(seed)))
    server.url = f"http://127.0.0.1:{listener.server_port}"
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


def make_handler(folder: Path, server: Server, chance: random.Random) -> type[BaseHTTPRequestHandler]:
    """The class that answers a request, as the server's faults say."""
    guard = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with guard:
                server.requests.append((self.path, self.headers.get("Range")))
                server.headers.append(dict(self.headers))
                status = server.faults.statuses.pop(0) if server.faults.statuses else 0
                drops = chance.random() < server.faults.drop_fraction
                flips = chance.random() < server.faults.flip_fraction
                where = chance.random()
            if server.faults.redirect_to:
                self.send_response(302)
                self.send_header("Location", server.faults.redirect_to + self.path)
                self.end_headers()
                return
            path = folder / self.path.partition("?")[0].lstrip("/")
            if status or not path.is_file():
                self.send_error(status or 404)
                return
            self._send(path.read_bytes(), drops, flips, where)

        def _send(self, content: bytes, drops: bool, flips: bool, where: float) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(asked[1]) if asked and not server.faults.ignores_range else 0
            if start and start >= len(content):
                self.send_error(416)
                return
            body = bytearray(content[start:])
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(body) + server.faults.announced_extra))
            self.end_headers()
            if flips:
                body[int(where * len(body))] ^= 4
            if drops:
                body = body[: int(where * len(body))]
            if server.faults.drops:
                body = body[: server.faults.drops.pop(0)]
            for first in range(0, len(body), 1 << 16):
                if pause_s := server.faults.chunk_pause_s:
                    server.paused.set()
                    time.sleep(pause_s)
                self.wfile.write(body[first : first + (1 << 16)])

        def log_message(self, *args) -> None:
            pass

    return Handler
