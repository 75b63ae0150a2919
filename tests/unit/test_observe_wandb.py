"""W&B across crashes and without a network: every step once, nothing held up.

The sessions run in processes of their own, through the real wandb package. A small server on localhost stands in for
W&B's: it keeps the history rows that wandb uploads, live or by `wandb sync`, which is the package's own reader of its
offline files.
"""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megascale.config.observe import WandbConfig
from megascale.observe.redact import REDACTED, redact
from megascale.observe.wandb_files import history_steps, mend, session_files
from megascale.observe.wandb_sink import resolve_mode

RUN_ID = "0123456789abcdef"

SESSION = """
import os, sys, time
from pathlib import Path
import megascale.observe.wandb_sink
from megascale.config.observe import ObserveConfig, WandbConfig
from megascale.observe.build import build_logger
from megascale.observe.metrics import TrainRecord, build_eval_record

folder, run_id, mode, first, last, commits, end = sys.argv[1:]
megascale.observe.wandb_sink.INIT_TIMEOUT_S = 3.0
first, last, commits = int(first), int(last), [int(c) for c in commits.split(",") if c]
config = ObserveConfig(wandb=WandbConfig(mode=mode))
logger = build_logger(config, 0, Path(folder), run_id, first, 100, {"api_key": "hush", "seed": 1},
                      warn=lambda text: print("WARN", text, flush=True))
began = time.perf_counter()
for step in range(first + 1, last + 1):
    logger.log_train(TrainRecord(step, 1 / step, 1e-3, 1.0, 8 * step, 0.1, 80.0, None, None, 1.0, False, time.time()))
    if step % 5 == 0:
        logger.log_eval(build_eval_record(step, 2 / step, 8, 24, 0.1, time.time()))
    if step in commits:
        logger.commit(step)
print("LOGGED", time.perf_counter() - began, flush=True)
if end == "kill":
    time.sleep(1.0)
    os.kill(os.getpid(), 9)
if end == "service":
    time.sleep(1.0)
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        for child in (task / "children").read_text().split():
            os.kill(int(child), 15)
    time.sleep(1.0)
    logger.commit(last)
began = time.perf_counter()
logger.close("finished")
print("CLOSED", time.perf_counter() - began, flush=True)
"""


