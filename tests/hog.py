"""Fills the object store of the cluster at RAY_ADDRESS with objects in use, which cannot be moved out of the way, and
goes on putting more. Says `full` once there is no room left in memory, with what Ray says of it.
"""

from __future__ import annotations

import time

import numpy as np
import ray
from ray._private.internal_api import memory_summary

CHUNK = 2**20


def main() -> None:
    ray.init(log_to_driver=False, logging_level="ERROR")
    size = int(ray.cluster_resources()["object_store_memory"])
    held = [in_use() for _ in range(size // CHUNK + 2)]
    usage = [line for line in memory_summary(stats_only=True).splitlines() if "Plasma" in line]
    print("full", len(held), "; ".join(usage), flush=True)
    while True:
        ray.put(np.zeros(CHUNK, np.uint8))
        time.sleep(0.1)


def in_use() -> tuple[ray.ObjectRef, np.ndarray]:
    reference = ray.put(np.zeros(CHUNK, np.uint8))
    return reference, ray.get(reference)


if __name__ == "__main__":
    main()
