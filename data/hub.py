"""The Hugging Face hub, which may be silent: its library waits for it again and again, and in places for ever."""

from __future__ import annotations

from typing import Literal

SILENCE_SECONDS = 20.0


class HubSilentError(Exception):
    """The hub took the question and did not answer it."""


def hub_errors() -> tuple[type[Exception], ...]:
    """What `check_hub` and the library's calls raise: no network, no such name, no access, no answer."""
    import httpx2

    return OSError, ValueError, RuntimeError, httpx2.HTTPError, HubSilentError


def check_hub(kind: Literal["model", "dataset"], name: str) -> None:
    """HubSilentError if the hub, asked of this, says nothing for so long.

    What else it says is for whoever loads to judge, and so is a network that is not there: what was fetched before
    may do.
    """
    import httpx2
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return
    api = HfApi()
    try:
        (api.model_info if kind == "model" else api.dataset_info)(name, timeout=SILENCE_SECONDS)
    except httpx2.TimeoutException:
        raise HubSilentError(
            f"{constants.ENDPOINT} did not answer within {SILENCE_SECONDS:g} s. With HF_HUB_OFFLINE=1 what was fetched "
            "before is used."
        ) from None
    except Exception:  # noqa: BLE001 - any answer, a refusal too, is no silence
        pass
