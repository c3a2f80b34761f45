"""Processes that call a user's reward function in their main thread.

Signals reach only a main thread, and Ray runs the methods of an actor in others. So a synchronous
function runs in the main thread of one of several processes, one batch at a time, and an
asynchronous one in the event loop of a single process, which holds several batches at a time. These
processes are none of Ray's.
"""

import asyncio
import ctypes
import faulthandler
import itertools
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from typing import Any

from raywarp.config import callables
from raywarp.config.rewards import RewardConfig
from raywarp.rewards.functions import is_async, load_function
from raywarp.rewards.reward import Batch, Raw, Reward, RewardError, too_slow
from raywarp.rewards.score import load_reward
from raywarp.rewards.time_limit import TimeLimitError

GRACE_SECONDS = 10.0  # a process that is this late to end itself is killed
DEATHS = 3  # of the processes at one batch, after which the reward has failed
START_SECONDS = 600.0
ASYNC_CALLS = 16
LOOK_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


class ProcessDied(Exception):
    """A reward's process died while it worked. The message says how."""


@dataclass(frozen=True)
class Source:
    """What a process needs to load a reward function.

    Attributes:
        folder: where the user's modules are.
        paths: sys.path of the driver.
        content: the pickled function, where no process can import it.
    """

    config: RewardConfig
    folder: str
    paths: list[str] = field(default_factory=list)
    content: bytes | None = None

    @classmethod
    def here(cls, config: RewardConfig) -> "Source":
        """Return the source of a reward as this process sees it."""
        path, content = config.function or "", None
        if path.startswith((callables.PREFIX, "__main__:")):
            import cloudpickle

            content = cloudpickle.dumps(load_function(path))
        return cls(config, os.getcwd(), [path for path in sys.path if path], content)

    def enter(self) -> None:
        """Make this process see what the driver sees: folder, modules, and the function itself."""
        with suppress(OSError):
            os.chdir(self.folder)
        sys.path += [path for path in self.paths if path not in sys.path]
        if self.content is not None:
            callables.keep(self.config.function or "", pickle.loads(self.content))


def calls_at_once(config: RewardConfig) -> int:
    """Return how many batches a reward's processes take at a time."""
    if config.function and is_async(load_function(config.function)):
        return max(config.concurrency, ASYNC_CALLS)
    return config.concurrency


