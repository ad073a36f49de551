"""A Ray cluster of several nodes on this machine, made in this process."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.cluster_utils import Cluster

from cluster.placement import free_port

STORE_BYTES = 2**28


@contextmanager
def made_cluster(head_cpus: int = 0, store_bytes: int = STORE_BYTES) -> Iterator[Cluster]:
    """Its head takes no work, unless told so. Nodes are to be added by `add`."""
    head = {"num_cpus": head_cpus, "num_gpus": 0, "dashboard_port": free_port(), "node_ip_address": address()}
    cluster = Cluster(initialize_head=True, head_node_args=head | {"object_store_memory": store_bytes})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def add(cluster: Cluster, **resources: Any) -> Any:
    return cluster.add_node(node_ip_address=address(), **resources, object_store_memory=STORE_BYTES)


def raylet(node: Any) -> int:
    """The process under which a node's actors are."""
    return int(node.all_processes["raylet"][0].process.pid)


def address() -> str:
    """This machine's for others. Ray would take loopback where this process is in a local cluster, at which its drivers
    then look in vain, as they turn a loopback address into the outer one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # of documentation; nothing is sent
        return str(probe.getsockname()[0])
