"""`megascale launch torchrun-print`: the command of each node, for any other scheduler. Pure."""

from launcher.submit.environment import plan_environment
from launcher.submit.plan import LaunchPlan, shell_words
from launcher.submit.request import LaunchRequest
from launcher.submit.script import code_folder, controller_python

DEFAULT_PORT = 29500


def torchrun_words(
    plan: LaunchPlan, arguments: list[str], *, python: str, node_rank: str, address: str, port: str
) -> list[str]:
    """torchrun's command on one node, without its environment."""
    return [
        python, "-m", "torch.distributed.run", f"--nnodes={plan.nodes}", f"--nproc-per-node={plan.ranks_per_node}",
        f"--node-rank={node_rank}", f"--master-addr={address}", f"--master-port={port}", "--max-restarts=0",
        "-m", "launcher", "train", *arguments,
    ]


def torchrun_commands(plan: LaunchPlan, request: LaunchRequest, address: str, port: int = DEFAULT_PORT) -> list[str]:
    """One line of bash for each node, environment included; each is run in the folder of the launch.

    SIGUSR1 is ignored by torchrun itself, which would die of it; ranks save and stop on it.
    """
    variables = plan_environment(plan) | ({"PYTHONPATH": code_folder()} if code_folder() else {})
    arguments = [str(request.config_path), *request.overrides, *plan.arguments]
    lines = []
    for node in range(plan.nodes):
        words = torchrun_words(
            plan, arguments, python=plan.cluster.python or controller_python(plan.cluster), node_rank=str(node),
            address=address, port=str(port),
        )
        inner = f"trap '' {plan.cluster.signal}; exec {shell_words(words)}"
        settings = [f"{name}={value}" for name, value in variables.items()]
        lines.append(shell_words(["env", *settings, "bash", "-c", inner]))
    return lines
