"""Runs that live at a URL: which texts are one, and the filesystem behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.errors import UsageError
from configs.within import within

SECONDS = 60.0  # for an answer; the run's own deadline is in the config that is asked for
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
    "hf": "huggingface_hub",
}


def is_url(text: str) -> bool:
    """Whether a place is a URL such as s3://bucket/runs, and no path."""
    return "://" in text


def fetch_config(url: str, folder: Path) -> Path:
    """The folder, with the config.yaml of the run at this URL in it, if there is one. UsageError if nobody answers."""
    filesystem, root = open_filesystem(url)
    try:
        text = within(SECONDS, lambda: filesystem.cat_file(f"{root.rstrip('/')}/config.yaml"), f"Looking at {url}")
    except FileNotFoundError:
        return folder
    except Exception as error:  # each filesystem of fsspec has errors of its own
        raise UsageError(
            f"{url} cannot be read: {type(error).__name__}: {error}. Check it and the credentials."
        ) from error
    (folder / "config.yaml").write_bytes(text)
    return folder


def open_filesystem(url: str) -> tuple[Any, str]:
    """(fsspec's filesystem, the path on it) of a URL. UsageError if nothing here can reach its protocol."""
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    try:
        return url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(protocol, f"fsspec[{protocol}]")
        raise UsageError(f"{url} needs a package that is not installed: `pip install {package}` ({error}).") from error
    except ValueError as error:
        raise UsageError(f"{url}: {error}. Give s3://, gs://, another protocol of fsspec, or a path.") from error
