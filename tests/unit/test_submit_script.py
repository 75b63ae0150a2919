"""The job's script: what stands in it, and that no name can change what it does."""

import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.submit.plan import LaunchPlan
from launcher.submit.script import JobOptions, read_template, render_script, sbatch_command
from megascale.config.cluster import ClusterConfig, ContainerConfig
from megascale.errors import LaunchError

GOLDEN = Path(__file__).with_name("test_submit_golden.sbatch")
HOSTILE = st.text(st.sampled_from(list("ab '\"$()`;&|<>*?[]{}!#~%\\=ü日-:.")), min_size=1, max_size=24).filter(
    lambda name: name.strip(".") != "")


def make_plan(cluster: ClusterConfig, run_folder: str = "/runs/r", **values) -> LaunchPlan:
    return LaunchPlan(run_name="r", run_folder=run_folder, config="/runs/r/c.yaml", nodes=2, ranks_per_node=2,
                      cluster=cluster, **values)


def render(cluster: ClusterConfig, options: JobOptions | None = None, **values) -> str:
    return render_script(make_plan(cluster, **values), Path("/runs/r/launch/x/plan.json"), options or JobOptions("r"),
                         read_template())


def test_the_script_of_everything_is_the_golden_one(monkeypatch):
    """Read it when it changes: this is what users get. To renew it: write `script` to the file."""
    monkeypatch.setattr("launcher.submit.script.CODE_FOLDER", Path("/home/me/my code"))
    cluster = ClusterConfig(
        name="c", gpus_per_node=8, cpus_per_node=96, memory_per_node="480G", partition="gpu", account="a", qos="high",
        gpu_type="h100", modules=("cuda/12.4",), setup=("ulimit -n 65536",), python="/opt/my python/bin/python",
    )
    script = render(cluster, JobOptions("r", "1-12", ("node3",), 3), spares=1, is_chained=True)
    assert script == GOLDEN.read_text()


def test_what_was_not_asked_for_is_left_out_with_its_comment():
    """Mutation seen caught: paragraphs without a value kept, which leaves `#SBATCH --partition=`."""
    script = render(ClusterConfig(is_exclusive=False, gpu_request="none", gpus_per_node=4))
    for word in ("partition", "account", "qos", "gpus", "gres", "mem", "exclusive", "time=", "array", "no-kill",
                 "chain", "module", "{{"):
        assert word not in script, word
    assert "#SBATCH --requeue\n" in script
    assert "#SBATCH --no-requeue\n" in render(ClusterConfig(gpus_per_node=1), is_requeued=False)


@pytest.mark.parametrize(("cluster", "line"), [
    (ClusterConfig(gpus_per_node=8), "#SBATCH --gpus-per-node=8"),
    (ClusterConfig(gpus_per_node=8, gpu_type="h100", gpu_request="gres"), "#SBATCH --gres=gpu:h100:8"),
    (ClusterConfig(gpus_per_node=8, signal="USR2", grace_s=300), "#SBATCH --signal=B:USR2@300"),
])
def test_requests_in_the_words_of_the_cluster(cluster, line):
    assert line in render(cluster).splitlines()


def test_options_stand_before_the_first_command_and_are_plain():
    """sbatch passes over options after a command in silence, and takes quotes in them apart in its own way."""
    cluster = ClusterConfig(gpus_per_node=8, partition="a,b")
    lines = render(cluster, JobOptions("r", "1:00:00", (), 2), spares=2).splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert len(options) >= 10
    assert max(options) < first
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=[A-Za-z0-9_.,:@%+-]+)?", lines[i]) for i in options)


