"""`raywarp push`: upload a run's chosen adapter to a model hub, with its card and picture.

The other points of the front's line go with it on demand.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raywarp.config.schema import ConfigError
from raywarp.storage import sealed
from raywarp.storage.location import Storage
from raywarp.storage.sealed import MANIFEST, StoreError

CARD = "README.md"
Files = dict[str, bytes]


def add_push(commands: Any) -> None:
    """Add the command `push`."""
    text = "upload a run's chosen adapter with its card to a model hub"
    parser = commands.add_parser(
        "push",
        help=text,
        description=f"{text[0].upper()}{text[1:]}. HF_TOKEN or `hf auth login` says who you are.",
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, or s3://bucket/prefix")
    parser.add_argument(
        "repo", metavar="USER/NAME", help="the model's repository, which is made if it is not there"
    )
    parser.add_argument(
        "--private", action="store_true", help="make a new repository that only you see"
    )
    parser.add_argument(
        "--revision",
        metavar="BRANCH",
        help="upload to this branch, which is made if it is not there; default: main",
    )
    parser.add_argument(
        "--points",
        choices=("subfolders", "revisions"),
        help=(
            "upload each measured point of the line from SFT through SLERP, too: to eta-0.5/, …"
            " beside the chosen adapter, or to branches of these names; one card tells them all"
        ),
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    parser.set_defaults(command=_push)


def _push(options: argparse.Namespace) -> None:
    print(push(options.run, options.repo, options.private, options.revision, options.points))


def push(
    run: str,
    repo: str,
    private: bool = False,
    revision: str | None = None,
    points: str | None = None,
) -> str:
    """Upload the adapter in one commit, and return the commit's URL.

    Args:
        run: a run's folder, or s3://bucket/prefix.
        repo: USER/NAME of the model's repository, which is made if it is not there.
        private: make a new repository private.
        revision: the branch, which is made if it is not there; by default main.
        points: "subfolders" uploads each point of the front's line in the same commit, to a folder
            of its own. "revisions" uploads each to a branch of its own before. None: no other
            point.

    Raises:
        ConfigError: there is no whole adapter, no token, or the hub refuses the name.
        StoreError: the hub cannot be reached, or refuses the files.
    """
    from huggingface_hub import HfApi

    from raywarp.run.history import fetched

    storage, hub = Storage(run), HfApi()
    files = _files(fetched(storage, "adapter"))
    line = _line(storage) if points else {}
    files[CARD] = _card(files.get(CARD, b""), storage, list(line), points).encode()
    if points == "subfolders":
        files |= {f"{name}/{one}": data for name, own in line.items() for one, data in own.items()}
    with _explained(repo, hub):
        repo = hub.create_repo(repo, private=private, exist_ok=True).repo_id
        for name, own in line.items() if points == "revisions" else ():
            _commit(hub, repo, {**own, CARD: files[CARD]}, name)
        return _commit(hub, repo, files, revision)


def _files(folder: Path) -> Files:
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and path.name != MANIFEST
    }


def _line(storage: Storage) -> dict[str, Files]:
    """Return the files of the adapter at each measured η of the front but 0, by its name."""
    from raywarp.adapters.line import save_line
    from raywarp.run.config_file import CONFIG_FILE, read_saved_config
    from raywarp.run.folder import FRONT_FILE
    from raywarp.run.history import fetched, last_iteration

    data, saved = storage.read(FRONT_FILE), storage.read(CONFIG_FILE)
    if data is None or saved is None:
        raise ConfigError(f"{storage.uri} has no front: is it the folder of a finished run?")
    points = sealed.parse_record(data, FRONT_FILE)["points"]
    etas = sorted(point["eta"] for point in points if point["eta"])
    merged = fetched(storage, f"iterations/{last_iteration(storage)}/merged")
    with tempfile.TemporaryDirectory(prefix="raywarp-push-") as folder:
        sft_adapter = (read_saved_config(saved) or {}).get("sft_adapter")
        found = save_line(merged, sft_adapter, etas, Path(folder))
        return {name: _files(place) for name, place in found.items()}


def _card(card: bytes, storage: Storage, names: list[str], points: str | None) -> str:
    """Return the adapter's card with what it says of other points, and the mark of an old run."""
    from raywarp.run.card import marked, with_points
    from raywarp.run.folder import read_mark

    text = card.decode(errors="replace")
    mark = read_mark(storage)
    text = marked(text, mark) if mark else text
    return with_points(text, names, points) if points else text


def _commit(hub: Any, repo: str, files: Mapping[str, bytes], branch: str | None) -> str:
    """Upload files in one commit, to a branch that is made if it is not there."""
    from huggingface_hub import CommitOperationAdd

    if branch:
        hub.create_branch(repo, branch=branch, exist_ok=True)
    done = hub.create_commit(
        repo,
        [CommitOperationAdd(name, data) for name, data in files.items()],
        revision=branch,
        commit_message="Adapter aligned with WARP by raywarp",
    )
    return str(done.commit_url)


@contextmanager
def _explained(repo: str, hub: Any) -> Iterator[None]:
    """Turn the hub's errors into those that `push` documents."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    # The base class is from httpx, or from the library that replaced it.
    http_error: Any = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    try:
        yield
    except HFValidationError as error:
        raise ConfigError(f"{repo} is no repository's name: {error}") from None
    except LocalTokenNotFoundError:
        raise ConfigError(
            "the hub does not know who you are: set HF_TOKEN, or run `hf auth login`"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise ConfigError(
                f"the hub does not let you write to {repo} (status {status}): does HF_TOKEN have"
                " the right to?"
            ) from None
        raise StoreError(f"the hub refused {repo}: {' '.join(str(error).split())}") from None
    except (http_error, OSError) as error:
        raise StoreError(f"the hub {hub.endpoint} cannot be reached: {error}") from None
