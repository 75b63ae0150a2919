"""One HTML file that shows a run: facts, curves, baselines, text it generated, and the sessions it took."""

import json
from datetime import UTC, datetime
from pathlib import Path

import yaml

from megascale.errors import DataError
from megascale.observe import page
from megascale.observe.console import format_count, format_duration
from megascale.observe.curves import corpora_figure, figures_figure, loss_figure, metric_figure, series, to_inline_svg
from megascale.observe.goodput import derive_goodput, read_sessions, write_goodput
from megascale.observe.metrics import Goodput
from megascale.observe.redact import redact
from megascale.observe.run_files import (
    BASELINES_FILE,
    METRICS_FILE,
    REPORT_FILE,
    SAMPLE_FILE,
    SESSIONS_FILE,
    read_config,
    read_json,
    read_json_lines,
    read_metrics,
    write_atomically,
)
from megascale.observe.units import Units, units_of


def write_report(run_folder: Path, out: Path | None = None) -> Path:
    """Writes the report of a run, finished or still running; returns its path, by default `report.html` in the folder.

    `goodput.json` is brought up to date, unless the report goes elsewhere. It shows what the folder has: only
    `metrics.jsonl` must be there.

    Raises:
        DataError: the run has no metrics.
    """
    lines = list(read_metrics(run_folder))
    if not lines:
        raise DataError(f"{run_folder / METRICS_FILE} has no metrics to report; train the run for a step or more")
    fits = read_json(run_folder / BASELINES_FILE) or []
    sessions = list(read_json_lines(run_folder / SESSIONS_FILE))
    times = read_sessions(run_folder)
    goodput = derive_goodput(times) if times else None
    config = redact(read_config(run_folder))
    units = units_of(config)
    name = config.get("run", {}).get("name", run_folder.resolve().name)
    body = [
        page.heading(name, _subtitle(lines, sessions)),
        page.tiles(_first_numbers(lines, units)),
        page.section("Loss", to_inline_svg(loss_figure(lines, fits, units), "Loss curve")),
        page.section("Compared on the validation split", _comparison(lines, fits, units)),
        page.section("Optimization and speed", _small_curves(lines, units)),
        page.section("What the model tells of itself", _figures(lines)),
        page.section("What it writes", page.preformatted(_read_text(run_folder / SAMPLE_FILE))),
        page.section("Goodput", _goodput_table(goodput)),
        page.section("The run", page.table(_facts(config, sessions))),
        page.section("Sessions", _session_table(sessions)),
        page.section("Corpora", _corpus_table(lines, units)),
        page.section("Evaluations", _evaluation_table(lines)),
        page.folded("Config", page.preformatted(yaml.safe_dump(config, sort_keys=False) if config else "")),
    ]
    if goodput is not None and out is None:
        write_goodput(run_folder, goodput)
    path = out or run_folder / REPORT_FILE
    write_atomically(path, page.page(f"{name}: training report", body).encode())
    return path


def _subtitle(lines: list[dict], sessions: list[dict]) -> str:
    step = max(line["step"] for line in lines)
    ended = _time(max(line.get("unix_s") or 0.0 for line in lines))
    resumes = f", {len(sessions)} sessions" if len(sessions) > 1 else ""
    return f"megascale training report. {step} steps, last one {ended}{resumes}."


