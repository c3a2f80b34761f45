"""Tests of what a loader counts as loaded when an adapter does not arrive."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import pytest
from conftest import assert_same_change, random_delta
from ray.exceptions import OwnerDiedError

from raywarp.algorithm.deltas import AdapterDelta
from raywarp.rollout.loaders import UnmergedLoader
from raywarp.rollout.protocol import Adapter, AdapterPart


@dataclass(frozen=True)
class Part(AdapterPart):
    """An adapter without an object store; its ref is its content, None after its owner's death."""

    def fetch(self) -> AdapterDelta:
        if self.ref is None:
            raise OwnerDiedError("00", None, "")
        return self.ref  # type: ignore[no-any-return]


class Layers:
    """What an engine's layers hold, by slots."""

    def __init__(self) -> None:
        self.held: dict[int, AdapterDelta] = {}

    def take(
        self, new: Mapping[int, AdapterDelta], kept: Collection[int]
    ) -> Mapping[int, AdapterDelta]:
        self.held = {slot: self.held[slot] for slot in kept} | dict(new)
        return new


def test_an_adapter_that_is_lost_on_its_way_leaves_the_others_in_their_slots() -> None:
    """A call under way still samples from its slot, which the next adapter must not take."""
    layers = Layers()
    loader = UnmergedLoader(layers.take)
    first, second = random_delta(1), random_delta(2)
    under_way = Adapter(policy=Part("first", 4, first))
    after = Adapter(policy=Part("second", 4, second))
    loader.load([under_way])
    with pytest.raises(OwnerDiedError):
        loader.load([Adapter(policy=Part("lost", 4, None)), under_way])
    loader.load([after, under_way])
    assert [loader.request(adapter) for adapter in (under_way, after)] == [0, 1]
    assert_same_change(layers.held[0], first)
    assert_same_change(layers.held[1], second)
