"""Variables that a plan gives to every rank, whoever starts it. Pure."""

from launcher.submit.plan import LaunchPlan

INTERFACE_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def plan_environment(plan: LaunchPlan) -> dict[str, str]:
    """The cluster's variables, and the network interface for NCCL and gloo. What the cluster's file says wins."""
    interface = plan.cluster.interface
    return (dict.fromkeys(INTERFACE_VARIABLES, interface) if interface else {}) | plan.cluster.environment
