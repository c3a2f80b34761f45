"""Tests of work in turns: calls overlap, each gets its own result or error, one thread does it."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from raywarp.cluster.turns import InTurns, Turns, finish


def test_calls_take_turns_in_one_thread() -> None:
    turns, log = Turns(), list[tuple[str, int]]()
    together = threading.Barrier(2)

    def work(name: str, rounds: int) -> InTurns[str]:
        for n in range(rounds):
            log.append((name, threading.get_ident()))
            time.sleep(0.005)  # longer than it takes a thread to come back for its next turn
            if n == 0:
                # Both have begun before either goes on.
                yield
                while len({name for name, _ in log}) < 2:
                    yield
            yield
        return f"{name} is done"

    def call(name: str) -> str:
        together.wait()
        return turns.finish(work(name, 20))

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(call, "ab")) == ["a is done", "b is done"]
    names = [name for name, _ in log]
    switches = sum(one != other for one, other in itertools.pairwise(names))
    assert switches > 10, names
    assert {thread for _, thread in log} == {turns.thread} != {threading.get_ident()}


def test_an_error_belongs_to_its_own_call() -> None:
    turns = Turns()

    def fail() -> InTurns[None]:
        yield
        raise ValueError("this call")

    def go_on() -> InTurns[int]:
        yield
        return 3

    with pytest.raises(ValueError, match="this call"):
        turns.finish(fail())
    assert turns.finish(go_on()) == finish(go_on()) == 3


def test_seconds_are_those_of_the_work_and_counted_once() -> None:
    turns = Turns()

    def sleep() -> InTurns[None]:
        for _ in range(4):
            threading.Event().wait(0.02)
            yield

    turns.finish(sleep())
    assert 0.08 <= turns.seconds() < 1
    assert turns.seconds() == 0
