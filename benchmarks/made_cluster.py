"""A Ray cluster of several nodes on this machine, made in this process."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.cluster_utils import Cluster

from cluster.placement import free_port

STORE = {"object_store_memory": 2**28}


@contextmanager
def made_cluster() -> Iterator[Cluster]:
    """Its head takes no work. Nodes are to be added by `add`."""
    head = {"num_cpus": 0, "num_gpus": 0, "dashboard_port": free_port(), "node_ip_address": address(), **STORE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def add(cluster: Cluster, **resources: float) -> Any:
    return cluster.add_node(node_ip_address=address(), **resources, **STORE)


def address() -> str:
    """This machine's for others. Ray would take loopback where this process is in a local cluster, at which its drivers
    then look in vain, as they turn a loopback address into the outer one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # of documentation; nothing is sent
        return str(probe.getsockname()[0])