class FakeWandb:
    """The four answers of W&B's server that wandb needs, and the history rows that it was sent, by run id."""

    def __init__(self):
        self.rows: dict[str, list[dict]] = {}
        self.configs: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def steps(self) -> list[int]:
        return [row["_step"] for row in self.rows.get(RUN_ID, [])]

    def answer(self, query: str, variables: dict) -> dict:
        operation = re.search(r"(?:query|mutation)\s+(\w+)", query)[1]
        name, entity = variables.get("name"), {"id": "e", "name": "ours"}
        project = {"id": "p", "name": "megascale", "entity": entity}
        if operation == "UpsertBucket":
            self.configs.append(variables.get("config") or "")
            rows = self.rows.setdefault(name, [])
            bucket = {"id": "r", "name": name, "displayName": name, "project": project, "historyLineCount": len(rows)}
            return {"upsertBucket": {"bucket": bucket, "inserted": not rows}}
        if operation == "RunResumeStatus":
            rows, bucket = self.rows.get(name), None
            if rows is not None:
                counts = {"historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0}
                tails = {"historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]), "eventsTail": "[]"}
                texts = {"summaryMetrics": "{}", "config": "{}", "wandbConfig": '{"t": 1}', "tags": []}
                bucket = {"id": "r", "name": name, "displayName": name, **counts, **tails, **texts}
            return {"model": {**project, "bucket": bucket}}
        if operation == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}

    def _handler(fake):  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                answer = {}
                if self.path == "/graphql":
                    request = json.loads(body)
                    answer = {"data": fake.answer(request["query"], request.get("variables") or {})}
                elif self.path.endswith("/file_stream"):
                    history = json.loads(body).get("files", {}).get("wandb-history.jsonl")
                    if history:
                        rows = fake.rows.setdefault(self.path.split("/")[-2], [])
                        end = history["offset"] + len(history["content"])
                        rows[history["offset"] : end] = [json.loads(line) for line in history["content"]]
                content = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_PUT = do_GET = do_POST

            def log_message(self, *_):
                pass

        return Handler


@pytest.fixture
def server():
    fake = FakeWandb()
    yield fake
    fake.close()


def environment(url: str | None = None, key: bool = True) -> dict[str, str]:
    """The environment of a session, without what the machine's own W&B account puts there."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_") and name != "NETRC"}
    clean |= {"OMP_NUM_THREADS": "1", "HOME": "/nonexistent", "WANDB_ERROR_REPORTING": "false"}
    if url:
        clean |= {"WANDB_BASE_URL": url}
    return clean | ({"WANDB_API_KEY": "0" * 40} if key else {})


def session(folder: Path, mode: str, first: int, last: int, commits: str, end: str, env: dict) -> str:
    """Runs a session from step `first` to `last`, with checkpoints at `commits`; returns what it printed."""
    command = [sys.executable, "-c", SESSION, str(folder), RUN_ID, mode, str(first), str(last), commits, end]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == (-9 if end == "kill" else 0), done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


def sync(folder: Path, server: FakeWandb) -> None:
    command = [sys.executable, "-m", "wandb", "sync", str(folder / "wandb")]
    done = subprocess.run(command, env=environment(server.url), cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Failed" not in done.stderr, done.stderr


def seconds(output: str, label: str) -> float:
    return float(re.search(rf"{label} (\S+)", output)[1])


def test_offline_shows_every_step_once_across_a_crash_and_a_resume(tmp_path, server):
    """Killed at step 17 with a checkpoint of step 10, then resumed: `wandb sync` uploads steps 1..30, each once.

    Mutations caught: no catch-up (1..10 missing: the killed service never flushed them), a session file without rows
    left in the way of `wandb sync`, no redaction of the config.
    """
    session(tmp_path, "offline", 0, 17, "5,10", "kill", environment(key=False))
    session(tmp_path, "offline", 10, 30, "20,30", "finish", environment(key=False))
    sync(tmp_path, server)
    assert server.steps() == list(range(1, 31))
    rows = server.rows[RUN_ID]
    assert rows[9]["eval/loss"] == 2 / 10
    assert rows[9]["train/loss"] == 1 / 10
    config = " ".join(server.configs)
    assert "seed" in config
    assert "hush" not in config


def test_offline_file_of_a_killed_session_is_mended(tmp_path, server):
    """A torn file keeps its whole rows and syncs, and the next session adds the rest.

    Mutations caught: without `mend`, sync fails and leaves steps out; sending what the file has makes double steps.
    """
    session(tmp_path, "offline", 0, 20, "20", "finish", environment(key=False))
    (first,) = session_files(tmp_path, RUN_ID)
    content = first.read_bytes()
    first.write_bytes(content[: content.rfind(b'"train/loss"'[1:-1]) + 4])
    assert history_steps(first.read_bytes())[-1] < 20
    session(tmp_path, "offline", 20, 30, "30", "finish", environment(key=False))
    sync(tmp_path, server)
    assert server.steps() == list(range(1, 31))


def test_service_stopped_by_a_signal_is_reported_once_and_made_up_for(tmp_path, server):
    """As when a cluster signals every process of a job: training ends well, and the next session sends the rest."""
    output = session(tmp_path, "offline", 0, 20, "10", "service", environment(key=False))
    assert output.count("WARN") == 1
    session(tmp_path, "offline", 20, 25, "25", "finish", environment(key=False))
    sync(tmp_path, server)
    assert server.steps() == list(range(1, 26))


def test_online_run_continues_without_double_steps(tmp_path, server):
    """Live through the server; the second session falls back to a checkpoint older than the server's last step."""
    env = environment(server.url)
    assert "WARN" not in session(tmp_path, "auto", 0, 20, "10,20", "finish", env)
    assert server.steps() == list(range(1, 21))
    assert "WARN" not in session(tmp_path, "auto", 15, 30, "30", "finish", env)
    assert server.steps() == list(range(1, 31))


def test_silent_server_leaves_files_and_time_alone(tmp_path, server):
    """A server that accepts connections and never answers: training isn't held up, and the steps sync later.

    Mutations caught: wandb.init in the training thread; no offline session in its place; an online session that
    overtakes the steps that wait for `wandb sync`.
    """
    with socket.create_server(("127.0.0.1", 0)) as silent:
        env = environment(f"http://127.0.0.1:{silent.getsockname()[1]}")
        output = session(tmp_path, "online", 0, 20, "10,20", "finish", env)
    assert seconds(output, "LOGGED") < 1.0
    assert seconds(output, "CLOSED") < 20.0
    assert output.count("WARN") == 1
    online = session(tmp_path, "online", 20, 30, "30", "finish", environment(server.url))
    assert "wandb sync" in online
    sync(tmp_path, server)
    assert server.steps() == list(range(1, 31))


def test_nothing_is_sent_beyond_a_checkpoint(tmp_path):
    """Steps that no checkpoint covers may be taken back; mutation caught: sending what is logged."""
    session(tmp_path, "offline", 0, 5, "", "finish", environment(key=False))
    assert not session_files(tmp_path, RUN_ID)
    session(tmp_path, "offline", 0, 17, "5,10", "finish", environment(key=False))
    (path,) = session_files(tmp_path, RUN_ID)
    assert history_steps(path.read_bytes()) == list(range(1, 11))


@pytest.mark.parametrize(
    ("mode", "variables", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "disabled"),
        ("online", {}, "offline"),
        ("online", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "online"),
        ("disabled", {"WANDB_API_KEY": "k"}, "disabled"),
    ],
)
def test_mode(monkeypatch, tmp_path, mode, variables, expected):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert resolve_mode(WandbConfig(mode=mode)) == expected


def test_key_in_netrc_is_found(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert resolve_mode(WandbConfig()) == "online"


def test_mend_leaves_foreign_and_empty_files_alone(tmp_path):
    path = tmp_path / "run.wandb"
    for content in (b"", b":W&", b"something else", b":W&B\xe1\xbe\x00"):
        path.write_bytes(content)
        assert mend(path) == -1
        assert path.read_bytes() == content


def test_redact_takes_secrets_and_leaves_the_rest():
    config = {
        "wandb_api_key": "a", "hf_token": "b", "store": {"password": "c", "url": "https://me:pw@host/x"},
        "eos_token": "<eos>", "global_batch_tokens": 4, "tokenizer": "bpe", "list": [{"client_secret": "d"}],
    }  # fmt: skip
    assert redact(config) == {
        "wandb_api_key": REDACTED, "hf_token": REDACTED,
        "store": {"password": REDACTED, "url": f"https://{REDACTED}@host/x"},
        "eos_token": "<eos>", "global_batch_tokens": 4, "tokenizer": "bpe", "list": [{"client_secret": REDACTED}],
    }  # fmt: skip
