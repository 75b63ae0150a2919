"""Agents and their controller: who is let in, what a connection survives, and when a node counts as lost."""

import json
import socket
import stat
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.submit.plan import LaunchPlan
from launcher.supervise import wire
from launcher.supervise.agent import share_cores
from launcher.supervise.fleet import Fleet
from launcher.supervise.transports import LocalTransport, agent_command, slurm_job
from launcher.supervise.wire import Channel, connect, make_token, read_token
from megascale.config.cluster import ClusterConfig, ContainerConfig, LimitsConfig
from megascale.errors import LaunchError

TOKEN = b"the token of this job"


@pytest.fixture
def pair():
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    with ours, theirs:
        yield Channel(ours), theirs


@pytest.fixture
def fleet():
    opened = Fleet(socket.create_server(("127.0.0.1", 0)), TOKEN, silence_s=1.5)
    yield opened
    opened.close()


def port_of(fleet: Fleet) -> int:
    return fleet._listener.getsockname()[1]


def follow(fleet: Fleet, is_over, timeout_s: float = 5.0) -> list:
    """Serves a fleet until something is so; returns the events."""
    seen = []
    assert fleet.wait(lambda: is_over(seen), seen.append, timeout_s), seen
    return seen


class Guest(threading.Thread):
    """An agent that connects, and then pongs as long as it isn't told to be silent."""

    def __init__(self, fleet: Fleet, node: str, token: bytes = TOKEN):
        super().__init__(daemon=True)
        self._port, self._node, self._token = port_of(fleet), node, token
        self.is_silent, self.error, self.channel = False, None, None
        self.start()

    def run(self) -> None:
        """Connects and answers until the connection ends."""
        try:
            self.channel = connect("127.0.0.1", self._port, self._token, {"node": self._node, "cores": 2})
            while True:
                messages = [] if self.is_silent else list(self.channel.receive())
                for _ in messages:
                    self.channel.send({"type": "pong"})
                time.sleep(0.02)
        except OSError as error:
            self.error = error


def receive_all(channel: Channel, num: int, timeout_s: float = 5.0) -> list[dict]:
    messages, deadline_s = [], time.monotonic() + timeout_s
    while len(messages) < num and time.monotonic() < deadline_s:
        messages += channel.receive()
    return messages


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none()), max_size=5), st.data())
def test_messages_survive_any_cut_of_the_stream(messages, data):
    """Mutation that must fail it: parsing what `recv` gave, rather than whole lines."""
    content = b"".join(json.dumps(message).encode() + b"\n" for message in messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=4)))
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    with ours, theirs:
        channel, got = Channel(ours), []
        for begin, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
            theirs.sendall(content[begin:end])
            got += channel.receive()
        assert got + receive_all(channel, len(messages) - len(got)) == messages


def test_what_the_socket_does_not_take_is_sent_later(pair):
    """Mutation that must fail it: forgetting the rest of a message that went out in part."""
    channel, theirs = pair
    text = "x" * (8 << 20)
    channel.send({"text": text})
    other, got, deadline_s = Channel(theirs), [], time.monotonic() + 10
    while not got and time.monotonic() < deadline_s:
        channel.flush()
        got += other.receive()
    assert got == [{"text": text}]


@pytest.mark.parametrize("content", [b"nonsense\n", b"[1]\n", b"\xff\xfe\n", b"\n"])
def test_what_is_no_message_ends_the_connection(pair, content):
    channel, theirs = pair
    theirs.sendall(content)
    with pytest.raises(ConnectionError, match="no message"):
        receive_all(channel, 1)


def test_a_line_without_end_is_refused(pair, monkeypatch):
    """Mutation that must fail it: keeping whatever comes."""
    monkeypatch.setattr(wire, "MAX_LINE_BYTES", 1000)
    channel, theirs = pair
    theirs.sendall(b"x" * 2000)
    with pytest.raises(ConnectionError, match="a line of more than 1000 bytes"):
        receive_all(channel, 1)


def test_a_dead_peer_shows_at_the_next_read_and_never_at_a_send(pair):
    channel, theirs = pair
    theirs.close()
    for _ in range(3):
        channel.send({"type": "ping"})
    with pytest.raises(OSError):
        receive_all(channel, 1)


