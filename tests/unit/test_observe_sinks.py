"""The console, `metrics.jsonl` and the logger that feeds them: each step once, and no fault stops training."""

import errno
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megascale.config.observe import ObserveConfig, WandbConfig
from megascale.observe.build import build_logger
from megascale.observe.console import ConsoleSink, describe_eval, format_count, format_duration
from megascale.observe.jsonl import JsonlSink
from megascale.observe.logger import Logger
from megascale.observe.metrics import CorpusEval, TrainRecord, build_eval_record, merge_rows, to_json_line
from megascale.observe.run_files import METRICS_FILE, Session, append_session, read_json_lines, read_metrics


def train_record(step: int, loss: float = 0.1 + 0.2, **changes) -> TrainRecord:
    speed = {"step_s": 0.5, "tokens_per_s": 12_345.0, "mfu_fraction": 0.412, "eta_s": 192.0}
    values = {"learning_rate": 3e-4, "grad_norm": 1.5, "tokens_seen": 100 * step, **speed}
    values |= {"loss_scale": 1.0, "is_skipped": False, "unix_s": 1.0}
    return TrainRecord(step=step, loss=loss, **(values | changes))


def eval_record(step: int):
    return build_eval_record(step, math.log(16), num_tokens=300, num_bytes=1200, eval_s=2.0, unix_s=1.0)


def steps_of(folder) -> list[tuple[str, int]]:
    return [(line["kind"], line["step"]) for line in read_metrics(folder)]


def test_eval_record_derives_perplexity_and_bits_per_byte():
    record = eval_record(1)
    assert record.perplexity == pytest.approx(16)
    assert record.bits_per_byte == pytest.approx(4 * 300 / 1200)
    assert build_eval_record(1, 800.0, 1, None, 1.0, 1.0).perplexity == math.inf


def test_json_line_is_strict_and_exact():
    line = json.loads(to_json_line(train_record(1, grad_norm=math.nan, mfu_fraction=None)))
    assert line["loss"] == 0.1 + 0.2
    assert (line["kind"], line["grad_norm"], line["mfu_fraction"]) == ("train", None, None)


def test_merge_rows_gives_one_row_a_step():
    lines = [json.loads(to_json_line(record)) for record in (train_record(2), eval_record(2), train_record(1))]
    rows = merge_rows(lines)
    assert [step for step, _ in rows] == [1, 2]
    assert {"train/loss", "eval/loss", "_timestamp"} <= rows[1][1].keys()


def test_what_each_corpus_comes_to_is_logged_by_name():
    """Caught mutation: nested values left as they are, which W&B would flatten in a way of its own."""
    each = {"web": CorpusEval(2.0, 200, 1.5), "code": CorpusEval(math.nan, 100, None)}
    evaluated = build_eval_record(2, 3.0, 300, None, 2.0, 1.0, corpora=each)
    lines = [json.loads(to_json_line(record)) for record in (train_record(2, ledger={"web": 7, "code": 5}), evaluated)]
    assert lines[1]["corpora"]["code"] == {"loss": None, "num_tokens": 100, "bits_per_byte": None}
    ((_, row),) = merge_rows(lines)
    assert (row["train/tokens/web"], row["train/tokens/code"], row["eval/web/loss"]) == (7, 5, 2.0)
    assert "eval/code/loss" not in row
    assert not any(isinstance(value, dict) for value in row.values())
    assert describe_eval(evaluated).endswith("(web 2.0000, code nan)")


def test_resume_drops_what_the_checkpoint_does_not_cover(tmp_path):
    """Mutations caught: keeping later steps, keeping a torn line, a second line of a step."""
    sink = JsonlSink(tmp_path, resume_step=0)
    for step in (1, 2, 3):
        sink.log_train(train_record(step))
    sink.log_eval(eval_record(2))
    sink.close("stopped")
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write(to_json_line(train_record(2, loss=9.0)) + '{"kind": "train", "st')
    sink = JsonlSink(tmp_path, resume_step=2)
    sink.log_train(train_record(3, loss=7.0))
    assert steps_of(tmp_path) == [("train", 1), ("train", 2), ("eval", 2), ("train", 3)]
    losses = [line["loss"] for line in read_metrics(tmp_path) if line["kind"] == "train"]
    assert losses == [0.1 + 0.2, 9.0, 7.0]
    assert (tmp_path / METRICS_FILE).read_bytes().endswith(b"}\n")


