"""A time limit for a call into code that is not ours, which may be a loop, a wait for a network, or
C code that never lets Python run.
"""

import ctypes
import faulthandler
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from raywarp.storage import scratch
from raywarp.storage.locks import locked

Result = TypeVar("Result")
STUCK_PREFIX = "raywarp-stuck-"
GRACE_SECONDS = 5.0  # for the call to end after it was interrupted, before its process does


class TimeLimitError(Exception):
    """The call took longer than it may; the message says so in seconds."""


class _Interrupt(BaseException):
    """Raised in the middle of the call; no Exception, so that the callee's own handlers let it
    pass.
    """


class TimeLimit:
    """Calls functions with a limit, one at a time.

    Python code is interrupted where it is. What does not end within GRACE_SECONDS of that (C code,
    a wait in the kernel) takes its process with it: `faulthandler` ends it from a thread that needs
    no interpreter, and leaves the stack in a file of this name, by which the process that takes its
    place knows that the call must not be repeated.

    Args:
        seconds: None for no limit.
        name: unique to whoever calls, and the same after a restart.
    """

    def __init__(self, seconds: float | None, name: str):
        self.seconds, self._stack = seconds, Path(tempfile.gettempdir()) / f"{STUCK_PREFIX}{name}"
        self._last_words = ""
        for path in scratch.left(STUCK_PREFIX):
            if not path.stat().st_size:  # of a process that was killed in a call, and not by us
                path.unlink()

    def call(self, function: Callable[[], Result]) -> Result:
        """The function's result.

        Raises:
            TimeLimitError: it took longer, in this process or in the one before.
        """
        if self.seconds is None:
            return function()
        if self._stack.exists() and self._stack.stat().st_size:
            self._last_words = self._stack.read_text()[-2000:]
            self._stack.unlink()
        if self._last_words:
            text = (
                f"took longer than {self.seconds:g} s and could not be interrupted; its process was"
                f" ended at\n{self._last_words}"
            )
            raise TimeLimitError(text)
        with self._stack.open("w") as file, locked(self._stack):
            faulthandler.dump_traceback_later(self.seconds + GRACE_SECONDS, exit=True, file=file)
            try:
                return self._interruptible(function)
            except _Interrupt:
                raise TimeLimitError(f"took longer than {self.seconds:g} s") from None
            finally:
                faulthandler.cancel_dump_traceback_later()
                self._stack.unlink(missing_ok=True)

    def _interruptible(self, function: Callable[[], Result]) -> Result:
        thread, over, lock = threading.get_ident(), threading.Event(), threading.Lock()

        def interrupt() -> None:
            with lock:
                if not over.is_set():
                    over.set()
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(thread), ctypes.py_object(_Interrupt)
                    )

        timer = threading.Timer(self.seconds or 0, interrupt)
        timer.daemon = True
        timer.start()
        try:
            result = function()
            with lock:
                late = over.is_set()
                over.set()
            if late:
                raise _Interrupt
            return result
        finally:
            timer.cancel()
            with lock:
                over.set()
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread), None
            )  # one that came when the call was over
