"""The command line. Each command is a few lines: what it does lives elsewhere, imported only when it runs."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from data_tools.cli import app as data_app
from launcher.checkpoint import app as checkpoint_app
from launcher.launch_cli import app as launch_app
from megascale.errors import EXIT_DIFFERENT, MegascaleError, StopRequested

app = typer.Typer(
    help="Pretrain transformers on anything from a laptop's CPU to a GPU cluster, from one YAML file.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(launch_app, name="launch")

ConfigPath = Annotated[Path, typer.Argument(help="YAML file of the run.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the config, such as train.max_steps=300.")]
RunFolder = Annotated[Path, typer.Argument(help="Run folder, such as runs/quickstart.")]
NumRanks = Annotated[int | None, typer.Option("--nproc", help="Ranks on this machine. Default: its GPUs, else cores.")]


class ExportFormat(StrEnum):
    """Formats that a checkpoint can be exported to."""

    HF = "hf"
    ONNX = "onnx"


class ExportDtype(StrEnum):
    """Precisions that weights can be exported in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class ComputeDtype(StrEnum):
    """Precisions that a model can compute in."""

    FP32 = "fp32"
    BF16 = "bf16"


@app.command()
def train(
    config: ConfigPath, overrides: Overrides = None, nproc: NumRanks = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Set the folder's run aside, start at step 0.")] = False,
    fork: Annotated[str | None, typer.Option(
        metavar="RUN@STEP", help="Begin a new run with another run's checkpoint; without @STEP, its newest.")] = None,
    allow_change: Annotated[list[str] | None, typer.Option(
        metavar="KEY", help="Resume or fork though this key changes what is computed; may be repeated.")] = None,
) -> None:
    """Train a run, or resume it from its newest whole checkpoint."""
    from launcher.train import start_training
    from megascale.train.start_options import StartOptions

    start_training(config, overrides or [], nproc, StartOptions(fresh, fork, tuple(allow_change or ())))


@app.command()
def check(
    config: ConfigPath, overrides: Overrides = None,
    nproc: Annotated[int | None, typer.Option("--nproc", help="Ranks of the run, on any machines.")] = None,
    leak: Annotated[bool, typer.Option(
        "--leak", help="Start ranks here, and test that documents packed into a row don't see each other.")] = False,
) -> None:
    """Check a config and print what follows from it, without training anything."""
    if leak:
        from launcher.leak import check_leak

        check_leak(config, overrides or [], nproc)
    else:
        from launcher.check import print_check

        print_check(config, overrides or [], nproc)


@app.command()
def parity(
    config: ConfigPath,
    overrides: Overrides = None,
    layout: Annotated[list[str] | None, typer.Option(
        help="Twice: a layout such as dp1, or tp2,pp2,zero1,schedule=zero_bubble.")] = None,
    steps: Annotated[int, typer.Option(help="Steps to compare.")] = 3,
    tolerance: Annotated[float | None, typer.Option(help="Largest relative difference. Default: by precision.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Keep the traces in this new folder.")] = None,
    drift: Annotated[bool, typer.Option("--drift", help="Let each layout go on from its own state.")] = False,
) -> None:
    """Run the first steps under two layouts, and report the first step, phase and tensor where they differ."""
    from launcher.parity import compare_layouts

    if not compare_layouts(config, layout or [], steps, tolerance, keep, overrides or [], is_drift=drift):
        raise typer.Exit(EXIT_DIFFERENT)


@app.command("coord-check")
def coord_check(
    config: ConfigPath,
    overrides: Overrides = None,
    widths: Annotated[str, typer.Option(help="Values of model.d_model; the first is muP's base.")] = "64,128,256",
    steps: Annotated[int, typer.Option(min=1, help="Steps of each model.")] = 4,
    plot: Annotated[Path | None, typer.Option(help="Draw the sizes into this picture, such as check.png.")] = None,
) -> None:
    """Measure how activations grow with the width, with muP and without."""
    from launcher.coord_check import check_coordinates

    check_coordinates(config, overrides or [], widths, steps, plot)


@app.command()
def generate(
    run: RunFolder,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    prompts_file: Annotated[Path | None, typer.Option(help="Texts to continue together, a line each.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation, in tokens.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the likeliest tokens of this total chance.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Texts for each prompt.")] = 1,
    beams: Annotated[int, typer.Option(min=1, help="Search, this wide, instead of sampling.")] = 1,
    best: Annotated[int, typer.Option(min=1, help="Texts of a search for each prompt, the best ones.")] = 1,
    length_penalty: Annotated[float, typer.Option(help="Of a search: above 0 favours longer texts.")] = 1.0,
    step: Annotated[int | None, typer.Option(help="Checkpoint. Default: the newest whole one.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks that share the model on this machine.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline ranks that share it.")] = 1,
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Keep keys and values of earlier tokens.")] = True,
    dtype: Annotated[ComputeDtype, typer.Option(help="That the model computes in.")] = ComputeDtype.FP32,
    ema: Annotated[bool, typer.Option("--ema", help="Averaged weights instead of the last ones.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a text.")] = False,
) -> None:
    """Continue texts with a checkpoint of a run."""
    from launcher.generate import Drawing, generate_text

    drawing = Drawing(max_tokens, temperature, top_k, top_p, seed, samples, beams, best, length_penalty, cache, dtype)
    generate_text(run, prompts_file or [prompt], drawing, step=step, tp=tp, pp=pp, as_json=as_json, ema=ema)


