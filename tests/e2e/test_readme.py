"""The commands that the README and the docs show are run, shrunk by options at their end."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import REPOSITORY
from tests.support.tiny_run import command_environment, megascale

SMALLER = {
    "data build": ["--pattern", "asyncio/*.py", "--pattern", "email/*.py", "--validation-fraction", "0.2"],
    "train": ["train.max_steps=2", "model.num_layers=2", "model.d_model=96", "optimizer.warmup_steps=1",
              "checkpoint.interval_steps=1", "observe.wandb.mode=disabled"],
    "parity": ["model.num_layers=2", "model.d_model=96"],
    "generate": ["--max-tokens", "5"],
}


def shown_commands(path: Path) -> list[str]:
    """The lines of a page's bash blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_the_readme_commands_run_in_the_order_shown(tmp_path):
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    commands = shown_commands(REPOSITORY / "README.md")
    assert len(commands) >= 6
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "megascale"
        extra = next((options for name, options in SMALLER.items() if " ".join(arguments).startswith(name)), [])
        done = subprocess.run(
            [sys.executable, "-m", "launcher", *arguments, *extra], cwd=tmp_path,
            env=command_environment(PYTHONPATH=str(REPOSITORY)), capture_output=True, text=True, check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    report = (tmp_path / "runs/by-hand/report.html").read_text()
    assert "bigram" in report
    assert "<svg" in report


def test_the_config_shown_in_the_readme_is_legal(tmp_path):
    (block,) = re.findall(r"^```yaml\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    (tmp_path / "configs/wider.yaml").write_text(block)
    done = megascale("check", tmp_path / "configs/wider.yaml")
    assert done.returncode == 0, done.stderr
    assert "ZeRO-3" in done.stdout


def test_the_two_make_targets_exist():
    readme = (REPOSITORY / "README.md").read_text()
    for target in ("quickstart", "test"):
        assert f"make {target}" in readme
        subprocess.run(["make", "-n", target], cwd=REPOSITORY, check=True, capture_output=True)


def test_every_link_to_a_file_leads_somewhere():
    pages = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]
    assert len(pages) > 8
    for page in pages:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_run_config_is_legal(path):
    done = megascale("check", path, "data.folder=/nonexistent")
    assert done.returncode == 0, done.stderr
