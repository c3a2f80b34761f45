"""Tests of what runs with one store make once: the others wait for it, and find it."""

import contextlib
from collections.abc import Iterator, Sequence

from raywarp.cluster.claims import NO_CLAIMS, Claims


def test_what_the_store_has_starts_nothing() -> None:
    done: list[str] = []
    found = NO_CLAIMS.once("x", lambda: "stored", lambda: done.append("start"), lambda: "made")
    assert (found, done) == ("stored", [])


def test_what_it_lacks_is_made_after_the_start() -> None:
    done: list[str] = []

    def make() -> str:
        done.append("make")
        return "made"

    assert NO_CLAIMS.once("x", lambda: None, lambda: done.append("start"), make) == "made"
    assert done == ["start", "make"]


def test_a_run_without_the_claim_waits_and_finds_what_the_other_made() -> None:
    store: list[str] = []

    class Another(Claims):
        @contextlib.contextmanager
        def take(self, keys: Sequence[str]) -> Iterator[set[str]]:
            yield set()

        def wait(self, keys: Sequence[str]) -> None:
            store.append("theirs")

    def make() -> str:
        raise AssertionError("another run makes it")

    assert Another().once("x", lambda: store[0] if store else None, lambda: None, make) == "theirs"
    assert store == ["theirs"]
