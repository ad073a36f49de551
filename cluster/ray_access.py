"""Who may reach a Ray cluster: loopback and a token for a local one; for one that was there, whether we have its token.

Ray's own processes exchange pickles, so whoever may speak to them may run anything as this user.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from configs.errors import UsageError

KNOCK_SECONDS = 20.0
_NO_PROXY = (("grpc.enable_http_proxy", 0),)  # as Ray itself
HOW_TO_GET_IT = (
    "Take the token from whoever started the cluster (`ray get-auth-token` prints it there) and set "
    "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH for a file that holds it."
)


@contextmanager
def loopback() -> Iterator[None]:
    """A local cluster that is started within listens on 127.0.0.1 alone, every process of it.

    Ray takes a machine's outer address otherwise, and gives up loopback where it is asked for; this is the switch
    by which it stays there on systems that it makes no clusters of.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def make_token() -> None:
    """The user's token for local clusters, if there is none yet, readable to the user alone, as Ray's own is not."""
    from ray._private.authentication.authentication_token_generator import generate_new_authentication_token
    from ray._raylet import AuthenticationTokenLoader

    loader = AuthenticationTokenLoader.instance()
    if not asks_for_token() or loader.has_token(ignore_auth_mode=True):
        return
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(generate_new_authentication_token())
        with suppress(FileExistsError):  # of a run that started at the same moment: whoever is first, that is the token
            path.hardlink_to(draft)
    finally:
        draft.unlink(missing_ok=True)
    loader.reset_cache()


def asks_for_token() -> bool:
    """Whether a local cluster will: unless the user has switched it off."""
    return os.environ.get("RAY_AUTH_MODE", "token").lower() != "disabled"


def check_token(address: str, seconds: float | None = None) -> bool:
    """Whether the cluster at host:port asks for a token. UsageError, in seconds, if we have none or another, or if
    nobody is there; Ray would try again and again for 20 s and then name no token."""
    import grpc
    from ray._private.authentication.authentication_utils import is_token_auth_enabled
    from ray._private.grpc_utils import init_grpc_channel
    from ray._raylet import AuthenticationTokenLoader

    seconds = KNOCK_SECONDS if seconds is None else seconds
    with grpc.insecure_channel(address, _NO_PROXY) as channel:
        if _lets_in(channel, address, seconds):
            return False
    if not is_token_auth_enabled() or not AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        raise UsageError(f"The Ray cluster at {address} asks for a token, and this driver shows none. {HOW_TO_GET_IT}")
    with init_grpc_channel(address, _NO_PROXY) as channel:
        if not _lets_in(channel, address, seconds):
            raise UsageError(f"The Ray cluster at {address} has another token than this driver. {HOW_TO_GET_IT}")
    return True


def _lets_in(channel: object, address: str, seconds: float) -> bool:
    """Whether the cluster answers a harmless question that comes through this channel."""
    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    try:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        stub.GetClusterId(gcs_service_pb2.GetClusterIdRequest(), timeout=seconds, wait_for_ready=True)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            return False
        raise UsageError(
            f"No Ray cluster answers at RAY_ADDRESS={address} within {seconds:g} s ({error.code().name}). Start "
            "it (`ray start --head`), correct the address, or unset RAY_ADDRESS to have a local one."
        ) from None
    return True