def test_the_token_is_for_its_owner_alone(tmp_path):
    """Mutation that must fail it: mode 0o644."""
    path = tmp_path / "token"
    assert make_token(path) == read_token(path) != make_token(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        make_token(tmp_path / "link")
    with pytest.raises(LaunchError, match="is the run folder shared"):
        read_token(tmp_path / "none")


def test_an_agent_with_the_token_is_let_in_and_one_without_is_not(fleet):
    """Mutation that must fail it: taking the proof as given."""
    stranger = Guest(fleet, "b", b"another token")
    guest = Guest(fleet, "a")
    events = follow(fleet, lambda seen: stranger.error and "a" in fleet.links)
    assert [(event.type, event.node) for event in events] == [("hello", "a")]
    assert list(fleet.links) == ["a"]
    assert guest.error is None


def test_an_agent_takes_orders_from_its_own_controller_only():
    """A stranger at the controller's old address doesn't know the token. Mutation that must fail it: believing it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        def pretend():
            connection, _ = server.accept()
            with connection:
                connection.sendall(b'{"challenge": "1"}\n')
                connection.recv(4096)
                connection.sendall(b'{"proof": "1"}\n')

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(ConnectionError, match="doesn't know this job's token"):
            connect("127.0.0.1", server.getsockname()[1], TOKEN, {"node": "a"})
        thread.join()


def test_strangers_who_say_nothing_keep_nobody_waiting(fleet):
    """Agents that hear nothing for a while end their ranks, so the controller may not wait for a stranger.

    Mutation that must fail it: greeting in `Fleet.events` itself.
    """
    guest = Guest(fleet, "a")
    follow(fleet, lambda seen: "a" in fleet.links)
    strangers = [socket.create_connection(("127.0.0.1", port_of(fleet))) for _ in range(8)]
    strangers[0].sendall(b"{")
    longest_s, until_s = 0.0, time.monotonic() + 2.5
    while time.monotonic() < until_s:
        began_s = time.monotonic()
        assert not list(fleet.events(0.1))
        longest_s = max(longest_s, time.monotonic() - began_s)
    for stranger in strangers:
        stranger.close()
    assert longest_s < 1.0
    assert guest.error is None
    assert list(fleet.links) == ["a"]


def test_a_slow_handshake_ends_at_its_limit(monkeypatch):
    """Byte after byte, each within the limit. Mutation that must fail it: a limit for each byte."""
    monkeypatch.setattr(wire, "HANDSHAKE_S", 0.5)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        def drip():
            for _ in range(20):
                time.sleep(0.1)
                try:
                    theirs.send(b"x")
                except OSError:
                    return

        thread, began_s = threading.Thread(target=drip), time.monotonic()
        thread.start()
        with pytest.raises(OSError):
            wire.accept(ours, TOKEN)
        assert time.monotonic() - began_s < 1.5
        thread.join()


def test_silence_is_a_loss_and_so_is_the_end(fleet):
    """Mutation that must fail it: counting only closed connections."""
    silent, ended = Guest(fleet, "silent"), Guest(fleet, "ended")
    follow(fleet, lambda seen: len(fleet.links) == 2)
    silent.is_silent = True
    ended.channel.close()
    lost = [event for event in follow(fleet, lambda seen: not fleet.links) if event.type == "lost"]
    reasons = {event.node: event.message["reason"] for event in lost}
    assert reasons["silent"] == "its agent said nothing for 1.5 s"
    assert reasons["ended"].startswith("its agent is gone")


def test_an_agent_that_comes_again_takes_the_place_of_the_old_one(fleet):
    old = Guest(fleet, "a")
    follow(fleet, lambda seen: "a" in fleet.links)
    before = fleet.links["a"]
    Guest(fleet, "a")
    events = follow(fleet, lambda seen: fleet.links.get("a") not in (None, before))
    assert [event.type for event in events] == ["lost", "hello"]
    old.join(3)
    assert isinstance(old.error, ConnectionError)


@given(st.integers(1, 64), st.integers(1, 16))
def test_cores_are_shared_evenly_and_never_twice(num_cores, num_ranks):
    """Mutation that must fail it: an overlap of one core."""
    cores = list(range(100, 100 + num_cores))
    shares = share_cores(cores, num_ranks)
    used = [core for share in shares for core in share]
    assert len(shares) == num_ranks
    assert len(set(used)) == len(used)
    assert set(used) <= set(cores)
    assert {len(share) for share in shares} == {num_cores // num_ranks}
    assert all(share == list(range(share[0], share[0] + len(share))) for share in shares if share)


def test_commands_of_agents(tmp_path):
    plan = LaunchPlan(run_name="a", run_folder=str(tmp_path), config="c.yaml", nodes=2, spares=1, ranks_per_node=2,
                      cluster=ClusterConfig(python="/opt/python", limits=LimitsConfig(node_s=5)))
    command = agent_command(plan, "host:1", Path("/run/token"))
    assert command == ["/opt/python", "-m", "launcher.supervise.agent", "--controller", "host:1", "--token-file",
                       "/run/token", "--silence", "5.0"]
    container = ContainerConfig(kind="apptainer", image="i.sif", mounts=("/data:/data",))
    inside = plan.model_copy(update={"cluster": plan.cluster.model_copy(update={"container": container})})
    assert agent_command(inside, "host:1", Path("/run/token"))[:5] == [
        "apptainer", "exec", "--bind", f"/data:/data,{tmp_path}", "i.sif",
    ]
    assert LocalTransport(plan).nodes == ("local0", "local1", "local2")


def test_a_link_of_an_array_is_requeued_alone():
    """Mutation that must fail it: the array's own id, which requeues every link."""
    assert slurm_job({"SLURM_JOB_ID": "9"}) == "9"
    link = {"SLURM_JOB_ID": "11", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "2"}
    assert slurm_job(link) == "9_2"
