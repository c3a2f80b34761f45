"""`raywarp push`: upload a run's chosen adapter to a model hub, with its card and picture."""

import argparse
from pathlib import Path
from typing import Any

from raywarp.config.schema import ConfigError
from raywarp.storage.location import Storage
from raywarp.storage.sealed import MANIFEST, DamagedError, StoreError

CARD = "README.md"


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
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    parser.set_defaults(command=_push)


def _operations(folder: Path, mark: Any) -> list[Any]:
    """Return an upload operation for each file of the adapter's folder.

    If an earlier version sampled the run, its card gets the run's mark.
    """
    from huggingface_hub import CommitOperationAdd

    from raywarp.run.card import marked

    contents = {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and path.name != MANIFEST
    }
    if mark and CARD in contents:
        contents[CARD] = marked(contents[CARD].decode(errors="replace"), mark).encode()
    return [CommitOperationAdd(name, content) for name, content in contents.items()]


def _push(options: argparse.Namespace) -> None:
    print(push(options.run, options.repo, options.private, options.revision))


def push(run: str, repo: str, private: bool = False, revision: str | None = None) -> str:
    """Upload the adapter in one commit, and return the commit's URL.

    Args:
        run: a run's folder, or s3://bucket/prefix.
        repo: USER/NAME of the model's repository, which is made if it is not there.
        private: make a new repository private.
        revision: the branch, which is made if it is not there; by default main.

    Raises:
        ConfigError: there is no whole adapter, no token, or the hub refuses the name.
        StoreError: the hub cannot be reached, or refuses the files.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    from raywarp.run.folder import read_mark

    # The base class is from httpx, or from the library that replaced it.
    http_error: Any = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    try:
        folder = Storage(run).fetch("adapter")
    except DamagedError as error:
        raise ConfigError(f"{error}; `raywarp train` makes it anew") from None
    if folder is None:
        raise ConfigError(f"{run} has no adapter/: is it the folder of a finished run?")
    hub = HfApi()
    try:
        repo = hub.create_repo(repo, private=private, exist_ok=True).repo_id
        if revision:
            hub.create_branch(repo, branch=revision, exist_ok=True)
        message = "Adapter aligned with WARP by raywarp"
        done = hub.create_commit(
            repo,
            _operations(folder, read_mark(Storage(run))),
            revision=revision,
            commit_message=message,
        )
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
    return str(done.commit_url)
