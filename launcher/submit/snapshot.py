"""What a launch keeps of the moment: plan, resolved config, code, names of variables. No secret is among it."""

import json
import os
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from launcher.submit.plan import PLAN_FILE, LaunchPlan, dump_plan
from launcher.supervise.records import LAUNCH_FOLDER
from megascale.config.cluster import SECRET_NAME
from megascale.config.dump import resolved_values, to_yaml
from megascale.config.load import load_config
from megascale.config.schema import RunConfig
from megascale.errors import ConfigError, LaunchError, redact
from megascale.observe.run_files import read_json, write_atomically

CONFIG_FILE, CODE_FILE, DIFF_FILE, ENVIRONMENT_FILE, JOB_FILE, SCRIPT_FILE = (
    "config.yaml", "code.json", "code.diff", "environment.json", "job.json", "job.sbatch",
)
PACKAGES = ("megascale", "torch", "deepspeed", "numpy", "wandb", "webdataset", "safetensors", "tokenizers")
MAX_DIFF_BYTES = 1 << 20
MIN_SECRET_CHARACTERS = 8
"""Shorter values, such as `1` or `false`, stand in files by chance."""
GIT_S = 20
NO_SECRET_FILES = tuple(f":(exclude,icase,glob)**/{name}" for name in (
    ".env*", "*.pem", "*key*", "*secret*", "*credential*", "*.p12", "*.pfx", ".netrc", "*passw*"))
"""Files whose changes are not kept, as git names them."""


def name_submission(now_s: float | None = None) -> str:
    """A new name for a launch: local time and four random digits, so that names sort by time."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(now_s))}-{secrets.token_hex(2)}"


def check_no_secrets(text: str, source: str, environment: Mapping[str, str]) -> None:
    """Refuses a file to be kept that holds the value of a variable which is named like a secret.

    Raises:
        ConfigError: it holds one. The message has the name of the variable, not the value.
    """
    for name, value in _secrets_in(environment).items():
        if value in text:
            raise ConfigError(f"{source}: holds the value of ${name}, and it would be copied into the run folder and"
                              " logs; take it out: ranks read the variable themselves")


def write_snapshot(
    launch_folder: Path, plan: LaunchPlan, config: RunConfig, code_folder: Path, environment: Mapping[str, str]
) -> LaunchPlan:
    """Writes all but the job's script and id into a new folder.

    Returns:
        The plan as written: its config is the snapshot.

    Raises:
        LaunchError: the folder can't be written.
    """
    snapshot = launch_folder / CONFIG_FILE
    plan = plan.model_copy(update={"config": str(snapshot)})
    commit, diff, code = describe_code(code_folder, environment)
    files = {
        CONFIG_FILE: to_yaml(resolved_values(config)),
        PLAN_FILE: dump_plan(plan),
        CODE_FILE: _to_json({"commit": commit, **code, "versions": read_versions()}),
        ENVIRONMENT_FILE: _to_json({
            "python": sys.version, "executable": sys.executable, "platform": platform.platform(),
            "working_folder": str(Path.cwd()), "variables": sorted(environment),
        }),
    } | ({DIFF_FILE: diff} if diff else {})
    try:
        launch_folder.mkdir(parents=True)
        for name, text in files.items():
            write_atomically(launch_folder / name, text.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise LaunchError(f"{launch_folder}: can't be written: {error.strerror}") from None
    if resolved_values(load_config(snapshot)) != resolved_values(config):
        raise LaunchError(f"{snapshot}: reads back as another config than was written; this is a bug, please report it")
    return plan


def write_job(launch_folder: Path, job_id: str, command: list[str]) -> None:
    """Notes which job the launch became."""
    values = {"job_id": job_id, "submitted_s": time.time(), "command": command}
    write_atomically(launch_folder / JOB_FILE, _to_json(values).encode())


def newest_job(run_folder: Path) -> str:
    """Id of the job that was submitted last for a run, empty when none was."""
    for path in sorted((run_folder / LAUNCH_FOLDER).glob(f"*/{JOB_FILE}"), reverse=True):
        values = read_json(path)
        if isinstance(values, dict):
            return str(values.get("job_id", ""))
    return ""


def describe_code(folder: Path, environment: Mapping[str, str]) -> tuple[str | None, str, dict]:
    """Commit of the checkout, its changes against it, and facts for `code.json`.

    Returns:
        (commit, diff, facts); (None, "", {"dirty": None}) where the code doesn't run from a checkout.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None or Path(top.strip()).resolve() != folder:  # else the repository of somebody else around a .venv
        return None, "", {"dirty": None}
    commit = (_git(folder, "rev-parse", "HEAD") or "").strip() or None
    status = _git(folder, "status", "--porcelain", "--untracked-files=normal") or ""
    options = ("--no-ext-diff", "--no-textconv", "--no-color")
    diff = _git(folder, "diff", *options, "HEAD", "--", ".", *NO_SECRET_FILES) or ""
    kept = set((_git(folder, "diff", "--name-only", "HEAD", "--", ".", *NO_SECRET_FILES) or "").splitlines())
    changed = set((_git(folder, "diff", "--name-only", "HEAD") or "").splitlines())
    raw = hide_secrets(diff, environment).encode("utf-8", "surrogateescape")
    facts = {
        "dirty": bool(status.strip()),
        "untracked": [line[3:] for line in status.splitlines() if line.startswith("??")],
        "left_out_of_diff": sorted(changed - kept),
        "diff_cut_at_bytes": MAX_DIFF_BYTES if len(raw) > MAX_DIFF_BYTES else None,
    }
    return commit, raw[:MAX_DIFF_BYTES].decode("utf-8", "surrogateescape"), facts


def hide_secrets(text: str, environment: Mapping[str, str]) -> str:
    """A text without the values of variables that are named like secrets, and without passwords in urls."""
    for name, value in _secrets_in(environment).items():
        text = text.replace(value, f"<{name}>")
    return redact(text)


def read_versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes, of those that are installed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _secrets_in(environment: Mapping[str, str]) -> dict[str, str]:
    found = {name: value for name, value in environment.items()
             if SECRET_NAME.search(name) and len(value) >= MIN_SECRET_CHARACTERS and not Path(value).exists()}
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))  # one may be a part of another


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of git, None where it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, timeout=GIT_S, check=False,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}, stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "surrogateescape") if done.returncode == 0 else None


def _to_json(values: dict) -> str:
    return json.dumps(values, indent=2) + "\n"
