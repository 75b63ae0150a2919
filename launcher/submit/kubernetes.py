"""`megascale launch kubernetes`: a manifest of Kubeflow's PyTorchJob from the same plan."""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from launcher.submit.environment import plan_environment
from launcher.submit.plan import shell_words
from launcher.submit.request import Launch, LaunchRequest, prepare
from launcher.submit.snapshot import check_no_secrets
from launcher.submit.torchrun import DEFAULT_PORT, torchrun_words
from megascale.config.dump import resolved_values, to_yaml
from megascale.errors import LaunchError

CONFIG_MOUNT = "/etc/megascale"
MAX_NAME = 50
"""Kubernetes takes 63 characters, and the operator adds its own to the names of pods."""
CLAIM = re.compile(r"(?P<claim>[a-z0-9]([a-z0-9.-]*[a-z0-9])?):(?P<path>/.*)")
MAX_RESTARTS = 3
SHM_VOLUME = "shm"


@dataclass(frozen=True)
class PodOptions:
    """What pods need besides the plan.

    Attributes:
        image: container image with megascale in it.
        claims: volume claims to mount, as `CLAIM:/PATH`.
        secret: Kubernetes secret whose entries become variables, such as WANDB_API_KEY; None for none.
        working_folder: folder that relative paths of the config start from; None for the image's.
    """

    image: str
    claims: tuple[str, ...] = ()
    secret: str | None = None
    working_folder: str | None = None


def write_kubernetes(request: LaunchRequest, options: PodOptions, out: Path | None) -> None:
    """Checks a request and writes its manifest to a file, or prints it.

    Raises:
        MegascaleError: bad input, a secret in the config, or a file that can't be written.
    """
    launch = prepare(request)
    manifest = write_manifest(launch, options)
    check_no_secrets(manifest, str(request.config_path), os.environ)
    for note in launch.notes:
        print(f"  {note}", file=sys.stderr)
    if out is None:
        print(manifest, end="")
        return
    try:
        out.write_text(manifest, encoding="utf-8")
    except OSError as error:
        raise LaunchError(f"--out {out}: can't be written: {error.strerror}") from None
    print(f"wrote {out}; start it with: {shell_words(['kubectl', 'apply', '-f', str(out)])}")


def write_manifest(launch: Launch, options: PodOptions) -> str:
    """The config as a ConfigMap and the job that reads it, as YAML.

    Raises:
        LaunchError: a claim that isn't CLAIM:/PATH, no image, or spares, which Kubernetes doesn't hold.
    """
    if launch.plan.spares:
        raise LaunchError(f"--spares {launch.plan.spares}: Kubernetes replaces pods by itself; leave --spares out")
    if not options.image.strip():
        raise LaunchError("--image is empty; give an image that has megascale and its Python in it")
    name = resource_name(launch.plan.run_name)
    config_map = {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{name}-config"},
        "data": {"config.yaml": to_yaml(resolved_values(launch.config))},
    }
    plan = launch.plan
    replicas = {"Master": _replica(launch, options, name, 1)}
    if plan.nodes > 1:
        replicas["Worker"] = _replica(launch, options, name, plan.nodes - 1)
    job = {
        "apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/name": "megascale"}},
        "spec": {
            "nprocPerNode": str(plan.ranks_per_node),
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": MAX_RESTARTS},
            "pytorchReplicaSpecs": replicas,
        },
    }
    return "---\n".join(yaml.dump(part, Dumper=_BlockDumper, sort_keys=False) for part in (config_map, job))


def resource_name(run_name: str) -> str:
    """A run's name as Kubernetes takes names: lower-case letters, digits and `-`, a letter first."""
    name = re.sub(r"[^a-z0-9-]+", "-", run_name.lower())[:MAX_NAME].strip("-")
    return name if name[:1].isalpha() else f"run-{name}".rstrip("-")


class _BlockDumper(yaml.SafeDumper):
    """Safe YAML without anchors, which shows texts of several lines as they are."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_BlockDumper.add_representer(str, lambda dumper, text: dumper.represent_scalar(
    "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None))


def _replica(launch: Launch, options: PodOptions, name: str, count: int) -> dict:
    plan, cluster = launch.plan, launch.plan.cluster
    volumes, mounts = _volumes(options, name)
    words = torchrun_words(
        plan, [_literal(word) for word in (f"{CONFIG_MOUNT}/config.yaml", *plan.arguments)],
        python=_literal(cluster.python or "python"), node_rank="$(RANK)", address="$(MASTER_ADDR)",
        port="$(MASTER_PORT)",  # the operator sets the three in every pod
    )
    resources = {
        **({"nvidia.com/gpu": plan.ranks_per_node} if cluster.gpus_per_node else {}),
        **({"cpu": cluster.cpus_per_node} if cluster.cpus_per_node else {}),
        **({"memory": _memory(cluster.memory_per_node)} if cluster.memory_per_node not in (None, "0") else {}),
    }
    container = {
        "name": "pytorch",  # the operator looks for this name
        "image": options.image, "command": words,
        "env": [{"name": key, "value": _literal(value)} for key, value in plan_environment(plan).items()],
        "ports": [{"name": "pytorchjob-port", "containerPort": DEFAULT_PORT}],
        "resources": {"limits": resources}, "volumeMounts": mounts,
    }
    if options.secret:
        container["envFrom"] = [{"secretRef": {"name": options.secret}}]
    if options.working_folder:
        container["workingDir"] = options.working_folder
    pod = {"terminationGracePeriodSeconds": cluster.grace_s, "containers": [container], "volumes": volumes}
    return {"replicas": count, "restartPolicy": "OnFailure", "template": {"spec": pod}}


def _volumes(options: PodOptions, name: str) -> tuple[list[dict], list[dict]]:
    """Shared memory, the config, and the user's claims, as (volumes of the pod, mounts of the container)."""
    volumes = [
        {"name": SHM_VOLUME, "emptyDir": {"medium": "Memory"}},
        {"name": "config", "configMap": {"name": f"{name}-config"}},
    ]
    mounts = [{"name": SHM_VOLUME, "mountPath": "/dev/shm"}, {"name": "config", "mountPath": CONFIG_MOUNT}]
    for number, text in enumerate(options.claims):
        found = CLAIM.fullmatch(text)
        if found is None:
            raise LaunchError(f"--claim {text!r}: write NAME:/PATH, such as data:/data")
        volumes.append({"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": found["claim"]}})
        mounts.append({"name": f"claim-{number}", "mountPath": found["path"]})
    return volumes, mounts


def _memory(text: str) -> str:
    """SLURM's memory, in MiB without a unit, as Kubernetes writes it."""
    return f"{text}Mi" if text.isdigit() else f"{text}i"


def _literal(text: str) -> str:
    """A word that Kubernetes, which expands $(NAME) in commands and values, leaves as it is."""
    return text.replace("$", "$$")
