"""A time limit for calls into foreign code, such as a loop, a network wait or C code."""

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
GRACE_SECONDS = 5.0  # an interrupted call that lasts longer than this ends its process


class TimeLimitError(Exception):
    """The call took longer than its limit. The message gives the limit in seconds."""


class _Interrupt(BaseException):
    """Raised in the middle of the call.

    It is no Exception, so the callee's own handlers let it pass.
    """


class TimeLimit:
    """Calls functions with a time limit, one at a time.

    Python code is interrupted where it is. Other code, such as C code or a wait in the kernel, may
    not end within GRACE_SECONDS after that. Then `faulthandler` ends the process, from a thread
    that needs no interpreter. It leaves the stack in a file of this name. From that file the next
    process knows that the call must not be repeated.

    Args:
        seconds: None for no limit.
        name: unique to the caller, and the same after a restart.
    """

    def __init__(self, seconds: float | None, name: str):
        self.seconds, self._stack = seconds, Path(tempfile.gettempdir()) / f"{STUCK_PREFIX}{name}"
        self._last_words = ""
        for path in scratch.left(STUCK_PREFIX):
            # An empty file is of a process that others killed during a call.
            if not path.stat().st_size:
                path.unlink()

    def call(self, function: Callable[[], Result]) -> Result:
        """Return the function's result.

        Raises:
            TimeLimitError: the call took too long, in this process or in the one before.
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
            # Clear an interrupt that came when the call was over.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)
