"""Submit `raywarp train CONFIG` as a Ray job, follow its log, and end with its exit code.

The cluster is that of RAY_API_SERVER_ADDRESS (http://HOST:8265). The token comes from where `ray
job submit` takes it: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or
~/.ray/auth_token. The job gets a copy of this directory.
"""

import argparse
import asyncio
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from raywarp.cluster import job_server
from raywarp.cluster.address import token_problem
from raywarp.config.load import load_config
from raywarp.config.schema import ConfigError
from raywarp.planning.jobs import absolute_paths

PATIENCE = 60  # seconds without an answer from the job server before following is given up
STOP_SECONDS = 30  # Ray kills what does not end within 3 s of SIGTERM
# Ray's client raises RuntimeError for a refusal.
UNANSWERED = (OSError, RuntimeError, aiohttp.ClientError, RayError)
STOPPED = 143  # exit code of a job that was stopped: 128 + SIGTERM


def main() -> int:
    """Return the job's exit code, or the script's own.

    143: the job was stopped. 130: Ctrl-C; the job goes on. 2: wrong input, or no cluster that takes
    jobs from here. 1: the cluster failed.
    """
    options = parser().parse_args()
    logging.disable(logging.INFO)  # Ray's client logs every upload and closed connection
    address = options.address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
    job = options.follow
    try:
        address = job_server.server_address(address)
        job_server.use(address)
        client = JobSubmissionClient(address)
        if options.stop:
            return stop(client, options.stop)
        if not job:
            job, entrypoint = submit(client, address, options)
            say(f"job {job}: {entrypoint}")
            say(f"  follow it with --follow {job}, stop it with --stop {job}")
        return 0 if options.no_wait else follow(client, job)
    except KeyboardInterrupt:
        say(
            f"\njob {job} goes on; follow it with --follow {job}, stop it with --stop {job}"
            if job
            else "\nnothing was submitted"
        )
        return 130
    except ConfigError as error:
        return fail(error, 2)
    except AuthenticationError:
        return fail(f"{address}: the cluster {token_problem()}", 2)
    except UNANSWERED as error:
        return fail(f"{address}: {' '.join(str(error).split())}", 1)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="submit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = result.add_mutually_exclusive_group(required=True)
    what.add_argument("config", nargs="?", help="YAML file in this directory")
    what.add_argument("--follow", metavar="JOB", help="follow a job that was submitted before")
    what.add_argument("--stop", metavar="JOB", help="stop a job; the same submission continues it")
    result.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override a key, for example warp.steps=20",
    )
    result.add_argument(
        "--command", default="train", help="raywarp's command: train (the default), reward, tune"
    )
    result.add_argument(
        "--address",
        help="of the job server (default: RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265)",
    )
    result.add_argument(
        "--tunnel",
        action="store_true",
        help="the address leads to another machine, though it is 127.0.0.1",
    )
    result.add_argument(
        "--runtime-env",
        type=Path,
        default=Path(__file__).with_name("runtime_env.yaml"),
        metavar="FILE",
    )
    result.add_argument("--no-wait", action="store_true", help="do not follow the job")
    return result


def submit(
    client: JobSubmissionClient, address: str, options: argparse.Namespace
) -> tuple[str, str]:
    """Submit the job; return its id and its command."""
    config = load_config(options.config, options.overrides)
    path = Path(os.path.relpath(options.config))
    if path.parts[0] == "..":
        raise ConfigError(
            f"{options.config} is not in {os.getcwd()}, of which the job gets a copy; start this"
            " where the config lies"
        )
    moved = absolute_paths(config)
    if options.tunnel or not job_server.is_here(address):
        if written := [override for override in moved if override.startswith(("out=", "store="))]:
            key, _, value = written[0].partition("=")
            raise ConfigError(
                f"{key} is relative ({value} here), and the cluster is elsewhere: give a path or"
                " URI that all its nodes see"
            )
        moved = []
    entrypoint = shlex.join(
        ["raywarp", options.command, path.as_posix(), *options.overrides, *moved]
    )
    environment = {**runtime_environment(options.runtime_env), "working_dir": os.getcwd()}
    excludes = environment.get("excludes") or []
    job_server.check_size(Path.cwd(), excludes, str(options.runtime_env))
    job = with_agent(
        lambda: client.submit_job(
            entrypoint=entrypoint, runtime_env=environment, metadata={"raywarp": options.command}
        )
    )
    return job, entrypoint


def runtime_environment(path: Path) -> dict[str, Any]:
    """Return what the file with the runtime environment says."""
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--runtime-env {path}: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict | None):
        raise ConfigError(f"--runtime-env {path} has no keys at its top, such as excludes")
    return found or {}


def with_agent(submission: Callable[[], str]) -> str:
    """Submit again for a while: a cluster that has just started takes no jobs for some seconds."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return submission()
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:  # Ray 2.60
                raise
        time.sleep(1)


class Log:
    """A job's log, printed as it grows, each character once.

    Every connection gets the log from its beginning.
    """

    def __init__(self, client: JobSubmissionClient, job: str):
        self.client, self.job, self.printed = client, job, 0

    async def follow(self) -> None:
        """Print the log until the job ends or the server closes the connection."""
        position = 0
        async for text in self.client.tail_job_logs(self.job):
            self._print(text, position)
            position += len(text)

    def rest(self) -> None:
        """Print what was written between the last look and the job's end."""
        self._print(self.client.get_job_logs(self.job), 0)

    def _print(self, text: str, position: int) -> None:
        print(text[max(0, self.printed - position) :], end="", flush=True)
        self.printed = max(self.printed, position + len(text))


def follow(client: JobSubmissionClient, job: str) -> int:
    """Print the job's log until it ends, across lost connections; return its exit code."""
    client.get_job_info(job)  # an unknown job fails here
    log, lost = Log(client, job), 0.0
    while True:
        connected = time.monotonic()
        try:
            asyncio.run(log.follow())
            if client.get_job_status(job).is_terminal():
                log.rest()
                return outcome(client, job)
        except UNANSWERED as error:
            now = time.monotonic()
            # The time since which the attempts have failed one after another.
            lost = lost if lost and now - connected < PATIENCE / 10 else now
            if now - lost > PATIENCE:
                raise RuntimeError(
                    f"no answer for {PATIENCE} s ({error}); the job may go on, follow it with"
                    f" --follow {job}"
                ) from None
        else:
            lost = 0.0
        time.sleep(1)


def outcome(client: JobSubmissionClient, job: str) -> int:
    """Print how the job ended; return its exit code."""
    info = client.get_job_info(job)
    if info.status == JobStatus.SUCCEEDED:
        say(f"job {job} succeeded")
        return 0
    if info.status == JobStatus.STOPPED:
        say(f"job {job} was stopped; the same submission continues it")
        return STOPPED
    say(f"job {job} failed: {' '.join((info.message or '').split())[:400]}")
    return info.driver_exit_code or 1


def stop(client: JobSubmissionClient, job: str) -> int:
    """Stop a job: wait for its end, and show the last lines of its log.

    The job gets SIGTERM, after which a run saves what it has.
    """
    client.stop_job(job)
    deadline = time.monotonic() + STOP_SECONDS
    while not client.get_job_status(job).is_terminal():
        if time.monotonic() > deadline:
            raise RuntimeError(f"job {job} has not stopped within {STOP_SECONDS} s")
        time.sleep(0.2)
    print("\n".join(client.get_job_logs(job).splitlines()[-5:]))
    outcome(client, job)
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fail(error: object, code: int) -> int:
    say(f"submit.py: {error}")
    return code


if __name__ == "__main__":
    sys.exit(main())
