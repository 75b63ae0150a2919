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

TWO_LAYERS = ["model.num_layers=2", "model.d_model=96", "optimizer.warmup_steps=1", "checkpoint.interval_steps=1",
              "observe.wandb.mode=disabled"]
SMALLER = {
    "data build": ["--pattern", "asyncio/*.py", "--pattern", "email/*.py", "--validation-fraction", "0.2"],
    "train configs/quickstart.yaml run.folder=runs/forked": [
        "train.max_steps=3", "optimizer.horizon_steps=2", *TWO_LAYERS, "--fork", "runs/by-hand@1"],
    "launch local": ["train.max_steps=2", "optimizer.horizon_steps=2", *TWO_LAYERS],
    "train": ["train.max_steps=2", "optimizer.horizon_steps=2", *TWO_LAYERS],
    "parity": ["model.num_layers=2", "model.d_model=96"],
    "generate": ["--max-tokens", "5"],
    "eval": ["--max-rows", "8"],
}


def shown_commands(path: Path) -> list[str]:
    """The lines of a page's bash blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def run_shown_commands(
    page: Path, folder: Path, options: dict[str, list[str]], names: dict[str, str] | None = None
) -> list[str]:
    """Runs the commands of a page in their order, with options added to some, and returns what they printed.

    Args:
        names: what stands on the page -> what is there in its stead.
    """
    shutil.copytree(REPOSITORY / "configs", folder / "configs", dirs_exist_ok=True)
    printed = []
    for command in shown_commands(page):
        for shown, name in (names or {}).items():
            command = command.replace(shown, name)
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


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """A folder in which the commands of the README have run, and what they printed."""
    folder = tmp_path_factory.mktemp("readme")
    return folder, run_shown_commands(REPOSITORY / "README.md", folder, SMALLER)


def test_the_readme_commands_run_in_the_order_shown(by_hand):
    folder, printed = by_hand
    assert len(printed) >= 10
    report = (folder / "runs/by-hand/report.html").read_text()
    assert "bigram" in report
    assert "<svg" in report
    assert "forked from" in (folder / "runs/forked/sessions.jsonl").read_text()


def test_the_commands_of_the_checkpoint_pages_run_on_the_same_run(by_hand, tmp_path):
    """Lists, verifies, exports once more, and begins a run with what the README exported."""
    folder, _ = by_hand
    run = {"runs/quickstart": str(shutil.copytree(folder / "runs/by-hand", tmp_path / "runs/by-hand"))}
    listed, verified, _ = run_shown_commands(REPOSITORY / "docs/checkpoints.md", tmp_path, {}, run)
    assert "step" in listed
    assert "ok" in verified
    shutil.rmtree(tmp_path / "runs/by-hand/export")
    run_shown_commands(REPOSITORY / "docs/export.md", tmp_path, {}, run)
    (exported,) = (tmp_path / "runs/by-hand/export").iterdir()
    config = yaml.safe_load((tmp_path / "runs/by-hand/config.yaml").read_text())
    config["run"]["folder"], config["data"]["folder"] = str(tmp_path / "continued"), str(folder / "data/quickstart")
    (tmp_path / "continued.yaml").write_text(yaml.safe_dump(config))
    names = {"path/to/llama": str(exported), "configs/continued.yaml": str(tmp_path / "continued.yaml")}
    _, imported, trained = run_shown_commands(REPOSITORY / "docs/import.md", tmp_path, {}, names)
    assert "parameters of" in imported
    assert "at step 0" in trained


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
