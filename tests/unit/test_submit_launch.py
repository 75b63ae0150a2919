"""Launches as users call them: SLURM by stand-ins for its commands, torchrun's command, Kubernetes, this machine."""

import json
import os
import subprocess

import pytest
import yaml

from launcher.submit.kubernetes import PodOptions, resource_name, write_manifest
from launcher.submit.local import launch_local
from launcher.submit.plan import load_plan
from launcher.submit.request import CLUSTERS_FOLDER, LaunchRequest, prepare
from launcher.submit.slurm import SlurmOptions, launch_slurm
from launcher.submit.torchrun import torchrun_commands
from launcher.supervise.records import NodeFault, append_node_fault
from megascale.config.cluster import load_cluster
from megascale.config.dump import resolved_values
from megascale.config.load import load_config
from megascale.errors import ConfigError, LaunchError
from tests.support.corpus import make_corpus
from tests.support.fake_slurm import FakeSlurm
from tests.support.tiny_run import megascale, write_config

CANARY = "canary-3f9d1c77"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a config and its corpus, in which the test works."""
    make_corpus(tmp_path / "corpus", vocab_size=64)
    write_config(tmp_path, tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def slurm(place, monkeypatch):
    fake = FakeSlurm(place / "bin")
    monkeypatch.setenv("PATH", fake.path)
    return fake


def request_of(place, **values) -> LaunchRequest:
    return LaunchRequest(place / "run.yaml", **{"nodes": 2, "ranks_per_node": 2} | values)


def test_a_launch_leaves_a_snapshot_and_submits_it(place, slurm, monkeypatch, capsys):
    """Mutations seen caught: STOP left in place; the user's config given to the ranks; remembered nodes let in."""
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    (place / "run").mkdir()
    (place / "run" / "STOP").touch()
    append_node_fault(place / "run", NodeFault("node9", 4e9, "preflight", "no GPU", "1.0"))
    request = request_of(place, overrides=("train.max_steps=30",), num_links=3)
    assert launch_slurm(request, SlurmOptions("1:00:00", ("node3",))) == "4321"
    (folder,) = (path for path in (place / "run" / "launch").iterdir() if path.is_dir())
    plan = load_plan(folder / "plan.json")
    assert plan.config == str(folder / "config.yaml")
    assert plan.is_chained
    expected = load_config(place / "run.yaml", ["train.max_steps=30"])
    assert resolved_values(load_config(folder / "config.yaml")) == resolved_values(expected)
    arguments = slurm.arguments("sbatch")
    assert arguments[-1] == str(folder / "job.sbatch")
    assert "--exclude=node3,node9" in arguments
    assert f"--chdir={place}" in arguments
    job = json.loads((folder / "job.json").read_text())
    assert job["job_id"] == "4321"
    assert job["command"] == ["sbatch", *arguments]
    assert "WANDB_API_KEY" in json.loads((folder / "environment.json").read_text())["variables"]
    assert set(json.loads((folder / "code.json").read_text())) >= {"commit", "dirty", "versions"}
    assert not (place / "run" / "STOP").exists()
    output = capsys.readouterr()
    assert "submitted job 4321, a chain of 3" in output.out
    assert f"megascale stop {place / 'run'}" in output.out
    texts = [path.read_text() for path in place.rglob("*") if path.is_file() and path.suffix not in (".tar", ".npy")]
    assert not any(CANARY in text for text in [*texts, output.out, output.err])


def test_a_second_launch_is_refused_while_the_job_lives(place, slurm):
    launch_slurm(request_of(place), SlurmOptions())
    slurm.answer("squeue", "PENDING\n")
    with pytest.raises(LaunchError, match="is live: job 4321"):
        launch_slurm(request_of(place), SlurmOptions())
    slurm.answer("squeue", "COMPLETED\n")
    launch_slurm(request_of(place), SlurmOptions())


@pytest.mark.parametrize(("values", "options", "error"), [
    ({"partition": "debgu"}, SlurmOptions(), "did you mean 'debug'"),
    ({"gpus_per_node": 8}, SlurmOptions(), "asked for 8 GPUs on a node"),
    ({"nodes": 2, "spares": 3}, SlurmOptions(), "asked for 5 nodes"),
    ({}, SlurmOptions("1"), "grace_s = 120"),
    ({"nodes": 3}, SlurmOptions(), "not a multiple of micro_batch_size"),
    ({"ranks_per_node": None}, SlurmOptions(), "give --ranks-per-node"),
    ({"cluster": "nowhere"}, SlurmOptions(), "none of the clusters in .*aws-p5, local, slurm-8xh100, slurm-cpu"),
    ({"overrides": (f"run.folder=/tmp/{CANARY}",)}, SlurmOptions(), r"holds the value of \$MY_SECRET"),
    ({"overrides": ('run.folder="a\\nb"',)}, SlurmOptions(), "run.folder 'a.*' holds a line break"),
    ({}, SlurmOptions(job_name="a\x07"), "--job-name .* control character"),
])
def test_refusals_come_before_anything_is_written(place, slurm, monkeypatch, values, options, error):
    monkeypatch.setenv("MY_SECRET", CANARY)
    before = sorted(place.rglob("*"))
    with pytest.raises((LaunchError, ConfigError), match=error) as raised:
        launch_slurm(request_of(place, **values), options)
    assert CANARY not in str(raised.value)
    assert slurm.arguments("sbatch") is None
    assert [path for path in sorted(place.rglob("*")) if path.suffix != ".argv"] == before


