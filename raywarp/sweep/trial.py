"""One trial of a sweep: a WARP run, iteration by iteration, inside a Ray Tune actor that asks for
next to nothing itself.

The run's own actors bring their placement groups, and exist only while there is something to train
or to measure for them: a trial that waits for another one's policies, or finds all of its own done,
holds none.
"""

import os
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import SIGTERM
from typing import Any

from ray.tune import Trainable

from raywarp import identity, warp
from raywarp.algorithm.hypervolume import hypervolume
from raywarp.cluster import resources, runtime
from raywarp.cluster.claims import FOLDER, Elsewhere, SharedClaims, Table
from raywarp.cluster.node_report import PACKAGES, versions
from raywarp.config.schema import Config
from raywarp.config.search import DIRECTIONS, SearchSpace, decode, name_of
from raywarp.planning.inputs import Inputs, prepare
from raywarp.run import front
from raywarp.run.display import Display
from raywarp.run.folder import Run
from raywarp.run.front import Point
from raywarp.run.keys import front_key, key_chain
from raywarp.storage import sealed
from raywarp.storage.location import Storage
from raywarp.storage.sealed import DamagedError
from raywarp.sweep.files import Record, SweepFiles, within
from raywarp.training import evaluation

STOP_POLL = 0.25  # seconds between two looks at whether the sweep is to stop


@dataclass(frozen=True)
class SweepPlan:
    """What all trials of a sweep have in common.

    space: its base has the sweep's place, store, and actors and threads of a trial. id: of this
    invocation.
    folder: the working directory of the command.
    """

    space: SearchSpace
    id: str
    folder: str

    def point(self, tunes: dict[str, Any]) -> dict[str, Any]:
        """A trial's values, from what Ray Tune has of it."""
        return self.space.resolved(decode(tunes))

    def config(self, point: dict[str, Any]) -> Config:
        """A trial's whole configuration; its values are in it, its place is its own, and its
        policies are where all trials' are.
        """
        config = self.space.config(point)
        place = within(self.space.base.out, f"trials/{name_of(point)}")
        return config.model_copy(
            update={"out": place, "store": self.store, "loggers": [], "tune": None}
        )

    @property
    def store(self) -> str:
        return self.space.base.store or self.space.base.out


def front_line(points: list[dict[str, Any]]) -> list[Point]:
    """Those of a front.json that lie on the line from SFT to SLERP, by rising η."""
    return sorted(
        (Point(**point) for point in points if point["eta"] is not None),
        key=lambda point: point.eta or 0,
    )


def measures(space: SearchSpace, config: Config, line: list[Point]) -> dict[str, Any]:
    """What trials are compared by: the hypervolume of a front, and reward, KL and control of its
    chosen point.
    """
    settings, sft = space.settings, line[0]
    reference_kl = settings.reference_kl or space.base.front.choose.max_kl or 10.0
    reference_reward = (
        sft.reward if settings.reference_reward is None else settings.reference_reward
    )
    chosen = front.choose(line, config.front.choose)
    values: dict[str, Any] = {
        "hypervolume": hypervolume(
            [(point.kl, point.reward) for point in line], (reference_kl, reference_reward)
        ),
        "reward": chosen.reward,
        "kl": chosen.kl,
    }
    if chosen.control is not None:
        values["control"] = chosen.control
    return {**values, "chosen": chosen.name, "reference": [reference_kl, reference_reward]}