def test_resume_leaves_a_whole_file_untouched(tmp_path):
    sink = JsonlSink(tmp_path, resume_step=0)
    sink.log_train(train_record(1))
    sink.close("stopped")
    before = (tmp_path / METRICS_FILE).stat()
    JsonlSink(tmp_path, resume_step=1).close("finished")
    after = (tmp_path / METRICS_FILE).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_full_disk_tears_no_line_and_loses_none(tmp_path, monkeypatch):
    """Mutation caught: without the cut back to the last whole line, half a line stays in the file."""
    sink, warnings = JsonlSink(tmp_path, resume_step=0), []
    logger, real_write = Logger([sink], warnings.append), os.pwrite

    def write_half(descriptor, content, offset):
        real_write(descriptor, content[: len(content) // 2], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    logger.log_train(train_record(1))
    monkeypatch.setattr(os, "pwrite", write_half)
    logger.log_train(train_record(2))
    logger.log_train(train_record(3))
    assert steps_of(tmp_path) == [("train", 1)]
    assert (tmp_path / METRICS_FILE).read_bytes().endswith(b"}\n")
    monkeypatch.undo()
    logger.log_train(train_record(4))
    assert steps_of(tmp_path) == [("train", step) for step in (1, 2, 3, 4)]
    assert len(warnings) == 1
    assert "No space left" in warnings[0]


class BrokenSink:
    """A sink whose every call fails."""

    def fail(self, *_):
        raise ConnectionError("gone")

    log_train = log_eval = log_goodput = commit = close = fail


def test_a_failing_sink_is_reported_once_and_harms_no_other(tmp_path):
    warnings = []
    logger = Logger([BrokenSink(), JsonlSink(tmp_path, 0)], warnings.append)
    for step in (1, 2):
        logger.log_train(train_record(step))
        logger.log_eval(eval_record(step))
        logger.commit(step)
    logger.close("finished")
    assert len(steps_of(tmp_path)) == 4
    assert warnings == ["BrokenSink failed: ConnectionError('gone'); training goes on, and so do its other logs."]


def test_other_ranks_log_nothing(tmp_path):
    logger = build_logger(ObserveConfig(), 1, tmp_path, "id", 0, 10, {})
    logger.log_train(train_record(1))
    logger.close("finished")
    assert not list(tmp_path.iterdir())


def test_plain_output_is_one_line_a_record():
    out = io.StringIO()
    sink = ConsoleSink(10, Console(file=out, width=40))
    sink.log_train(train_record(3))
    sink.log_eval(eval_record(3))
    sink.close("finished")
    train_line, eval_line = out.getvalue().splitlines()
    assert train_line == "step 3/10  loss 0.3000  lr 3.00e-04  grad 1.500  12.3k tok/s  MFU 41.2%  ETA 3m12s"
    assert eval_line.startswith("step 3/10  validation loss 2.7726  perplexity 16.00  1.0000 bits/byte")


def test_unknown_mfu_is_not_shown():
    out = io.StringIO()
    ConsoleSink(10, Console(file=out)).log_train(train_record(1, mfu_fraction=None, eta_s=None, is_skipped=True))
    assert "MFU" not in out.getvalue()
    assert "skipped" in out.getvalue()


def test_terminal_shows_the_numbers_beside_the_bar():
    out = io.StringIO()
    sink = ConsoleSink(10, Console(file=out, force_terminal=True, width=120))
    sink.log_train(train_record(3))
    sink.log_eval(eval_record(3))
    sink.close("finished")
    assert "3/10" in out.getvalue()
    assert "12.3k tok/s" in out.getvalue()
    assert "validation loss" in out.getvalue()


@pytest.mark.parametrize("how", ["pipe", "closed"])
def test_dead_standard_output_ends_nothing(tmp_path, how):
    """`train | head -1`, and stdout closed: the run goes on to its exit code 0.

    Mutations caught: rich's own handler exits with 1; without `_give_up` the flush at exit makes it 120.
    """
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, '.')\n"
        "from tests.unit.test_observe_sinks import *\n"
        "if sys.argv[2] == 'closed': sys.stdout.close()\n"
        "config = ObserveConfig(wandb=WandbConfig(mode='disabled'))\n"
        "logger = build_logger(config, 0, Path(sys.argv[1]), 'id', 0, 50, {})\n"
        "for step in range(1, 51): logger.log_train(train_record(step))\n"
        "logger.close('finished'); Path(sys.argv[1], 'done').touch()\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), how],
        cwd=Path(__file__).parents[2],
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "done").exists()
    assert len(steps_of(tmp_path)) == 50


def test_disabled_wandb_builds_no_sink(tmp_path):
    logger = build_logger(ObserveConfig(wandb=WandbConfig(mode="disabled")), 0, tmp_path, "id", 0, 10, {})
    logger.close("finished")
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_sessions_survive_a_torn_line(tmp_path):
    append_session(tmp_path, Session(1.0, 0, 2))
    with open(tmp_path / "sessions.jsonl", "a") as file:
        file.write('{"unix_s": 2.0, "resu')
    append_session(tmp_path, Session(3.0, 40, 2, {"dp": 2}))
    assert [line["resumed_step"] for line in read_json_lines(tmp_path / "sessions.jsonl")] == [0, 40]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (192, "3m12s"), (7500, "2h05m"), (273600, "3d04h")]
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (950, "950"), (999.7, "1k"), (12345, "12.3k"), (999_600, "1M"), (4.56e6, "4.56M")]
)
def test_format_count(count, text):
    assert format_count(count) == text
