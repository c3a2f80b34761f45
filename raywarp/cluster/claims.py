"""Claims on policies: when several runs share a store, each policy is trained by one of them.

One named actor per store keeps the table of claims. It lives as long as anybody has a claim there.
A claim lives as long as the actor that made it. Ray reports every death at once, so no lease has to
run out, and a process that is only held up loses nothing.

A run trains what it was granted before it waits for others, and holds no claim while it waits. So
runs cannot wait in a circle. If the table itself is lost, two runs may train the same policy. The
first to finish wins, as everywhere in a store.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, RayActorError

from raywarp import identity
from raywarp.cluster import runtime

Result = TypeVar("Result")

NAMESPACE = "raywarp"
FOLDER = "folder "  # prefix of a trial's folder, which is claimed as a policy is
CLAIM_POLL_SECONDS = 0.5  # time between two looks at the claims of other runs
IDLE_SECONDS = 60.0  # the table's process ends after this time without a claim or a call


class Elsewhere(Exception):
    """Another run is training policies of an iteration, and this run has to wait for them."""

    def __init__(self, iteration: int, keys: Sequence[str]):
        super().__init__(iteration, list(keys))
        self.iteration, self.keys = iteration, list(keys)

    def __str__(self) -> str:
        return (
            f"{len(self.keys)} policies of iteration {self.iteration} are trained by another run:"
            f" {', '.join(self.keys)}"
        )


class ClaimTable:
    """The owner of each key, without Ray.

    Args:
        lives: says whether an owner is still alive.
    """

    def __init__(self, lives: Callable[[str], bool]):
        self._lives, self.owner_of = lives, dict[str, str]()

    def take(self, owner: str, keys: Sequence[str]) -> list[str]:
        """Claim keys for an owner, and return those that it now has.

        These are keys that were free, that a dead owner left behind, or that were its own already.
        """
        self.bury()
        for key in keys:
            self.owner_of.setdefault(key, owner)
        return [key for key in keys if self.owner_of[key] == owner]

    def release(self, owner: str, keys: Sequence[str]) -> None:
        for key in keys:
            if self.owner_of.get(key) == owner:
                del self.owner_of[key]

    def held(self, owner: str, keys: Sequence[str]) -> list[str]:
        """Return those of the keys that other living owners have."""
        self.bury()
        return [key for key in keys if self.owner_of.get(key, owner) != owner]

    @property
    def owners(self) -> set[str]:
        return set(self.owner_of.values())

    def keys_of(self, prefix: str) -> list[str]:
        """Return the keys of the owners whose names begin with the prefix."""
        return [key for key, owner in self.owner_of.items() if owner.startswith(prefix)]

    def bury(self) -> None:
        """Forget the claims of dead owners."""
        dead = {owner for owner in self.owners if not self._lives(owner)}
        self.owner_of = {key: owner for key, owner in self.owner_of.items() if owner not in dead}


class ClaimActor:
    """The claim table as an actor. It also tells a sweep's trials to stop.

    It watches the owners' actors, and drops the claims of those that die.
    """

    def __init__(self) -> None:
        self._table = ClaimTable(self._lives)
        self._handles: dict[str, Any] = {}
        self._pings: dict[str, Any] = {}
        self._stopping: set[str] = set()
        self._asked, self._lock = time.monotonic(), threading.Lock()
        threading.Thread(target=self._end_when_idle, daemon=True).start()

    def take(self, owner: str, handle: list[Any], keys: Sequence[str]) -> list[str]:
        """Claim keys for an owner, see ClaimTable.take.

        Args:
            owner: its name begins with that of its sweep.
            handle: a list with one item, the handle of the owner's actor.
        """
        with self._asking():
            self._handles[owner] = handle[0]
            return self._table.take(owner, keys)

    def release(self, owner: str, keys: Sequence[str]) -> None:
        with self._asking():
            self._table.release(owner, keys)

    def held(self, owner: str, keys: Sequence[str]) -> list[str]:
        with self._asking():
            return self._table.held(owner, keys)

    def owners(self) -> dict[str, str]:
        """Return the owner of each claimed key."""
        with self._asking():
            return dict(self._table.owner_of)

    def stop(self, sweep: str) -> None:
        """Tell the sweep's trials to save what they are training, and to end."""
        with self._asking():
            self._stopping.add(sweep)

    def stopping(self, sweep: str) -> bool:
        with self._asking():
            return sweep in self._stopping

    def trials(self, sweep: str) -> tuple[list[Any], int]:
        """Return the actors of a sweep's living trials, and how many policies they are training."""
        with self._asking():
            keys = self._table.keys_of(sweep)
            owners = {owner for owner in self._table.owners if owner.startswith(sweep)}
            return [self._handles[owner] for owner in owners], sum(
                not key.startswith(FOLDER) for key in keys
            )

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        with self._lock:
            self._asked = time.monotonic()
            yield

    def _lives(self, owner: str) -> bool:
        """Return whether Ray does not know the owner's actor as dead.

        An actor that is busy or held up only answers later.
        """
        ping = self._pings.get(owner)
        if ping is None:
            ping = self._pings[owner] = self._handles[owner].__ray_ready__.remote()
        if not ray.wait([ping], timeout=0)[0]:
            return True
        del self._pings[owner]
        try:
            ray.get(ping)
        except ActorUnavailableError:
            return True
        except RayActorError:
            return False
        return True

    def _end_when_idle(self) -> None:
        while True:
            time.sleep(1)
            with self._lock:
                self._table.bury()
                for gone in self._handles.keys() - self._table.owners:
                    del self._handles[gone]
                    self._pings.pop(gone, None)
                if not self._table.owners and time.monotonic() - self._asked > IDLE_SECONDS:
                    os._exit(0)