def test_what_sbatch_says_is_passed_on_and_nothing_stays(place, slurm):
    slurm.answer("sbatch", "", 1, "sbatch: error: Invalid account\n")
    with pytest.raises(LaunchError, match="sbatch refused the job: sbatch: error: Invalid account"):
        launch_slurm(request_of(place), SlurmOptions())
    assert list((place / "run" / "launch").iterdir()) == []


def test_without_sbatch_a_launch_teaches_and_a_dry_run_works(place, monkeypatch, capsys):
    monkeypatch.setattr("launcher.submit.slurm.find_sbatch", lambda: None)
    with pytest.raises(LaunchError, match="on a login node of the cluster, or with --dry-run"):
        launch_slurm(request_of(place), SlurmOptions())
    assert launch_slurm(request_of(place), SlurmOptions(is_dry=True)) is None
    output = capsys.readouterr().out
    assert "not checked: partition, GPUs, nodes and jobs of this run: there is no sbatch" in output
    assert "#SBATCH --nodes=2\n" in output
    assert not (place / "run").exists()


def test_the_command_line_submits(place, slurm):
    done = megascale("launch", "slurm", place / "run.yaml", "--nodes", "2", "--ranks-per-node", "2", PATH=slurm.path)
    assert done.returncode == 0, done.stderr
    assert "submitted job 4321" in done.stdout
    done = megascale("launch", "slurm", place / "run.yaml", "--nodes", "9", "--ranks-per-node", "2", PATH=slurm.path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_local_nodes_share_the_ranks(place, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    plans = []
    request = LaunchRequest(place / "run.yaml", nodes=2, spares=1)
    assert launch_local(request, 4, lambda path: plans.append(load_plan(path)) or 75) == 75
    assert (plans[0].nodes, plans[0].spares, plans[0].ranks_per_node) == (2, 1, 2)
    with pytest.raises(LaunchError, match=r"--nproc 3: .* evenly over --nodes 2; use --nproc 2 or 4"):
        launch_local(request, 3, lambda path: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(LaunchError, match="would share this machine's 2 GPUs"):
        launch_local(request, 2, lambda path: 0)


def test_torchruns_command_has_its_environment(place):
    """As bash takes it apart. Mutation seen caught: the inner command not quoted."""
    cluster = place / "my cluster.yaml"
    cluster.write_text("{ranks_per_node: 2, interface: eth7, environment: {A: 'x y $(touch z)'}, python: stub}")
    (place / "stub").write_text("#!/bin/bash\nprintf '%s\\0' \"$A\" \"$GLOO_SOCKET_IFNAME\" \"$@\"")
    (place / "stub").chmod(0o755)
    request = request_of(place, cluster=str(cluster), ranks_per_node=None, overrides=("run.folder='a b'",))
    commands = torchrun_commands(prepare(request).plan, request, "head")
    assert len(commands) == 2
    done = subprocess.run(["bash", "-c", commands[1]], env=os.environ | {"PATH": f"{place}:{os.environ['PATH']}"},
                          capture_output=True, text=True, check=True)
    words = done.stdout.split("\0")[:-1]
    assert words[:2] == ["x y $(touch z)", "eth7"]
    assert "--node-rank=1" in words
    assert words[-5:] == ["-m", "launcher", "train", str(place / "run.yaml"), "run.folder='a b'"]


def test_the_manifest_is_the_same_plan(place):
    """Mutation seen caught: $ not doubled in variables, which Kubernetes then fills in."""
    cluster = place / "c.yaml"
    cluster.write_text("{gpus_per_node: 2, memory_per_node: 4G, environment: {A: '$(HOME)'}}")
    request = request_of(place, nodes=2, cluster=str(cluster), ranks_per_node=None)
    options = PodOptions("reg/image:1", ("data:/data",), "wandb", "/work")
    config_map, job = yaml.safe_load_all(write_manifest(prepare(request), options))
    assert yaml.safe_load(config_map["data"]["config.yaml"]) == resolved_values(load_config(place / "run.yaml"))
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {name: value["replicas"] for name, value in replicas.items()} == {"Master": 1, "Worker": 1}
    pod = replicas["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2, "memory": "4Gi"}
    assert container["env"] == [{"name": "A", "value": "$$(HOME)"}]
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]
    assert "--node-rank=$(RANK)" in container["command"]
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}
    assert pod["volumes"][0] == {"name": "shm", "emptyDir": {"medium": "Memory"}}
    with pytest.raises(LaunchError, match="--claim 'data': write NAME:/PATH"):
        write_manifest(prepare(request), PodOptions("i", ("data",)))
    assert resource_name("8b_Llama.v2") == "run-8b-llama-v2"


@pytest.mark.parametrize("path", sorted(CLUSTERS_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_cluster_file_loads_and_says_what_to_change(path):
    assert load_cluster(path).name == path.stem
    head = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert "Change:" in head
