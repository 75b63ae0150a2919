"""One cluster for all SLURM tests of a session; each test finds it idle and healed."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import SlurmCluster, missing_programs
from tests.slurm.virtual_node import can_isolate


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[SlurmCluster]:
    """Three virtual nodes of 4 CPUs; where possible with networks of their own, so that loopback reaches no other."""
    if missing := missing_programs():
        pytest.skip(f"no SLURM here: {', '.join(missing)} missing; apt-get install slurm-wlm munge")
    isolation = next((kind for kind in ("net", "pid") if can_isolate(kind)), None)
    if isolation is None:
        pytest.skip("this user can't make pid, uts, ipc and mount namespaces here (a container without CAP_SYS_ADMIN)")
    with SlurmCluster(nodes=3, cpus=4, isolation=isolation) as cluster:
        yield cluster


@pytest.fixture
def cluster(session_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """The session's cluster, idle; afterwards all jobs are ended and all nodes are mended."""
    yield session_cluster
    session_cluster.heal()
