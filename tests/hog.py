"""Fills the object store of this node, in the cluster at RAY_ADDRESS, with objects in use, which cannot be moved out of
the way, and goes on putting more. Says `full` once there is no room left in memory, with what Ray says of it.
"""

from __future__ import annotations

import time

import numpy as np
import ray
from ray._private.internal_api import node_stats, store_stats_summary

CHUNK = 2**20


def main() -> None:
    ray.init(log_to_driver=False, logging_level="ERROR")
    here = ray.get_runtime_context().get_node_id()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == here]
    held = [in_use() for _ in range(int(node["Resources"]["object_store_memory"]) // CHUNK + 2)]
    # of this node alone: memory_summary asks any that Ray believes alive, one that has just died too
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
    usage = [line for line in store_stats_summary(stats).splitlines() if "Plasma" in line]
    print("full", len(held), "; ".join(usage), flush=True)
    while True:
        ray.put(np.zeros(CHUNK, np.uint8))
        time.sleep(0.1)


def in_use() -> tuple[ray.ObjectRef, np.ndarray]:
    reference = ray.put(np.zeros(CHUNK, np.uint8))
    return reference, ray.get(reference)


if __name__ == "__main__":
    main()