class FunctionProcess:
    """One process, from outside. Calls may come from several threads.

    Attributes:
        is_async: whether it can hold several batches at a time.
    """

    def __init__(self, source: Source, environment: dict[str, str] | None = None):
        ours, theirs = Pipe()
        # Without a name, so that nothing of it stays when this process is killed.
        self._stack = tempfile.TemporaryFile()  # noqa: SIM115
        passed = [theirs.fileno(), self._stack.fileno()]
        command = f"from raywarp.rewards.process import main; main(*{passed})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", command],
            pass_fds=passed,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        theirs.close()
        self._connection, self._lock = ours, threading.Lock()
        self._numbers, self._pending = itertools.count(), dict[int, Future[Any]]()
        self._ended = False
        started = self._pending[next(self._numbers)] = Future[Any]()
        ours.send(source)
        self._reader = threading.Thread(target=self._receive, daemon=True)
        self._reader.start()
        self.is_async: bool = self._result(started, START_SECONDS)

    def call(self, batch: Batch, seconds: float | None) -> list[Raw]:
        """Return the raw scores of a batch.

        Raises:
            RewardError: the function failed.
            TimeLimitError: it took longer than `seconds`.
            ProcessDied: the process died.
        """
        future = Future[Any]()
        with self._lock:
            if self._ended:
                raise ProcessDied(self._death())
            number = next(self._numbers)
            self._pending[number] = future
            with suppress(OSError):  # it has died, and the reader says so
                self._connection.send((number, batch, seconds))
        scores: list[Raw] = self._result(future, seconds)
        return scores

    def close(self) -> None:
        """End the process, and those that the function has started in it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        # Else it may read what the next process sends: the descriptor's number is used again.
        self._reader.join(GRACE_SECONDS)
        with suppress(OSError):
            self._connection.close()

    def _result(self, future: "Future[Any]", seconds: float | None) -> Any:
        try:
            return future.result(None if seconds is None else seconds + GRACE_SECONDS)
        except FutureTimeoutError:
            self.close()
            raise TimeLimitError(f"took longer than {seconds:g} s") from None
        except ProcessDied:
            if stack := os.pread(self._stack.fileno(), 1 << 20, 0).decode()[-2000:]:
                text = f"took longer than {seconds:g} s; its process was ended at\n{stack}"
                raise TimeLimitError(text) from None
            raise

    def _receive(self) -> None:
        while True:
            try:
                # Processes that the function has forked keep the connection open after its death.
                if not self._connection.poll(LOOK_SECONDS):
                    if self.process.poll() is None:
                        continue
                    break
                number, is_error, value = self._connection.recv()
            except (EOFError, OSError):
                break
            future = self._pending.pop(number)
            future.set_exception(value) if is_error else future.set_result(value)
        self.process.wait()
        with self._lock:
            self._ended, pending = True, list(self._pending.values())
            self._pending.clear()
        for future in pending:
            future.set_exception(ProcessDied(self._death()))

    def _death(self) -> str:
        code = self.process.returncode
        return f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"


class FunctionProcesses:
    """All processes of one reward function.

    Raises:
        ConfigError: the function cannot be loaded in a process.
    """

    def __init__(self, source: Source, environment: dict[str, str] | None = None):
        self.source, self.environment = source, environment
        first = self._start()
        self._shared = first.is_async
        count = 1 if self._shared else source.config.concurrency
        self._free: queue.SimpleQueue[FunctionProcess] = queue.SimpleQueue()
        self._all = [first, *(self._start() for _ in range(count - 1))]
        self._lock = threading.Lock()
        for process in self._all:
            self._free.put(process)

    def score(self, batch: Batch) -> list[Raw]:
        """Return the raw scores of a batch. A batch at which a process died is asked again.

        Raises:
            RewardError: the function failed, its processes died at this batch, or it took longer
                than its timeout_seconds.
        """
        config = self.source.config
        for _ in range(DEATHS):
            process = self._take()
            try:
                return process.call(batch, config.timeout_seconds)
            except ProcessDied as error:
                cause = str(error)
            except TimeLimitError as error:
                raise too_slow(config.function, error, len(batch.completions)) from None
            finally:
                self._give(process)
        raise RewardError(
            f"reward {config.function}: its process died {DEATHS} times ({cause}) at one batch of"
            f" {len(batch.completions)} completions; it may lack memory"
        )

    def close(self) -> None:
        for process in self._all:
            process.close()

    def _start(self) -> FunctionProcess:
        try:
            return FunctionProcess(self.source, self.environment)
        except ProcessDied as error:
            raise RewardError(
                f"reward {self.source.config.function}: its process died at the start ({error})"
            ) from None

    def _take(self) -> FunctionProcess:
        if not self._shared:
            process = self._free.get()
            return process if process.process.poll() is None else self._replace(process)
        with self._lock:
            if self._all[0].process.poll() is not None:
                self._replace(self._all[0])
            return self._all[0]

    def _give(self, process: FunctionProcess) -> None:
        if not self._shared:
            self._free.put(process)

    def _replace(self, process: FunctionProcess) -> FunctionProcess:
        process.close()
        new = self._all[self._all.index(process)] = self._start()
        return new


def main(descriptor: int, stack: int) -> None:
    """Serve batches until the other end is closed: the body of a process.

    Args:
        descriptor: of the connection.
        stack: of the file that gets the stack of a call that takes too long.
    """
    _die_with_parent()
    for one in (descriptor, stack):
        os.set_inheritable(one, False)
    connection = Connection(descriptor)
    source: Source = connection.recv()
    source.enter()
    try:
        reward = load_reward(source.config)
    except Exception as error:
        return connection.send((0, True, error))
    own = is_async(reward.function)
    connection.send((0, False, own))
    (_serve_async if own else _serve)(connection, reward, stack)


def _serve(connection: Connection, reward: Reward, stack: int) -> None:
    with open(stack, "w") as file, suppress(EOFError, OSError):
        while True:
            number, batch, seconds = connection.recv()
            if seconds is not None:
                faulthandler.dump_traceback_later(seconds, exit=True, file=file)
            answer = _answer(reward, batch)
            faulthandler.cancel_dump_traceback_later()
            connection.send((number, *answer))


def _serve_async(connection: Connection, reward: Reward, _: int) -> None:
    loop = asyncio.new_event_loop()
    lock = threading.Lock()

    async def serve(number: int, batch: Batch, seconds: float | None) -> None:
        answer = await _answer_async(reward.raw_async(batch), seconds)
        with lock:
            connection.send((number, *answer))

    def read() -> None:
        with suppress(EOFError, OSError):
            while True:
                asyncio.run_coroutine_threadsafe(serve(*connection.recv()), loop)
        loop.call_soon_threadsafe(loop.stop)

    threading.Thread(target=read, daemon=True).start()
    loop.run_forever()


def _answer(reward: Reward, batch: Batch) -> tuple[bool, Any]:
    try:
        return False, reward.raw(batch)
    except Exception as error:
        return True, _sendable(error)


async def _answer_async(work: Coroutine[Any, Any, Any], seconds: float | None) -> tuple[bool, Any]:
    try:
        return False, await asyncio.wait_for(work, seconds)
    except TimeoutError:
        return True, TimeLimitError(f"took longer than {seconds:g} s")
    except Exception as error:
        return True, _sendable(error)


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RewardError(f"{type(error).__name__}: {error}")


def _die_with_parent() -> None:
    """End this process when the one that started it ends, also in the middle of a call (Linux)."""
    parent = os.getppid()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
