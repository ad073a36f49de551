"""The nodes of the Ray cluster, and a question put to each of them, with a deadline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.waiting import Deadline
from configs.errors import RunError

ANSWER_SECONDS = 120.0  # a node that never ran this job starts a process and imports our packages first


@dataclass(frozen=True, eq=False)  # as a key: one node is one object
class Node:
    """id: Ray's; name: for people; resources: all it has, busy or not; here: whether this process runs on it."""

    id: str
    name: str
    resources: Mapping[str, float]
    here: bool


def nodes_for_actors() -> list[Node]:
    """The living nodes with CPUs or GPUs to give, this process's first. A head that takes no work is none of them."""
    own = ray.get_runtime_context().get_node_id()
    found = [
        Node(
            id=node["NodeID"],
            name=f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, node {node['NodeID'][:8]})",
            resources=node["Resources"],
            here=node["NodeID"] == own,
        )
        for node in ray.nodes()
        if node["Alive"] and (node["Resources"].get("CPU") or node["Resources"].get("GPU"))
    ]
    return sorted(found, key=lambda node: (not node.here, node.name))


def ask(
    nodes: list[Node], function: Callable[..., Any], *arguments: Any, seconds: float = ANSWER_SECONDS
) -> dict[Node, Any]:
    """What `function(*arguments)`, a module's own, returns on each node. RunError naming who fails or is late."""
    task = ray.remote(function)
    placed = {
        node: task.options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
        ).remote(*arguments)
        for node in nodes
    }
    deadline = Deadline(seconds)
    return {node: _answer(node, reference, function.__name__, deadline) for node, reference in placed.items()}


def _answer(node: Node, reference: ray.ObjectRef, asked: str, deadline: Deadline) -> Any:
    try:
        return ray.get(reference, timeout=deadline.left)
    except GetTimeoutError:
        raise RunError(
            f"The node {node.name} did not answer within {deadline.seconds:g} s ({asked}). Look at its log in Ray's "
            "session folder and whether it hangs, or take it out of the cluster."
        ) from None
    except RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RunError(
            f"The node {node.name} could not be asked ({asked}): {lines[-1].strip().rstrip('.')}. Its Python needs the "
            "packages of requirements.lock, and our code: submit with --working-dir, or install it on every node."
        ) from error