class Claims:
    """The claims of a run that shares its store with no other: every key is granted."""

    alone = True

    @contextlib.contextmanager
    def take(self, keys: Sequence[str]) -> Iterator[set[str]]:
        """Yield those of the keys that this run may train inside the `with` block."""
        yield set(keys)

    def begin(self, iteration: int, keys: Sequence[str]) -> None:
        """Accept notice of the policies that are about to be trained. Nobody else needs it here."""

    def wait(self, keys: Sequence[str]) -> None:
        """Return at once, since no other run has any key."""

    def once(
        self,
        name: str,
        find: Callable[[], Result | None],
        start: Callable[[], None],
        make: Callable[[], Result],
    ) -> Result:
        """Return what the store has, or make it; of several runs one makes it, and the others wait.

        Args:
            name: of what is made, in the store.
            find: returns it from the store, or None.
            start: starts what `make` needs. It runs before the claim: a run that has the claim must
                not wait for resources that a waiting run holds.
            make: makes and stores it.
        """
        if (found := find()) is not None:
            return found
        start()
        while True:
            with self.take([claimed := f"{FOLDER}{name}"]) as taken:
                if (found := find()) is not None:
                    return found
                if taken:
                    return make()
            self.wait([claimed])


NO_CLAIMS = Claims()


class Table:
    """A connection to a store's ClaimActor. The first run that asks creates that actor.

    Args:
        place: URI or folder of the store, the same text for all runs.
    """

    def __init__(self, place: str):
        self.name = f"raywarp-claims-{identity.content_key(place)}"
        self._actor: Any = None

    def ask(
        self, method: str, *arguments: Any, restore: Callable[[Any], None] = lambda actor: None
    ) -> Any:
        """Return what the actor's method returns. If the actor was lost, ask a new one.

        Args:
            restore: is called with each actor that is opened, before it is asked.
        """
        while True:
            try:
                if self._actor is None:
                    self._actor = self._open()
                    restore(self._actor)
                return ray.get(getattr(self._actor, method).remote(*arguments))
            except ActorUnavailableError:
                time.sleep(0.1)
            except (RayActorError, ValueError):  # ValueError: the name is just being released
                self._actor = None
                time.sleep(0.1)

    def _open(self) -> Any:
        options: Any = {
            "name": self.name,
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "get_if_exists": True,
            "num_cpus": 0,
        }
        return ray.remote(ClaimActor).options(**options).remote()


class SharedClaims(Claims):
    """The claims of a run in its own actor, on a store that other such runs use too.

    Args:
        place: see Table.
        sweep: name of the sweep, with which its owners' names begin.
        begins: is called with the iteration and keys that are about to be trained.
    """

    alone = False

    def __init__(self, place: str, sweep: str, begins: Callable[[int, Sequence[str]], None]):
        self.table, self._begins = Table(place), begins
        context = ray.get_runtime_context()
        self.owner, self.handle = f"{sweep} {context.get_actor_id()}", context.current_actor
        self.mine: set[str] = set()

    def begin(self, iteration: int, keys: Sequence[str]) -> None:
        self._begins(iteration, keys)

    @contextlib.contextmanager
    def take(self, keys: Sequence[str]) -> Iterator[set[str]]:
        before, taken = set(self.mine), set(self._ask("take", [self.handle], list(keys)))
        self.mine |= taken
        try:
            yield taken
        finally:
            self.mine = before
            self._ask("release", sorted(taken - before))

    def wait(self, keys: Sequence[str]) -> None:
        """Wait until no other run trains any of the keys.

        By then each key is finished, or its owner has died or given up.
        """
        while self.held(keys):
            runtime.check()
            time.sleep(CLAIM_POLL_SECONDS)

    def held(self, keys: Sequence[str]) -> list[str]:
        """Return those of the keys that other runs are training."""
        held: list[str] = self._ask("held", list(keys))
        return held

    def _ask(self, method: str, *arguments: Any) -> Any:
        return self.table.ask(method, self.owner, *arguments, restore=self._restore)

    def _restore(self, actor: Any) -> None:
        """Tell a new table which keys this run has."""
        if self.mine:
            ray.get(actor.take.remote(self.owner, [self.handle], sorted(self.mine)))
