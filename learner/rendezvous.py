"""Where learner ranks meet: torch's store of keys, on loopback alone where all of them are on one machine.

Torch's own store listens on every interface and asks nobody who they are.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

from torch.distributed import Store, TCPStore
from torch.distributed.rendezvous import register_rendezvous_handler

LOOPBACK = "127.0.0.1"
_SCHEME = "loopback"


def init_method(address: str, port: int) -> str:
    """The URL by which torch finds the store at this address."""
    return f"{_SCHEME if address == LOOPBACK else 'tcp'}://{address}:{port}"


def _meet(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[Store, int, int]]:
    """torch's handler of tcp://, with a socket of ours to listen on."""
    parts = urlsplit(url)
    asked = {name: int(values[0]) for name, values in parse_qs(parts.query).items()}
    rank, ranks = asked["rank"], asked["world_size"]
    assert parts.port is not None
    listening = socket.create_server((LOOPBACK, parts.port)).detach() if rank == 0 else None
    yield TCPStore(LOOPBACK, parts.port, ranks, rank == 0, timeout, master_listen_fd=listening), rank, ranks


register_rendezvous_handler(_SCHEME, _meet)
