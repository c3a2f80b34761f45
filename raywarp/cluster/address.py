"""The address of the Ray cluster that a program joins, and whether that cluster lets it in.

Ray 2.60 waits for two minutes for a cluster that is not there, and then ends the process. So the
control server (GCS) is asked first, by one gRPC request.
"""

import os
import re
import socket
import time
from pathlib import Path

from raywarp.config.schema import ConfigError

ANSWER_SECONDS = 10.0  # for the control server's answer, and for this machine's node to come up
OWN = "RAY_ADDRESS=local runs on a Ray of its own on this machine"
SUBMIT = (
    "submit the run as a job (cluster/submit.py CONFIG --address http://HOST:8265, or ray job"
    " submit)"
)
NO_NODE = (
    "no node of that cluster runs on this machine, and a program can join only from a node. To run"
    f" there, {SUBMIT}"
)
TOKEN_PLACES = "RAY_AUTH_TOKEN, in the file RAY_AUTH_TOKEN_PATH or in ~/.ray/auth_token"


def named_address() -> str | None:
    """Return the address in RAY_ADDRESS as Ray resolves it; None if none is named.

    "auto" is the last `ray start`, or any Ray on this machine.

    Raises:
        ConfigError: it is no address of a cluster, or "auto" finds none.
    """
    given = os.environ.get("RAY_ADDRESS", "")
    if given != given.strip():
        given = os.environ["RAY_ADDRESS"] = given.strip()  # Ray would take the blanks for a host
    if given in ("", "local"):
        return None
    if given != "auto":
        _check_form(given)
    from ray._private import services

    try:
        return str(services.canonicalize_bootstrap_address(given))
    except ConnectionError:
        raise ConfigError(
            "RAY_ADDRESS=auto: no Ray runs on this machine; start one with `ray start --head`."
            f" {OWN}"
        ) from None


def last_started() -> str | None:
    """Return the address of the last `ray start` on this machine, which Ray keeps in a file."""
    from ray._private import utils
    from ray._private.authentication import authentication_token_setup as tokens

    found = utils.read_ray_address() or None
    if found:  # as ray.init does for an address that nobody has given
        tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    return found


def is_gone(address: str) -> bool:
    """Return whether the cluster of the last `ray start` has ended, also on this machine."""
    from ray._private import services

    status, _ = _ask(address)
    return status not in ("OK", "UNAUTHENTICATED") and address not in services.find_gcs_addresses()


def check_cluster(address: str, origin: str) -> None:
    """Raise ConfigError unless a Ray answers at the address and lets this process in.

    Args:
        address: HOST:PORT of its control server.
        origin: what names the address, for the message.
    """
    status, details = _ask(address)
    if status == "UNAUTHENTICATED":
        raise ConfigError(f"{origin}: the cluster {token_problem()}. {OWN}")
    if status != "OK":
        raise ConfigError(
            f"{origin}: {_reason(address, status, details)}. Correct the address, or start that"
            f" cluster. {OWN}"
        )
    if not _has_node():
        raise ConfigError(f"{origin}: {NO_NODE}. {OWN}")


def refusal(address: str, error: Exception) -> Exception:
    """Return what ray.init raised as a ConfigError, where a user can do something about it."""
    from ray.exceptions import AuthenticationError

    text = " ".join(str(error.__cause__ or error).split())
    if "Version mismatch" in text:
        versions = re.findall(r"Ray: (\S+) Python: (\S+)", text)
        (ray, python), (my_ray, my_python) = versions[:2]
        return ConfigError(
            f"the cluster at {address} has Ray {ray} and Python {python}, and this process has Ray"
            f" {my_ray} and Python {my_python}. Ray wants them equal, to the last digit; use the"
            " same environment on both sides"
        )
    if isinstance(error, AuthenticationError):
        return ConfigError(f"the cluster at {address} {token_problem()}. {OWN}")
    if "No node info found" in text:
        return ConfigError(f"the cluster at {address}: {NO_NODE}. {OWN}")
    return error


def token_problem() -> str:
    """Return why a cluster refused this process, and what to do."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return (
            "asks for a token, and none is sent without RAY_AUTH_MODE=token: set it, and put the"
            f" cluster's token in {TOKEN_PLACES}"
        )
    place = _token_place()
    if place is None:
        return f"asks for a token, and there is none: put the cluster's token in {TOKEN_PLACES}"
    return f"refuses the token in {place}: it is another cluster's; put this cluster's there"


def _token_place() -> str | None:
    """Return where Ray 2.60 takes the token from; None if there is none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return f"RAY_AUTH_TOKEN_PATH={path}" if _has_text(Path(path)) else None
    return "~/.ray/auth_token" if _has_text(Path.home() / ".ray" / "auth_token") else None


def _has_text(path: Path) -> bool:
    try:
        return bool(path.read_text().strip())
    except (OSError, ValueError):
        return False


def _check_form(given: str) -> None:
    """Raise ConfigError for an address that is not HOST:PORT."""
    scheme, found, _ = given.partition("://")
    if found and scheme == "ray":
        raise ConfigError(f"RAY_ADDRESS={given} is Ray Client's, which runs no raywarp: {SUBMIT}")
    if found and scheme in ("http", "https"):
        raise ConfigError(
            f"RAY_ADDRESS={given} is that of a job server. To run there, {SUBMIT}. To join a"
            " cluster from one of its nodes, give its control server's, such as HOST:6379"
        )
    form = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:/\s\[\]]+):([0-9]+)", given)
    if found or not form or not 0 < int(form[2]) < 65536:
        raise ConfigError(
            f"RAY_ADDRESS={given} is not HOST:PORT; `ray start --head` prints the right one, and"
            f" its port is 6379 by default. {OWN}"
        )


def _ask(address: str) -> tuple[str, str]:
    """Ask the control server for the cluster's id; return the gRPC status and its details."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.exceptions import AuthenticationError

    channel = init_grpc_channel(address, options=[("grpc.enable_http_proxy", 0)])
    try:
        request = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        request(b"", timeout=ANSWER_SECONDS)
    except grpc.RpcError as error:
        return error.code().name, error.details() or ""
    except AuthenticationError:  # RAY_AUTH_MODE=token, and this machine has none to send
        return _listens(address)
    finally:
        channel.close()
    return "OK", ""


def _listens(address: str) -> tuple[str, str]:
    """Return the gRPC status of a request without a token, as far as a connection shows it."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except TimeoutError:
        return "DEADLINE_EXCEEDED", ""
    except OSError as error:
        return "UNAVAILABLE", str(error)
    return "UNAUTHENTICATED", ""


def _reason(address: str, status: str, details: str) -> str:
    """Return why no Ray has answered, as text."""
    if not _is_known(address):
        return f"the host of {address} is not known here"
    if status == "DEADLINE_EXCEEDED":
        return f"{address} has not answered within {ANSWER_SECONDS:.0f} s"
    if "refused" in details:
        return f"nothing listens at {address} (connection refused)"
    return f"what answers at {address} is no control server of Ray ({details[:200]})"


def _is_known(address: str) -> bool:
    try:
        return bool(socket.getaddrinfo(address.rpartition(":")[0].strip("[]"), None))
    except OSError:
        return False


def _has_node() -> bool:
    """Return whether a Ray node runs on this machine. One that has just started is waited for."""
    from ray._private import services

    deadline = time.monotonic() + ANSWER_SECONDS
    while not (found := services.find_node_ids()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return bool(found)
