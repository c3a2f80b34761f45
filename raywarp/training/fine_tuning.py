"""Stage 1: fine-tune the policies. When an actor dies, resume its policies from checkpoints."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from raywarp.cluster import faults, health, placement_groups, runtime
from raywarp.cluster.faults import Failures, FaultError
from raywarp.cluster.supervisor import ActorSlot, hang_of
from raywarp.config.schema import Config
from raywarp.run.policy_files import Job
from raywarp.storage.sealed import StoreError
from raywarp.training.progress import task_name

TICK = 0.25  # seconds between two checks of everything but the policies' events


@dataclass
class PolicyProgress:
    """How far one policy has come.

    Attributes:
        step: finished steps at present.
        furthest: the most finished steps so far.
        resumed: step of the checkpoint that it was resumed from.
        lost_at: when its actor was lost, on the monotonic clock.
        lost_step: its step at that time.
    """

    job: Job
    failures: Failures
    step: int = 0
    furthest: int = 0
    resumed: int = 0
    done: bool = False
    lost_at: float | None = None
    lost_step: int = 0


@dataclass
class Stream:
    """Jobs that an actor was given, with the events that it sends.

    Attributes:
        heard: the actor has sent an event.
    """

    slot: ActorSlot
    jobs: list[Job]
    events: Any
    since: float = field(default_factory=time.monotonic)
    heard: bool = False


@dataclass(frozen=True)
class Lost:
    """Jobs whose actor is to be replaced when due, once Ray has noticed the loss of its node.

    If Ray has not noticed it by `latest`, the actor is replaced then.
    """

    slot: ActorSlot
    jobs: list[Job]
    due: float
    latest: float

    def is_due(self) -> bool:
        now = time.monotonic()
        return now >= self.due and (now >= self.latest or self.slot.has_ground())


class FineTuning:
    """The fine-tuning of one iteration's jobs.

    Args:
        slots: those of the policy actors.
        work: what every job gets: init, prompts, pool, reward and proof.
        tick: checks all other actors, and raises what ends the run. Returns whether one works.
    """

    def __init__(
        self,
        config: Config,
        slots: Sequence[ActorSlot],
        work: Sequence[Any],
        tick: Callable[[], bool],
        report: health.Report,
    ):
        self.config, self.slots, self.work, self.tick, self.report = (
            config,
            slots,
            work,
            tick,
            report,
        )
        self.streams: list[Stream] = []
        self.waiting: list[Lost] = []
        self.courses: dict[str, PolicyProgress] = {}
        self.saved: set[str] = set()
        self.rows: list[dict[str, Any]] = []
        self.trainers = 0
        self.standstill = health.Standstill()

    def run(self, jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
        """Yield the policies' events: resumed (after a death too, so steps may repeat), step, done.

        Raises:
            FaultError: a policy failed more than cluster.max_failures times without progress.
            Stopped: as any exception of a job, it is raised after a checkpoint of every policy.
        """
        self.courses = {
            job.key: PolicyProgress(job, Failures(self.config.cluster.max_failures)) for job in jobs
        }
        for number, slot in enumerate(self.slots):
            if own := list(jobs[number :: len(self.slots)]):
                self._give(slot, own)
        self.trainers = len(self.streams)
        try:
            while self.streams or self.waiting:
                self._renew_what_is_due()
                yield from self._next_event()
                self._look_after()
        except BaseException as error:
            self._save(isinstance(error, KeyboardInterrupt) or runtime.is_requested())
            raise

    def _give(self, slot: ActorSlot, jobs: list[Job]) -> None:
        events = slot.actor.fine_tune.options(num_returns="streaming", name=task_name(jobs)).remote(
            jobs, *self.work
        )
        self.streams.append(Stream(slot, jobs, events))

    def _next_event(self) -> Iterator[dict[str, Any]]:
        if not self.streams:
            time.sleep(TICK)
            return
        ready, _ = ray.wait(
            [stream.events for stream in self.streams],
            num_returns=1,
            fetch_local=False,
            timeout=TICK,
        )
        if not ready:
            return
        self.standstill.over()
        stream = next(stream for stream in self.streams if stream.events is ready[0])
        try:
            event: Any = ray.get(next(stream.events))
        except StopIteration:
            self.streams.remove(stream)
        except RayError as error:
            if not faults.is_survivable(error):
                self.streams.remove(stream)
                if not isinstance(cause := faults.cause_of(error), StoreError):
                    self.saved |= {job.key for job in stream.jobs}  # the actor saved, then raised
                raise cause from None
            self._lost(stream.slot, error)
        else:
            stream.heard = True
            if event["event"] == "fault":
                self.report(
                    "fault",
                    what="checkpoint",
                    **_label(event),
                    cause="damaged",
                    message=event["cause"],
                )
                return
            if event["event"] == "ended":
                self.report("ended", **_label(event), message=event["message"])
                return
            self._note(event)
            yield event

    def _note(self, event: dict[str, Any]) -> None:
        course = self.courses[event["key"]]
        if event["event"] == "done":
            course.done = True
            return
        if event["event"] == "measured":
            return
        if event["event"] == "resumed":
            course.step = course.resumed = event["step"]
            self.rows = [
                row for row in self.rows if row["key"] != event["key"] or row["step"] < course.step
            ]
            if course.lost_at is not None:
                self.report(
                    "continued",
                    **course.job.label,
                    step=course.step,
                    steps_repeated=max(course.lost_step - course.step, 0),
                )
            elif course.step:
                self.report("resumed", **course.job.label, step=course.step)
        else:
            course.step = event["step"] + 1
            self.rows.append(event)
        if course.step > course.furthest:
            course.furthest = course.step
            course.failures.progressed()
        if course.lost_at is not None and course.step >= course.lost_step:
            seconds = time.monotonic() - course.lost_at
            self.report(
                "recovered",
                what="policy",
                **course.job.label,
                step=course.step,
                seconds_lost=seconds,
            )
            course.lost_at = None

    def _lost(self, slot: ActorSlot, error: RayError) -> None:
        """Report a lost actor for each of its policies, and plan its replacement after a pause."""
        cause = slot.cause(error)
        ours = [stream for stream in self.streams if stream.slot is slot]
        self.streams = [stream for stream in self.streams if stream.slot is not slot]
        jobs = [job for stream in ours for job in stream.jobs if not self.courses[job.key].done]
        pause, text = 0.0, faults.explain(error)
        for course in (self.courses[job.key] for job in jobs):
            self.report(
                "fault",
                what=slot.name,
                **course.job.label,
                step=course.step,
                cause=cause,
                message=text,
            )
            if course.lost_at is None:
                course.lost_at, course.lost_step = time.monotonic(), course.step
            if not course.failures.again():
                raise FaultError(self._given_up(course, cause, text))
            pause = max(pause, course.failures.pause())
        now = time.monotonic()
        self.waiting.append(
            Lost(slot, jobs, now + pause, now + pause + self.config.cluster.timeout_seconds)
        )

    def _renew_what_is_due(self) -> None:
        due = [lost for lost in self.waiting if lost.is_due()]
        self.waiting = [lost for lost in self.waiting if lost not in due]
        for lost in due:
            lost.slot.renew()
            if lost.jobs:
                self._give(lost.slot, lost.jobs)

    def _look_after(self) -> None:
        runtime.check()
        others_work = self.tick()
        for stream in list(self.streams):
            if stream.heard or placement_groups.is_found(stream.slot.bundle):
                if text := hang_of(stream.slot, self.config.cluster.hang_seconds):
                    for job in stream.jobs:
                        self._report_hang(stream.slot, self.courses[job.key], text)
            elif time.monotonic() - stream.since > self.config.cluster.timeout_seconds:
                self._move(stream)
        at_work = (
            others_work
            or bool(self.waiting)
            or any(not stream.heard or stream.slot.at_work for stream in self.streams)
        )
        if self.standstill.lasts(at_work, self.config.cluster.hang_seconds):
            self._end_standstill()

    def _end_standstill(self) -> None:
        """Replace the policy actors, since the results that they asked for no longer arrive."""
        text = (
            f"has waited for {self.standstill.seconds:.0f} s for completions or scores that nobody"
            " works at; started again"
        )
        for stream in self.streams:
            for job in stream.jobs:
                self._report_hang(stream.slot, self.courses[job.key], text)
            stream.slot.give_up()
        self.standstill.over()

    def _report_hang(self, slot: ActorSlot, course: PolicyProgress, text: str) -> None:
        if not course.done:
            self.report(
                "hang",
                what=slot.name,
                **course.job.label,
                step=course.step,
                cause=faults.HANG,
                message=text,
            )

    def _move(self, stream: Stream) -> None:
        """Give the policies of an actor that no node has room for to the least loaded actor."""
        away = [lost.slot for lost in self.waiting] + [
            other.slot for other in self.streams if not other.heard
        ]
        others = [slot for slot in self.slots if not slot.gone and slot not in away]
        if not others:
            raise stream.slot.no_room(self.config.cluster.timeout_seconds)
        target = min(others, key=self._load)
        self.streams.remove(stream)
        stream.slot.leave()
        for job in stream.jobs:
            self.report(
                "moved",
                what=stream.slot.name,
                **job.label,
                message=f"no room for it: {placement_groups.lack()}; to {target.name}",
            )
        self._give(target, stream.jobs)

    def _load(self, slot: ActorSlot) -> int:
        """Return the number of policies that an actor still has to train."""
        return sum(
            not self.courses[job.key].done
            for stream in self.streams
            if stream.slot is slot
            for job in stream.jobs
        )

    def _given_up(self, course: PolicyProgress, cause: str, text: str) -> str:
        job, optim = course.job, self.config.optim
        hint = ""
        if cause == faults.OUT_OF_MEMORY:
            hint = (
                f"; lower optim.max_tokens_per_microbatch={optim.max_tokens_per_microbatch}, or set"
                " optim.gradient_checkpointing=true, or give it a larger node"
            )
        return (
            f"policy {job.index} of iteration {job.iteration} failed {course.failures.count} times"
            f" without getting beyond step {course.furthest} ({cause}: {text}){hint};"
            f" cluster.max_failures={self.config.cluster.max_failures}; what was saved is kept, and"
            f" the same command{' (these keys may change)' if hint else ''} continues"
        )

    def _save(self, at_once: bool) -> None:
        """Let every policy that is being trained save its last finished step.

        After a signal there is little time. Otherwise wait for the end of the present step.
        """
        deadline = time.monotonic() + (
            runtime.SAVE_SECONDS if at_once else self.config.cluster.hang_seconds
        )
        streams = [stream for stream in self.streams if stream.heard]
        open_jobs = [course for course in self.courses.values() if not course.done]
        for slot in {id(stream.slot): stream.slot for stream in streams}.values():
            slot.actor.stop.remote()
        while streams and (left := deadline - time.monotonic()) > 0:
            ready, _ = ray.wait(
                [stream.events for stream in streams],
                num_returns=1,
                fetch_local=False,
                timeout=left,
            )
            for stream in [stream for stream in streams if ready and stream.events is ready[0]]:
                try:
                    event: Any = ray.get(next(stream.events))
                except (StopIteration, RayError):
                    streams.remove(stream)
                else:
                    course = self.courses[event["key"]]
                    course.step = (
                        event["step"] + (event["event"] == "step")
                        if "step" in event
                        else course.step
                    )
                    self.saved |= {event["key"]} if event["event"] in ("stopped", "done") else set()
        lines = [self._saved_line(course, course.job.key in self.saved) for course in open_jobs]
        runtime.note(lines)
        for course, line in zip(open_jobs, lines, strict=True):
            self.report("saved", **course.job.label, step=course.step, message=line)

    def _saved_line(self, course: PolicyProgress, saved: bool) -> str:
        name = f"iteration {course.job.iteration} policy {course.job.index}"
        every = self.config.checkpoint_every
        return (
            f"{name} is saved at step {course.step}"
            if saved
            else (
                f"{name} was not saved: its last checkpoint is of step"
                f" {max(course.resumed, course.step // every * every)}"
            )
        )


def _label(event: Mapping[str, Any]) -> dict[str, Any]:
    return {name: event[name] for name in ("iteration", "policy", "key", "step")}