def _first_numbers(lines: list[dict], units: Units) -> list[tuple[str, str]]:
    numbers = []
    evaluations = [line for line in lines if line["kind"] == "eval" and line.get("loss") is not None]
    if evaluations:
        last = evaluations[-1]
        numbers.append((f"{last['loss']:.4f}", f"validation loss, {units.loss}"))
        if last.get("bits_per_byte") is not None:
            numbers.append((f"{last['bits_per_byte']:.4f}", "bits per byte"))
    _, losses = series(lines, "train", "loss")
    if losses:
        numbers.append((f"{losses[-1]:.4f}", "training loss"))
    steps = [line for line in lines if line["kind"] == "train"]
    if steps:
        numbers.append((format_count(steps[-1].get("tokens_seen") or 0), f"{units.labels} trained on"))
        _, speeds = series(lines, "train", "tokens_per_s")
        numbers.append((format_count(sorted(speeds)[len(speeds) // 2] if speeds else 0), f"{units.worked}/s, median"))
        if steps[-1].get("mfu_fraction") is not None:
            numbers.append((f"{100 * steps[-1]['mfu_fraction']:.1f}%", "MFU"))
    return numbers


def _comparison(lines: list[dict], fits: list[dict], units: Units) -> str:
    """Our last validation loss beside the n-gram models of the newest fit."""
    _, losses = series(lines, "eval", "loss")
    if not losses or not fits:
        return ""
    newest = max(fits, key=lambda fit: fit["step"])
    rows = [("this model", f"{losses[-1]:.4f}", "")]
    for name, loss in newest["losses"].items():
        rows.append((f"{name}, fitted on {format_count(newest['num_tokens'])} tokens", f"{loss:.4f}",
                     f"{losses[-1] - loss:+.4f}"))  # fmt: skip
    return page.table(rows, ("model", units.loss, "ours minus it"))


def _small_curves(lines: list[dict], units: Units) -> str:
    curves = [
        ("learning_rate", "learning rate", False),
        ("grad_norm", "gradient norm", True),
        ("tokens_per_s", f"{units.worked}/s", False),
        ("mfu_fraction", "MFU, fraction of peak", False),
        ("loss_scale", "fp16 loss scale", True),
    ]
    shown = [
        to_inline_svg(metric_figure(lines, name, label, is_log), label)
        for name, label, is_log in curves
        if _is_worth_a_curve(name, series(lines, "train", name)[1])
    ]
    return page.side_by_side(shown) if shown else ""


def _is_worth_a_curve(name: str, values: list[float]) -> bool:
    return bool(values) and (name != "loss_scale" or set(values) != {1.0})


def _facts(config: dict, sessions: list[dict]) -> list[tuple[str, str]]:
    """What was trained, on what, how and by which code; the newest session speaks for the code and the layout."""
    facts = [
        (name, ", ".join(f"{key} {_short(value)}" for key, value in config[name].items() if value is not None))
        for name in ("model", "data", "optimizer", "train", "precision", "parallel")
        if isinstance(config.get(name), dict)
    ]
    if sessions:
        last = sessions[-1]
        facts += [(name, _short(value)) for name, value in (last.get("facts") or {}).items()]
        facts.append(("ranks", _short(last.get("world_size"))))
        for name in ("layout", "versions"):
            facts.append((name, ", ".join(f"{key} {_short(value)}" for key, value in (last.get(name) or {}).items())))
        facts.append(("code", last.get("git_commit") or ""))
    return [(name, value) for name, value in facts if value]


def _session_table(sessions: list[dict]) -> str:
    rows = [
        (
            str(number),
            _time(session.get("unix_s") or 0.0),
            _beginning(session),
            _short(session.get("world_size")),
            (session.get("git_commit") or "")[:12],
        )
        for number, session in enumerate(sessions, 1)
    ]
    return page.table(rows, ("session", "time", "", "ranks", "code"))


def _beginning(session: dict) -> str:
    """How a session began, and what was changed or forked with it."""
    step, news = session.get("resumed_step"), session.get("news")
    return (f"resumed at step {step}" if step else "started") + (f"; {news}" if news else "")


def _goodput_table(goodput: Goodput | None) -> str:
    """Where the wall time went, as a bar and in numbers."""
    if goodput is None:
        return ""
    parts, wall_s = goodput.parts(), goodput.wall_s or 1.0
    rows = [(name, format_duration(spent_s), f"{spent_s / wall_s:.1%}") for name, spent_s in parts.items()]
    rows.append(("wall time", format_duration(goodput.wall_s), ""))
    steps = f"{goodput.steps_kept} steps count, {goodput.steps_redone} were lost; sessions: {goodput.num_sessions}"
    return page.stacked_bar(list(parts.items())) + page.table(rows, ("", "time", "share")) + page.paragraph(steps)


def _figures(lines: list[dict]) -> str:
    """A curve for each kind of figure, such as the load of experts, one line a part of the model."""
    names = sorted({name.rpartition("/")[2] for line in lines for name in line.get("figures") or {}})
    return "".join(to_inline_svg(figures_figure(lines, name), name) for name in names)


def _corpus_table(lines: list[dict], units: Units) -> str:
    """Of each corpus of a blend, what was read and its validation loss, as last logged."""
    tokens, losses = {}, {}
    for line in lines:
        tokens = line.get("ledger") or tokens
        losses = line.get("corpora") or losses
    names = sorted(tokens.keys() | losses.keys())
    if len(names) < 2:
        return ""
    total = sum(tokens.values()) or 1
    rows = []
    for name in names:
        read, found = tokens.get(name, 0), losses.get(name, {})
        rows.append((name, format_count(read), f"{read / total:.1%}", _number(found.get("loss"), ".4f"),
                     _number(found.get("bits_per_byte"), ".4f")))  # fmt: skip
    header = ("corpus", f"{units.read} read", "share", "validation loss", "bits/byte")
    curves = to_inline_svg(corpora_figure(lines, units), "Validation loss of each corpus") if losses else ""
    return page.table(rows, header) + curves


def _evaluation_table(lines: list[dict]) -> str:
    rows = [
        (
            str(line["step"]),
            _number(line.get("loss"), ".4f"),
            _number(line.get("perplexity"), ".2f"),
            _number(line.get("bits_per_byte"), ".4f"),
            format_duration(line.get("eval_s") or 0.0),
        )
        for line in lines
        if line["kind"] == "eval"
    ]
    table = page.table(rows[-200:], ("step", "loss", "perplexity", "bits/byte", "took"))
    return table if len(rows) <= 12 else page.folded(f"the last {min(len(rows), 200)} of {len(rows)}", table)


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _time(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _short(value: object) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)
