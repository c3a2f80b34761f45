"""The job server of a Ray cluster: its address, whether it answers, and what it takes."""

import ipaddress
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from raywarp.config.schema import ConfigError

ANSWER_SECONDS = 20.0  # for the first answer
SHOWN = 5  # the largest files of a directory that is too large
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_ZIP_BYTES = 76  # of a file's two headers, without its name, which is in both


def server_address(given: str) -> str:
    """Return a job server's address with its scheme.

    Raises:
        ConfigError: it is no http:// or https:// address.
    """
    address = given.strip() if "://" in given else f"http://{given.strip()}"
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(
            f"{given!r} is not the address of a job server, which is the dashboard's, such as"
            " http://127.0.0.1:8265"
        )
    return address.rstrip("/")


def is_here(address: str) -> bool:
    """Return whether a server's address is on the loopback interface: 127.0.0.1 or the like."""
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def use(address: str) -> None:
    """Make Ray's client ask this server, and check that one answers.

    In Ray 2.60 environment variables win over the address that the client is given. A company's
    proxy is not asked for this machine.

    Raises:
        ConfigError: nothing answers there, or something else than a job server.
    """
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    if is_here(address):
        for name in _PROXIES:
            os.environ.pop(name, None)
            os.environ.pop(name.upper(), None)
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=ANSWER_SECONDS) as answer:
            is_server = b"ray_version" in answer.read()
    except urllib.error.HTTPError as error:
        is_server = error.code in (401, 403)  # it asks for the token, which Ray's client sends
    except (OSError, ValueError) as error:  # ValueError: http.client's, of an odd address
        reason = getattr(error, "reason", error)
        raise ConfigError(f"no job server answers at {address} ({reason}){_remedy()}") from None
    except Exception as error:
        raise ConfigError(f"what answers at {address} is no web server ({error!r})") from None
    if not is_server:
        raise ConfigError(f"what answers at {address} is no job server of Ray{_remedy()}")


def _remedy() -> str:
    found = [f"{name}={value}" for name, value in urllib.request.getproxies().items()]
    proxies = f"; a proxy was asked ({', '.join(found)}): see no_proxy" if found else ""
    return (
        f"{proxies}. Is the cluster up (./cluster/local.sh start), and the tunnel to it? --address"
        " or RAY_API_SERVER_ADDRESS names its dashboard"
    )


def check_size(folder: Path, excludes: Sequence[str], excluding: str) -> None:
    """Check that a job server takes a copy of the directory, which Ray sends as one zip file.

    Args:
        excludes: patterns of what is not sent, besides the ignore files.
        excluding: the file that has these patterns, for the message.

    Raises:
        ConfigError: the directory is too large, or a file in it cannot be read.
    """
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE as MOST  # Ray 2.60

    sizes = _sizes(folder, excludes)
    total = sum(size + _ZIP_BYTES + 2 * len(os.fsencode(name)) for name, size in sizes.items())
    if total < MOST:
        return
    largest = sorted(sizes, key=lambda name: -sizes[name])[:SHOWN]
    shown = ", ".join(f"{name} ({_size(sizes[name])})" for name in largest)
    raise ConfigError(
        f"{folder} is too large to be sent with the job: {_size(total)} in {len(sizes)} files, and"
        f" Ray takes less than {_size(MOST)}. The largest: {shown}. Exclude what the job does not"
        f" read from here: in a .gitignore or .rayignore file, or under `excludes` in {excluding}"
    )


def _sizes(folder: Path, excludes: Sequence[str]) -> dict[str, int]:
    """Return the files that Ray would send, by their path in the directory, and their bytes."""
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    found = dict[str, int]()

    def note(path: Path) -> None:
        if path.is_file():
            found[str(path.relative_to(folder))] = path.stat().st_size

    patterns = [*ray_constants.get_runtime_env_default_excludes(), *excludes]
    excluded = [packaging._get_excludes(folder, patterns)]
    uses_gitignore = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    try:
        packaging._dir_travel(folder, excluded, note, uses_gitignore)
        unreadable = [name for name in found if not os.access(folder / name, os.R_OK)]
    except OSError as error:
        raise ConfigError(f"{folder} cannot be sent with the job: {error}") from None
    if unreadable:
        raise ConfigError(
            f"{folder / unreadable[0]} cannot be read, and would be sent with the job; exclude it"
            " in a .rayignore file"
        )
    return found


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