class Trial(Trainable):
    """A step is an iteration of WARP. What it needs is made in the first one, so that what is wrong
    is reported as the trial's failure.
    """

    def setup(self, config: dict[str, Any], plan: SweepPlan) -> None:  # type: ignore[override]
        _move_to(plan.folder)
        self.plan, self.files = plan, SweepFiles(plan.space.base.out)
        self.claims = SharedClaims(plan.store, plan.id, self._begin)
        self.display, self.kept = Display(), ExitStack()
        self.stages: Any = None
        threading.Thread(target=self._listen, daemon=True).start()
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Another trial in the same process, whose imports take longer than everything else in a
        short trial.
        """
        self.cleanup()
        self.point = self.plan.point(new_config)
        self.name, self.own = name_of(self.point), self.plan.config(self.point)
        self.record, self.shown, self.ready = Record(self.point), list[dict[str, Any]](), False
        return True

    def step(self) -> dict[str, Any]:
        """The next iteration's measures; those of a trial that failed are not numbers, and it is
        done.
        """
        try:
            self._prepare()
            iteration = len(self.shown) + 1
            known = self._known(iteration)
            row = known or self._measured(self._stage(iteration))
        except Exception as error:
            self.cleanup()
            self.record.failed = str(error).strip() or type(error).__name__
            self.files.save_record(self.name, self.record)
            return {
                **dict.fromkeys(DIRECTIONS, float("nan")),
                "failed": self.record.failed,
                "done": True,
            }
        self.shown.append(row)
        measured = {name: row[name] for name in DIRECTIONS if name in row}
        return {
            **measured,
            "iteration": iteration,
            "known": bool(known),
            "done": iteration == self.own.warp.iterations,
        }

    def cleanup(self) -> None:
        """Everything that this trial holds is given back."""
        self._leave()
        self.kept.close()

    def _prepare(self) -> None:
        if self.ready:
            return
        self._claim_folder()
        self.record = self.files.record(self.name, self.point)
        self.record.failed = None
        self.inputs: Inputs = prepare(self.own)
        self.run = Run.open(self.own, self.display.say)
        self.numerics_key = _numerics_key(self.own, self.inputs)
        self.ready = True

    def _claim_folder(self) -> None:
        """Two trials of equal values take turns, and the second finds everything done."""
        while not self.kept.enter_context(self.claims.take([folder := FOLDER + self.own.out])):
            self.claims.wait([folder])

    def _known(self, iteration: int) -> dict[str, Any] | None:
        """What was measured of exactly these policies, by an earlier invocation or by another
        trial; None where something is to be done.
        """
        chain = self._chain()
        if chain is None:
            return None
        keys, last = chain[iteration - 1], iteration == self.own.warp.iterations
        front = front_key(self.own, self.inputs.evaluation, keys)
        if not last:
            points = self._stored_front(front)
        elif self.record.rows[iteration - 1 : iteration] and self.run.has_front(front):
            points = self.run.front()["points"]
        else:
            points = None
        return self._row(iteration, keys, front, points) if points else None

    def _chain(self) -> list[list[str]] | None:
        """The keys of all policies, where somebody has run such engines before."""
        found = self.files.numerics(self.numerics_key)
        return key_chain(self.own, found) if found is not None else None

    def _stage(self, wanted: int) -> warp.IterationState:
        while True:
            if self.stages is None:
                self._wait_for_others()
                self.stages = warp.stages(self.own, self.inputs, self.display, self.claims)
            try:
                stage: warp.IterationState
                for stage in self.stages:
                    if stage.iteration == 0:
                        self.files.save_numerics(self.numerics_key, stage.determinants)
                    if stage.iteration == wanted:
                        return stage
            except Elsewhere as elsewhere:
                self._leave()
                self.display.say(f"{elsewhere}; waiting, without any resources")
                self.claims.wait(elsewhere.keys)

    def _wait_for_others(self) -> None:
        """While others are at work on all that is missing of an iteration, nothing has to be
        started to find that out.
        """
        place = Storage(self.plan.store)
        for keys in self._chain() or []:
            missing = [key for key in keys if not place.has(f"policies/{key}")]
            while missing and self.claims.held(missing) == missing:
                self.claims.wait(missing)
                missing = [key for key in missing if not place.has(f"policies/{key}")]
            if missing:
                return

    def _begin(self, iteration: int, keys: Any) -> None:
        if new := [key for key in keys if key not in self.record.trained]:
            self.record.trained += new
            self.files.save_record(self.name, self.record)

    def _measured(self, stage: warp.IterationState) -> dict[str, Any]:
        keys = list(stage.keys[stage.iteration - 1])
        front = front_key(self.own, self.inputs.evaluation, keys)
        last = stage.iteration == self.own.warp.iterations
        points = (
            stage.run.front()["points"]
            if last
            else self._stored_front(front) or self._measure_front(stage, front)
        )
        return self._row(stage.iteration, keys, front, points)

    def _row(
        self, iteration: int, keys: list[str], front: str, points: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """The iteration's row of the record, which has it from now on."""
        line = front_line(points)
        row = {
            "iteration": iteration,
            "policies": keys,
            "front_key": front,
            "front": [asdict(point) for point in line],
        }
        row.update(measures(self.plan.space, self.own, line))
        rows = [*self.record.rows[: iteration - 1], row, *self.record.rows[iteration:]]
        if rows != self.record.rows:
            self.record.rows = rows
            self.files.save_record(self.name, self.record)
        return row

    def _stored_front(self, key: str) -> list[dict[str, Any]] | None:
        """Of an iteration before the last, where a trial with the same policies has measured it."""
        try:
            folder = Storage(self.plan.store).fetch(f"fronts/{key}")
        except DamagedError as error:
            self.display.say(f"{error}; measured again")
            return None
        return sealed.read_jsonl(folder / "front.jsonl") if folder else None

    def _measure_front(self, stage: warp.IterationState, key: str) -> list[dict[str, Any]]:
        candidates = front.candidates(stage.init, stage.policies, front.wanted_etas(self.own))
        wanted = [candidate for candidate in candidates if candidate.eta is not None]
        with self.display.evaluation(len(wanted)) as done:
            results = evaluation.evaluate(
                stage.session, self.own, wanted, self.inputs.prompts.held_out, done
            )
        points = [asdict(point) for point, _ in results]
        with Storage(self.plan.store).writing(f"fronts/{key}") as folder:
            sealed.write_jsonl(folder / "front.jsonl", points)
        return points

    def _leave(self) -> None:
        if self.stages is not None:
            self.stages.close()
            self.stages = None

    def _listen(self) -> None:
        """To the sweep's call to stop, while this process is at work on anything."""
        table = Table(self.plan.store)
        while not table.ask("stopping", self.plan.id):
            time.sleep(STOP_POLL)
        runtime.request(SIGTERM)


def _move_to(folder: str) -> None:
    """Where relative paths and a user's own reward module are found, as by the command itself."""
    if Path(folder).is_dir():
        os.chdir(folder)
        if folder not in sys.path:
            sys.path.insert(0, folder)


def _numerics_key(config: Config, inputs: Inputs) -> str:
    """Of everything that a session's numerics and a reward's statistics may follow from."""
    sections = config.model_dump(
        include={"rollout", "reward", "lora", "cluster", "seed", "prompts", "trust_remote_code"}
    )
    gpus = resources.cluster_gpus()
    machine = [resources.wish(config, gpus).dtype, gpus > 0]
    completions = config.reward_training.sft_completions
    return identity.content_key(
        [sections, inputs.fingerprints(), versions((*PACKAGES, "peft")), machine, completions]
    )
