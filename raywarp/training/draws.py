"""Which prompts a policy is trained on in each step."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from raywarp.config.schema import Config
from raywarp.data.prompt_set.table import Prompts
from raywarp.data.text import Prompt
from raywarp.identity import batch_indices, derive_seed
from raywarp.run.policy_files import Job


def draws(config: Config, job: Job, step: int, population: int) -> list[int]:
    """Return the indices of the prompts of one step of a policy.

    Args:
        population: number of training prompts.
    """
    count = config.optim.batch_size // config.rollout.completions_per_prompt
    order = derive_seed(config.seed, "prompts", job.iteration, job.index)
    return batch_indices(population, count, step, order)


@dataclass(frozen=True)
class Drawn(Sequence[Prompt]):
    """Training prompts of which only those are here that some policy draws.

    Attributes:
        population: number of training prompts.
        prompts: those that are here, by index.
    """

    population: int
    prompts: Mapping[int, Prompt]

    def __len__(self) -> int:
        return self.population

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | Sequence[Prompt]:
        if isinstance(index, slice):
            return [self.prompts[n] for n in range(self.population)[index]]
        return self.prompts[index]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self[:])


def drawn(config: Config, jobs: Sequence[Job], prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """Return training prompts to send to the actors: only those that these jobs draw."""
    if not isinstance(prompts, Prompts):
        return list(prompts)
    wanted = {
        n
        for job in jobs
        for own in [config.of_policy(job.index)]
        for step in range(own.warp.steps)
        for n in draws(own, job, step, len(prompts))
    }
    return Drawn(len(prompts), prompts.chosen(sorted(wanted)))


def drawn_by_each(
    config: Config,
    jobs: Sequence[Job],
    prompts: Sequence[Prompt] | Mapping[int, Sequence[Prompt]],
) -> dict[int, Sequence[Prompt]]:
    """Return `drawn` of each policy's training prompts; policies of the same ones share them.

    Args:
        prompts: training prompts of all policies, or of each by its index.
    """
    found: dict[int, Sequence[Prompt]] = {}
    of = {
        job.index: prompts[job.index] if isinstance(prompts, Mapping) else prompts for job in jobs
    }
    for population in {id(own): own for own in of.values()}.values():
        theirs = [job for job in jobs if of[job.index] is population]
        found |= dict.fromkeys([job.index for job in theirs], drawn(config, theirs, population))
    return found
