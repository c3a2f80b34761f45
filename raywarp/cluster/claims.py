"""Who is at work on which policy, where several runs share a store: each is trained once, whoever
dies meanwhile.

One named actor per store keeps the table. It lives as long as anybody has a claim there, and a
claim lives as long as the actor that made
it: Ray tells of a death at once, however it came, so nothing waits for a lease to run out, and a
process that is only held up for a while loses nothing. A run trains what it was granted before it
waits for others, and holds nothing while it waits: nobody waits in a circle. If the table itself is
lost, two runs may train the same policy; the first to finish wins, as everywhere in a store.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError

from raywarp import identity
from raywarp.cluster import runtime

NAMESPACE = "raywarp"
FOLDER = "folder "  # before the name of a trial's folder, which is claimed like a policy
CLAIM_POLL_SECONDS = 0.5  # between two looks at claims of others
IDLE_SECONDS = 60.0  # without a claim or a question, after which the table's process ends


class Elsewhere(Exception):
    """Policies of an iteration are under way in another run, and have to be waited for."""

    def __init__(self, iteration: int, keys: Sequence[str]):
        super().__init__(iteration, list(keys))
        self.iteration, self.keys = iteration, list(keys)

    def __str__(self) -> str:
        return (
            f"{len(self.keys)} policies of iteration {self.iteration} are trained by another run:"
            f" {', '.join(self.keys)}"
        )


class ClaimTable:
    """Key → owner. No Ray: `lives` says whether an owner still does."""

    def __init__(self, lives: Callable[[str], bool]):
        self._lives, self.owner_of = lives, dict[str, str]()

    def take(self, owner: str, keys: Sequence[str]) -> list[str]:
        """Those of the keys that this owner has now: free before, left behind by somebody dead, or
        its own already.
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
        """Those of the keys that living others have."""
        self.bury()
        return [key for key in keys if self.owner_of.get(key, owner) != owner]

    @property
    def owners(self) -> set[str]:
        return set(self.owner_of.values())

    def keys_of(self, prefix: str) -> list[str]:
        """Those of the owners whose names begin so."""
        return [key for key, owner in self.owner_of.items() if owner.startswith(prefix)]

    def bury(self) -> None:
        """Forget the claims of the dead."""
        dead = {owner for owner in self.owners if not self._lives(owner)}
        self.owner_of = {key: owner for key, owner in self.owner_of.items() if owner not in dead}


class ClaimActor:
    """The table as an actor, which watches the owners' actors; and the bell by which a sweep's
    trials are told to stop.
    """

    def __init__(self) -> None:
        self._table = ClaimTable(self._lives)
        self._handles: dict[str, Any] = {}
        self._pings: dict[str, Any] = {}
        self._stopping: set[str] = set()
        self._asked, self._lock = time.monotonic(), threading.Lock()
        threading.Thread(target=self._end_when_idle, daemon=True).start()

    def take(self, owner: str, handle: list[Any], keys: Sequence[str]) -> list[str]:
        """See ClaimTable. handle: of the owner's actor, in a list of one. An owner's name begins
        with its sweep's.
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
        """Key → owner, for whoever wants to look."""
        with self._asking():
            return dict(self._table.owner_of)

    def stop(self, sweep: str) -> None:
        """Let the sweep's trials save what is under way, and end."""
        with self._asking():
            self._stopping.add(sweep)

    def stopping(self, sweep: str) -> bool:
        with self._asking():
            return sweep in self._stopping

    def trials(self, sweep: str) -> tuple[list[Any], int]:
        """The actors of a sweep's living trials, and the number of policies that they are at work
        on.
        """
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
        """An actor that is at work answers later, as does one that is held up; one that has died is
        known to Ray.
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
    """What a run that shares its store with nobody asks of others: nothing."""

    alone = True

    @contextlib.contextmanager
    def take(self, keys: Sequence[str]) -> Iterator[set[str]]:
        """In the body those of the keys that it yields are this run's, to be trained."""
        yield set(keys)

    def begin(self, iteration: int, keys: Sequence[str]) -> None:
        """Hears of those that are about to be trained."""


NO_CLAIMS = Claims()


class Table:
    """The way to a store's ClaimActor, which is made by whoever asks first.

    Args:
        place: URI or folder of the store, the same text for all.
    """

    def __init__(self, place: str):
        self.name = f"raywarp-claims-{identity.content_key(place)}"
        self._actor: Any = None

    def ask(
        self, method: str, *arguments: Any, restore: Callable[[Any], None] = lambda actor: None
    ) -> Any:
        """What the method returns; where the table was lost, from a new one. restore: is given that
        first.
        """
        while True:
            try:
                if self._actor is None:
                    self._actor = self._open()
                    restore(self._actor)
                return ray.get(getattr(self._actor, method).remote(*arguments))
            except ActorUnavailableError:
                time.sleep(0.1)
            except (RayActorError, ValueError):  # the latter: of a name that is just being given up
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
    """Of a run in an actor of its own, on a store whose other users do the same.

    Args:
        place: see Table. sweep: its name, which begins the owners'.
        begins: hears of what is about to be trained.
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
        """Until nobody else is at work on any of the keys: they are finished, or whoever was has
        died or given up.
        """
        while self.held(keys):
            runtime.check()
            time.sleep(CLAIM_POLL_SECONDS)

    def held(self, keys: Sequence[str]) -> list[str]:
        """Those that others are at work on."""
        held: list[str] = self._ask("held", list(keys))
        return held

    def _ask(self, method: str, *arguments: Any) -> Any:
        return self.table.ask(method, self.owner, *arguments, restore=self._restore)

    def _restore(self, actor: Any) -> None:
        """Tell a new table of what is ours."""
        if self.mine:
            ray.get(actor.take.remote(self.owner, [self.handle], sorted(self.mine)))
