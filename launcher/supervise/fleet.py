"""The agents of a job as its controller sees them: who is there, what they say, who has fallen silent."""

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue

from launcher.supervise.wire import Channel, accept
from megascale.observe.console import say

PING_S = 1.0


@dataclass
class Link:
    """The connection to one agent.

    Attributes:
        heard_s: when it last said something, by `time.monotonic`.
    """

    node: str
    channel: Channel
    host: str
    heard_s: float


@dataclass(frozen=True)
class Event:
    """A message from a node; of type `lost` when its agent is gone."""

    node: str
    message: dict

    @property
    def type(self) -> str:
        """What it is about."""
        return self.message["type"]


class Fleet:
    """All agents of a job.

    Args:
        listener: agents connect to it.
        token: that they must know.
        silence_s: a node that says nothing for so long is lost.
    """

    def __init__(self, listener: socket.socket, token: bytes, silence_s: float):
        self._listener, self._token, self._silence_s = listener, token, silence_s
        self._listener.setblocking(False)
        self._arrived: SimpleQueue[tuple[Channel, dict]] = SimpleQueue()
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._pinged_s = 0.0
        self.links: dict[str, Link] = {}

    def events(self, timeout_s: float) -> Iterator[Event]:
        """What has happened, after waiting for the first of it at most `timeout_s`."""
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                self._open_door()
            elif self.links.get(key.data.node) is key.data:
                yield from self._read(key.data)
        while not self._arrived.empty():
            yield from self._welcome(*self._arrived.get())
        now_s = time.monotonic()
        if now_s - self._pinged_s > PING_S:
            self._pinged_s = now_s
            self.tell(self.links, {"type": "ping"})
        for link in list(self.links.values()):
            link.channel.flush()
            if now_s - link.heard_s > self._silence_s:
                yield self._lose(link, f"its agent said nothing for {self._silence_s:g} s")

    def wait(self, is_over: Callable[[], bool], handle: Callable[[Event], None], timeout_s: float) -> bool:
        """Hands events on until something is so; False when it took too long."""
        deadline_s = time.monotonic() + timeout_s
        while not is_over():
            if time.monotonic() > deadline_s:
                return False
            for event in self.events(0.1):
                handle(event)
        return True

    def tell(self, nodes: Iterable[str], message: dict) -> None:
        """Sends a message to some nodes; those that are gone are passed over."""
        for node in list(nodes):
            if node in self.links:
                self.links[node].channel.send(message)

    def drop(self, node: str) -> None:
        """Ends the connection to a node, whose agent then ends its ranks and itself."""
        if node in self.links:
            self._forget(self.links[node])

    def close(self) -> None:
        """Lets all agents go."""
        self.tell(self.links, {"type": "quit"})
        deadline_s = time.monotonic() + 5.0
        while self.links and time.monotonic() < deadline_s:
            for _ in self.events(0.1):
                pass
        for link in list(self.links.values()):
            self._forget(link)
        self._selector.close()
        self._listener.close()

    def _open_door(self) -> None:
        """Greets beside all else: agents that hear nothing end their ranks, and a stranger may keep one waiting."""
        try:
            connection, _ = self._listener.accept()
        except OSError:  # gone again
            return
        threading.Thread(target=self._greet, args=(connection,), name="greeting", daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        try:
            self._arrived.put(accept(connection, self._token))
        except OSError as error:
            say(f"warning: refused a connection to the controller: {error}")

    def _welcome(self, channel: Channel, hello: dict) -> Iterator[Event]:
        node = str(hello.get("node"))
        if node in self.links:  # its old agent is on its way out
            yield self._lose(self.links[node], "another agent of the node has connected")
        link = Link(node, channel, channel.peer, time.monotonic())
        self.links[node] = link
        self._selector.register(channel, selectors.EVENT_READ, link)
        yield Event(node, {"type": "hello", **hello})

    def _read(self, link: Link) -> Iterator[Event]:
        try:
            messages = list(link.channel.receive())
        except OSError as error:
            yield self._lose(link, f"its agent is gone: {error}")
            return
        link.heard_s = time.monotonic()
        yield from (Event(link.node, message) for message in messages if message["type"] != "pong")

    def _lose(self, link: Link, reason: str) -> Event:
        self._forget(link)
        return Event(link.node, {"type": "lost", "reason": reason, "silent_s": time.monotonic() - link.heard_s})

    def _forget(self, link: Link) -> None:
        self.links.pop(link.node, None)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(link.channel)
        link.channel.close()