@settings(max_examples=40, deadline=None)
@given(folder=HOSTILE, python=HOSTILE, module=HOSTILE)
def test_hostile_names_arrive_as_they_are(folder, python, module):
    """The script, run with a Python that notes its arguments, in a folder where nothing else may appear.

    Mutations seen caught: PLAN, CODE or a module's name without shlex.quote; "$PLAN" without quotes.
    """
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        stub = place / python / "python"
        stub.parent.mkdir()
        stub.write_text("#!/bin/bash\nprintf '%s\\0' \"$@\" \"$PYTHONPATH\" \"$LOADED\"\ntrap\n")
        stub.chmod(0o755)
        plan_path = place / folder / "plan.json"
        cluster = ClusterConfig(ranks_per_node=1, python=str(stub), modules=(module,))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("launcher.submit.script.CODE_FOLDER", place / "code of" / folder)
            script = render_script(make_plan(cluster, str(place / folder)), plan_path, JobOptions("r"), read_template())
        (place / "job.sbatch").write_text(script)
        before = sorted(place.iterdir())
        environment = {"PATH": os.environ["PATH"], "BASH_FUNC_module%%": '() { LOADED="$*"; export LOADED; }'}
        subprocess.run(["bash", "-n", place / "job.sbatch"], check=True)
        done = subprocess.run(
            ["bash", place / "job.sbatch"], env=environment, cwd=place, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        *words, rest = done.stdout.decode().split("\0")
        assert words == ["-m", "launcher.supervise.job", str(plan_path), str(place / "code of" / folder),
                         f"load {module}"]
        assert "trap -- '' SIGUSR1" in rest, "an early warning would end the job"
        assert sorted(place.iterdir()) == before


def test_a_value_with_braces_is_not_filled_in_again():
    """Mutation seen caught: one replacement after the other instead of one pass over the template."""
    cluster = ClusterConfig(ranks_per_node=1, python="/opt/{{PLAN}}/python")
    assert "PYTHON='/opt/{{PLAN}}/python'" in render(cluster)


def test_the_controller_runs_outside_of_a_container():
    """Inside there is no srun. Mutation seen caught: the cluster's Python taken all the same."""
    cluster = ClusterConfig(ranks_per_node=1, python="/inside/python",
                            container=ContainerConfig(kind="pyxis", image="i"))
    assert "/inside/python" not in render(cluster)


@given(folder=HOSTILE, name=HOSTILE)
def test_the_command_is_a_list_and_percent_signs_are_doubled(folder, name):
    """SLURM expands %j and the like in --output. Mutation seen caught: the folder's % left single."""
    plan = make_plan(ClusterConfig(ranks_per_node=1, sbatch=("--comment=a b",)), f"/runs/{folder}")
    command = sbatch_command(plan, JobOptions(name, excluded=("n1", "n[3-5]")), "job.sbatch", Path("/work here"))
    output = next(word for word in command if word.startswith("--output=")).removeprefix("--output=")
    assert output.replace("%%", "").count("%") == 1  # %j
    assert output.removesuffix("/slurm_%j.log").replace("%%", "%") == f"{plan.folder}/logs"
    assert command[0] == "sbatch"
    assert command[-3:] == ["--exclude=n1,n[3-5]", "--comment=a b", "job.sbatch"]
    assert f"--job-name={name}" in command
    assert "--chdir=/work here" in command
    assert shlex.split(shlex.join(command)) == command


@pytest.mark.parametrize(("cluster", "options", "message"), [
    (ClusterConfig(ranks_per_node=1, partition="a\tb"), JobOptions("r"), "--partition 'a\\\\tb': not a name of SLURM"),
    (ClusterConfig(ranks_per_node=1, account="$(touch x)"), JobOptions("r"), "--account .*: not a name of SLURM"),
    (ClusterConfig(ranks_per_node=1, qos="a b"), JobOptions("r"), "--qos 'a b': not a name"),
    (ClusterConfig(ranks_per_node=1), JobOptions("a\nb"), r"--job-name 'a\\nb' holds a line break"),
    (ClusterConfig(ranks_per_node=1), JobOptions(" "), "--job-name is empty"),
    (ClusterConfig(ranks_per_node=1), JobOptions("r", excluded=("a;b",)), "--exclude 'a;b': not a list of nodes"),
    (ClusterConfig(ranks_per_node=1), JobOptions("r", num_links=0), "--array-restarts 0: use 1"),
    (ClusterConfig(ranks_per_node=1), JobOptions("r", "soon"), "--time 'soon': not a time limit of SLURM"),
])
def test_values_that_are_no_names_are_refused(cluster, options, message):
    with pytest.raises(LaunchError, match=message):
        render(cluster, options)
