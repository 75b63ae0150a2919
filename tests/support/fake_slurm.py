"""Commands of SLURM that note how they were called and answer what a test wants."""

import json
import os
import stat
from pathlib import Path

SCRIPT = """#!/bin/bash
name=$(basename "$0")
printf '%s\\0' "$@" > "{folder}/$name.argv"
[ -e "{folder}/$name.stderr" ] && cat "{folder}/$name.stderr" >&2
cat "{folder}/$name.stdout"
exit "$(cat "{folder}/$name.rc")"
"""
SINFO = "debug*|up|1-00:00:00|4|gpu:2\nbig|up|infinite|2|gpu:h100:8(S:0-1)\nold|down|infinite|9|(null)\n"


class FakeSlurm:
    """sbatch, sinfo and squeue in a folder that goes first in PATH."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        for name, text in (("sbatch", "4321\n"), ("sinfo", SINFO), ("squeue", "")):
            path = folder / name
            path.write_text(SCRIPT.format(folder=folder))
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
            self.answer(name, text)
        self.answer("squeue", "", 1, "slurm_load_jobs error: Invalid job id specified\n")

    @property
    def path(self) -> str:
        """PATH with the commands first."""
        return f"{self.folder}:{os.environ['PATH']}"

    def answer(self, name: str, text: str, code: int = 0, error: str = "") -> None:
        """What a command says from now on."""
        for kind, content in (("stdout", text), ("stderr", error), ("rc", str(code))):
            (self.folder / f"{name}.{kind}").write_text(content)

    def arguments(self, name: str) -> list[str] | None:
        """What a command was last called with, None if it wasn't."""
        path = self.folder / f"{name}.argv"
        return path.read_text().split("\0")[:-1] if path.exists() else None


def write_launch_state(run_folder: Path, **values: object) -> None:
    """Writes `launch/state.json` of a launch that runs, apart from these values."""
    state = {"life": "77.0", "status": "running", "unix_s": 0.0, "host": "elsewhere", "pid": 1, "job_id": "77"} | values
    (run_folder / "launch").mkdir(parents=True, exist_ok=True)
    (run_folder / "launch" / "state.json").write_text(json.dumps(state))
