"""The commands that the README and the docs show are run, shrunk by options at their end."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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


def run_shown_commands(page: Path, folder: Path, options: dict[str, list[str]]) -> list[str]:
    """Runs the commands of a page in their order, with options added to some, and returns what they printed."""
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    printed = []
    for command in shown_commands(page):
        program, *arguments = shlex.split(command)
        assert program == "megascale"
        extra = next((more for name, more in options.items() if " ".join(arguments).startswith(name)), [])
        done = subprocess.run(
            [sys.executable, "-m", "launcher", *arguments, *extra], cwd=folder,
            env=command_environment(PYTHONPATH=str(REPOSITORY)), capture_output=True, text=True, check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        printed.append(done.stdout)
    return printed


def test_the_readme_commands_run_in_the_order_shown(tmp_path):
    assert len(run_shown_commands(REPOSITORY / "README.md", tmp_path, SMALLER)) >= 6
    report = (tmp_path / "runs/by-hand/report.html").read_text()
    assert "bigram" in report
    assert "<svg" in report


def test_the_commands_of_the_data_page_run_in_the_order_shown(tmp_path):
    shown_config = yaml.safe_load((REPOSITORY / "configs/run/tiny_cpu_blend.yaml").read_text())["data"]
    (block,) = yaml_blocks(REPOSITORY / "docs/data.md")
    assert yaml.safe_load(block)["data"] | {"folder": None} == shown_config
    offline = {"train": ["observe.wandb.mode=disabled"]}
    *_, check, leak, _, place, audit = run_shown_commands(REPOSITORY / "docs/data.md", tmp_path, offline)
    assert "steps 8 to 15" in check
    assert "no document sees another" in leak
    assert "corpus code" in place or "corpus web" in place
    assert "as the run says" in audit


def yaml_blocks(page: Path) -> list[str]:
    """The configs that a page shows."""
    return re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_configs_shown_in_the_readme_are_legal(tmp_path):
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    blend, wider = yaml_blocks(REPOSITORY / "README.md")
    (tmp_path / "configs/blend.yaml").write_text(f"base: quickstart.yaml\n{blend}")
    done = megascale("check", tmp_path / "configs/blend.yaml", "data.folder=null", "data.corpora.web.folder=/none")
    assert done.returncode == 0, done.stderr
    assert "is not built yet" in done.stdout
    (tmp_path / "configs/wider.yaml").write_text(wider)
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