@app.command("eval")
def evaluate(
    run: RunFolder,
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change to the config.")] = None,
    step: Annotated[int | None, typer.Option(help="Checkpoint. Default: the newest whole one.")] = None,
    nproc: Annotated[int, typer.Option("--nproc", help="Ranks on this machine.")] = 1,
    max_rows: Annotated[int | None, typer.Option(min=1, help="First rows of each split. Default: all.")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Averaged weights instead of the last ones.")] = False,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness instead, by comma.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First documents of each task. Default: all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Say how well a checkpoint does: loss, perplexity and hits on each validation split."""
    from launcher.evaluate import evaluate_run, evaluate_tasks

    if tasks is not None:
        evaluate_tasks(run, step, tasks, limit, ema=ema)
    else:
        evaluate_run(run, step, changes or [], nproc, ema=ema, max_rows=max_rows, as_json=as_json)


@app.command()
def export(
    run: RunFolder,
    form: Annotated[ExportFormat, typer.Option("--format", help="hf: a folder for transformers; onnx: a graph.")],
    step: Annotated[int | None, typer.Option(help="Checkpoint to export. Default: the newest whole one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to make. Default: RUN/export/FORMAT_step_N.")] = None,
    dtype: Annotated[ExportDtype, typer.Option(help="Of the weights.")] = ExportDtype.FLOAT32,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare logits with transformers'.")] = True,
    ema: Annotated[bool, typer.Option("--ema", help="Export the averaged weights (optimizer.ema_decay).")] = False,
) -> None:
    """Write a checkpoint as a folder that other tools load, and check that they compute the same."""
    from launcher.export import export_graph, export_run

    if form == ExportFormat.ONNX:
        export_graph(run, step, out, dtype.value, is_averaged=ema)
        return
    export_run(run, step, out, dtype.value, max_shard_size, is_checked=check, is_averaged=ema)


@app.command("import")
def import_(
    config: Annotated[Path | None, typer.Argument(help="YAML file of the run.")] = None,
    source: Annotated[str | None, typer.Argument(
        help="Weights: a Hugging Face folder, hf://ORG/NAME, a RUN or RUN@STEP.")] = None,
    overrides: Overrides = None,
    show: Annotated[str | None, typer.Option(
        "--show", metavar="SOURCE", help="Only print the model section of a source, to put into a config.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Set the folder's run aside.")] = False,
    allow_other_tokenizer: Annotated[bool, typer.Option(
        "--allow-other-tokenizer", help="Import though the corpora's tokens mean other texts there.")] = False,
) -> None:
    """Begin a run with given weights: `megascale train CONFIG` goes on from them, in any layout."""
    from launcher.import_weights import import_weights, show_section

    if show is not None:
        show_section(show)
    else:
        import_weights(config, source, overrides or [], is_fresh=fresh, allows_other_tokenizer=allow_other_tokenizer)


@app.command()
def status(
    run: RunFolder,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Say whether a run runs, waits, stopped, failed or finished, how far it is, and what to do next."""
    from launcher.status import print_status

    print_status(run, as_json=as_json)


@app.command()
def logs(
    run: RunFolder,
    rank: Annotated[int, typer.Option(min=0, help="Whose log.")] = 0,
    attempt: Annotated[str | None, typer.Option(metavar="LIFE/K", help="Which attempt. Default: the newest.")] = None,
    errors: Annotated[bool, typer.Option("--errors", help="The first error or hang report instead.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on, over restarts, until the run ends.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Last lines to show; 0 for all.")] = 100,
) -> None:
    """Show what a rank of a launched run has said, or what went wrong first."""
    from launcher.logs import show_errors, show_log

    if errors:
        show_errors(run, attempt)
    else:
        show_log(run, rank, attempt, lines, follows=follow)


@app.command()
def stop(
    run: RunFolder,
    save: Annotated[bool, typer.Option("--save", help="Save at the next step, and train on.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it has happened.")] = False,
    now: Annotated[bool, typer.Option("--now", help="Don't save: cancel the job, or end the local launch.")] = False,
) -> None:
    """Ask a run to save and stop."""
    from launcher.stop import stop_run

    stop_run(run, only_saves=save, waits=wait, at_once=now)


@app.command()
def report(run: RunFolder) -> None:
    """Write RUN/report.html: curves, tables, baselines and a sample in one file."""
    from megascale.observe.report import write_report

    print(f"wrote {write_report(run)}")


@app.command()
def baselines(run: RunFolder) -> None:
    """Fit n-gram models on the tokens that a run has read, for its report."""
    from launcher.baselines import fit_baselines

    fit_baselines(run)


@app.command()
def quickstart() -> None:
    """From the source of Python's standard library to a trained model and its report, in minutes on two cores."""
    from launcher.quickstart import run_quickstart

    run_quickstart()


@app.command()
def schema() -> None:
    """Print the JSON schema of a config file, for editors."""
    from megascale.config.dump import json_schema

    print(json_schema(), end="")


def main() -> None:
    """Runs the command line; a user's error is one message and an exit code, never a traceback."""
    try:
        app()
    except MegascaleError as error:
        print(f"{'' if isinstance(error, StopRequested) else 'error: '}{error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
