"""What a placement asks for and the cluster does not have, in words: Ray itself would wait for it for ever."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

Resources = Mapping[str, float]
GRAIN = 1e-4  # Ray counts resources in steps of this size


def shortfall(
    bundles: Sequence[Resources],
    nodes: Mapping[str, Resources],
    fix: str = "Lower cluster.rollout_workers, cluster.learner_ranks or rewards.verifiers, or add nodes.",
) -> str | None:
    """One paragraph that names what is missing and ends with `fix`, or None if every bundle finds a node.

    bundles: what each must have on one node; nodes: by name, what each has. Bundles are placed largest
    first, each on the first node with room.
    """
    free = {name: dict(there) for name, there in nodes.items()}
    for bundle in sorted(bundles, key=lambda each: _size(each, nodes.values()), reverse=True):
        host = next((there for there in free.values() if _fits(bundle, there)), None)
        if host is None:
            return (
                f"The actors ask for more than the Ray cluster has and would wait for ever: {_reason(bundles, nodes)}. "
                f"Asked: {_counted(bundles)}. There: {_listed(nodes)}. {fix}"
            )
        for name, amount in bundle.items():
            host[name] = host.get(name, 0.0) - amount
    return None


def _fits(bundle: Resources, there: Resources) -> bool:
    return all(amount <= there.get(name, 0.0) + GRAIN / 2 for name, amount in bundle.items())


def _size(bundle: Resources, nodes: Iterable[Resources]) -> tuple[float, float]:
    """GPUs first, then the largest share of what any node has."""
    nodes = list(nodes)
    shares = [
        amount / (max((n.get(name, 0.0) for n in nodes), default=0.0) or GRAIN) for name, amount in bundle.items()
    ]
    return bundle.get("GPU", 0.0), max(shares, default=0.0)


def _reason(bundles: Sequence[Resources], nodes: Mapping[str, Resources]) -> str:
    """The resources that are short in all, else a bundle too large for any node, else that they do not fit together."""
    asked: dict[str, float] = defaultdict(float)
    there: dict[str, float] = defaultdict(float)
    for amounts, totals in [*((bundle, asked) for bundle in bundles), *((node, there) for node in nodes.values())]:
        for name, amount in amounts.items():
            totals[name] += amount
    short = [
        f"{asked[name] - there[name]:.4g} {name} too few ({asked[name]:.4g} asked, {there[name]:.4g} there)"
        for name in asked
        if asked[name] > there[name] + GRAIN / 2
    ]
    if short:
        return ", ".join(short)
    for bundle in bundles:
        if not any(_fits(bundle, node) for node in nodes.values()):
            return f"no single node has {_shown(bundle)}, which one bundle must find together"
    return "there is enough in all, but not node by node, as a bundle cannot be divided"


def _shown(resources: Resources) -> str:
    amounts = [f"{amount:.4g} {name}" for name, amount in resources.items() if amount]
    return " + ".join(amounts) or "nothing"


def _counted(bundles: Sequence[Resources]) -> str:
    counts = Counter(map(_shown, bundles))
    return ", ".join(
        f"{count} bundles of {text}" if count > 1 else f"a bundle of {text}" for text, count in counts.items()
    )


def _listed(nodes: Mapping[str, Resources]) -> str:
    return "; ".join(f"{name}: {_shown(there)}" for name, there in nodes.items()) or "no node at all"
