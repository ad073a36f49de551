"""The Hugging Face hub: every request of its library has a deadline, which it does not set itself."""

from __future__ import annotations

SILENCE_SECONDS = 20.0


def hub_errors() -> tuple[type[Exception], ...]:
    """Have a request fail when the hub is silent for so long; what the library's calls raise (no network, no such name,
    no access, no answer)."""
    import httpx2
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def client() -> httpx2.Client:
        made = default_client_factory()
        made.timeout = httpx2.Timeout(SILENCE_SECONDS)
        return made

    set_client_factory(client)
    return OSError, ValueError, RuntimeError, httpx2.HTTPError
