"""One trial of a sweep: a WARP run, iteration by iteration, in a Ray Tune actor.

The Tune actor itself needs almost no resources. The run's own actors have their placement groups,
and exist only while they train or measure. A trial holds none while it waits for the policies of
another trial, or if all its policies are done.
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
from raywarp.ceiling_stage import measured_ceiling
from raywarp.cluster import resources, runtime
from raywarp.cluster.claims import FOLDER, Elsewhere, SharedClaims, Table
from raywarp.cluster.node_report import PACKAGES, versions
from raywarp.config.schema import Config
from raywarp.config.search import DIRECTIONS, SearchSpace, decode, name_of
from raywarp.data.prompts import prompts_fingerprint
from raywarp.planning.inputs import Inputs, prepare
from raywarp.run import front
from raywarp.run.ceiling import Ceiling, capped_share, ceiling_of, find_ceiling
from raywarp.run.display import Display
from raywarp.run.folder import Run
from raywarp.run.front import is_current
from raywarp.run.keys import ceiling_key, front_key, key_chain, points_key, used_settings
from raywarp.run.points import Point
from raywarp.storage import sealed
from raywarp.storage.location import Storage
from raywarp.storage.sealed import DamagedError
from raywarp.sweep.files import Record, SweepFiles, within
from raywarp.training import evaluation
from raywarp.training.kept_points import KeptPoints

STOP_POLL = 0.25  # seconds between two checks whether the sweep has to stop


@dataclass(frozen=True)
class SweepPlan:
    """What all trials of a sweep have in common.

    Attributes:
        space: the search space. Its base configuration has the sweep's `out` and `store`, and the
            number of actors and threads of a trial.
        id: id of this invocation.
        folder: the working directory of the command.
    """

    space: SearchSpace
    id: str
    folder: str

    def point(self, tunes: dict[str, Any]) -> dict[str, Any]:
        """Return a trial's values, from the configuration that Ray Tune passes to it."""
        return self.space.resolved(decode(tunes))

    def config(self, point: dict[str, Any]) -> Config:
        """Return a trial's whole configuration, from its values.

        Every trial has its own `out`. All share one store of policies.
        """
        config = self.space.config(point)
        place = within(self.space.base.out, f"trials/{name_of(point)}")
        return config.model_copy(
            update={"out": place, "store": self.store, "loggers": [], "tune": None}
        )

    @property
    def store(self) -> str:
        """The place of the policies that the trials share."""
        return self.space.base.store or self.space.base.out


def front_line(points: list[dict[str, Any]]) -> list[Point]:
    """Return the points of a front.json on the line from SFT through SLERP, by rising η."""
    return sorted(
        (Point(**point) for point in points if point["eta"] is not None),
        key=lambda point: point.eta or 0,
    )


def measures(
    space: SearchSpace, config: Config, line: list[Point], ceiling: Ceiling | None
) -> dict[str, Any]:
    """Return the measures by which trials are compared.

    They are the hypervolume of a front, its share of the ceiling, and the reward, KL and control of
    its chosen point. The result also has that point's name, and the hypervolume's reference point
    (KL, reward).

    Args:
        space: the search space, whose settings may give the reference point.
        config: the trial's configuration.
        line: points of the front on the line from SFT to SLERP, by rising η.
        ceiling: the ceiling of the front, if it was measured.
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
    if ceiling:
        values["ceiling_share"] = capped_share(line, ceiling, config.front.share_kl)
    return {**values, "chosen": chosen.name, "reference": [reference_kl, reference_reward]}


class Trial(Trainable):
    """A trial as Ray Tune's Trainable; each step is one iteration of WARP.

    The first step prepares the run, so that an error there is reported as the trial's failure.
    """

    def setup(self, config: dict[str, Any], plan: SweepPlan) -> None:  # type: ignore[override]
        _move_to(plan.folder)
        self.plan, self.files = plan, SweepFiles(plan.space.base.out)
        self.claims = SharedClaims(plan.store, plan.id, self._begin)
        self.display, self.kept = Display(), ExitStack()
        self.states: Any = None
        threading.Thread(target=self._listen, daemon=True).start()
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take over another trial in the same process.

        In a short trial, a new process's imports would take longer than all other work.
        """
        self.cleanup()
        self.point = self.plan.point(new_config)
        self.name, self.own = name_of(self.point), self.plan.config(self.point)
        self.record, self.shown, self.ready = Record(self.point), list[dict[str, Any]](), False
        return True

    def step(self) -> dict[str, Any]:
        """Run the next iteration, and return its measures.

        If it fails, the measures are NaN, and the trial is done.
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
        """Release everything that this trial holds."""
        self._leave()
        self.kept.close()

    def _prepare(self) -> None:
        """Claim the folder, and read the record and inputs, unless an earlier step did."""
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
        """Claim the trial's folder, and wait for it if necessary.

        Two trials of equal values thus take turns, and the second finds everything done.
        """
        while not self.kept.enter_context(self.claims.take([folder := FOLDER + self.own.out])):
            self.claims.wait([folder])

    def _known(self, iteration: int) -> dict[str, Any] | None:
        """Return an iteration's row if its front has already been measured, else None.

        An earlier invocation or another trial has then measured exactly these policies.
        """
        chain = self._chain()
        if chain is None:
            return None
        keys, last = chain[iteration - 1], iteration == self.own.warp.iterations
        front = front_key(self.own, self.inputs.front, keys, self.own.mixes if last else ())
        ceiling = self._stored_ceiling()
        if self.own.front.ceiling_completions and ceiling is None:
            return None
        if not last:
            points = self._stored_front(front)
        elif (
            self.record.rows[iteration - 1 : iteration]
            and self.run.has_front(front)
            and is_current(
                self.run.front(),
                self.inputs.measured(self.own),
                ceiling.json() if ceiling else None,
            )
        ):
            points = self.run.front()["points"]
        else:
            points = None
        return self._row(iteration, keys, front, points, ceiling) if points else None

    def _chain(self) -> list[list[str]] | None:
        """Return the keys of all policies; None if no trial has yet found the engines' numerics."""
        found = self.files.numerics(self.numerics_key)
        return key_chain(self.own, found) if found is not None else None

    def _stage(self, wanted: int) -> warp.IterationState:
        """Run WARP up to the wanted iteration, and return its state.

        If other trials are training missing policies, release all actors, and wait for them.
        """
        while True:
            if self.states is None:
                self._wait_for_others()
                self.states = warp.iterations(self.own, self.inputs, self.display, self.claims)
            try:
                state: warp.IterationState
                for state in self.states:
                    if state.iteration == 0:
                        self.files.save_numerics(self.numerics_key, state.determinants)
                    if state.iteration == wanted:
                        return state
            except Elsewhere as elsewhere:
                self._leave()
                self.display.say(f"{elsewhere}; waiting, without any resources")
                self.claims.wait(elsewhere.keys)

    def _wait_for_others(self) -> None:
        """Wait while other trials train all missing policies of an iteration.

        The wait takes place before the run opens its session, so it holds no resources.
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
        """Add policies to the record when their training begins."""
        if new := [key for key in keys if key not in self.record.trained]:
            self.record.trained += new
            self.files.save_record(self.name, self.record)

    def _measured(self, state: warp.IterationState) -> dict[str, Any]:
        """Return the row of a finished iteration. Measure its front, unless that is stored."""
        keys = list(state.keys[state.iteration - 1])
        last = state.iteration == self.own.warp.iterations
        front = front_key(self.own, self.inputs.front, keys, self.own.mixes if last else ())
        if last:
            found = state.run.front()
            return self._row(state.iteration, keys, front, found["points"], ceiling_of(found))
        ceiling = measured_ceiling(
            state.session, state.run, self.inputs, state.determinants, self.display, self.claims
        )
        points = self._stored_front(front) or self._measure_front(state, front)
        return self._row(state.iteration, keys, front, points, ceiling)

    def _row(
        self,
        iteration: int,
        keys: list[str],
        front: str,
        points: list[dict[str, Any]],
        ceiling: Ceiling | None,
    ) -> dict[str, Any]:
        """Return an iteration's row, and save it in the record.

        Args:
            keys: keys of the iteration's policies.
            front: key of the front.
            points: the front's points, as in front.json.
            ceiling: the front's ceiling, if it was measured.
        """
        line = front_line(points)
        row = {
            "iteration": iteration,
            "policies": keys,
            "front_key": front,
            "front": [asdict(point) for point in line],
        }
        row.update(measures(self.plan.space, self.own, line, ceiling))
        row |= {"ceiling": ceiling.json()} if ceiling else {}
        rows = [*self.record.rows[: iteration - 1], row, *self.record.rows[iteration:]]
        if rows != self.record.rows:
            self.record.rows = rows
            self.files.save_record(self.name, self.record)
        return row

    def _stored_front(self, key: str) -> list[dict[str, Any]] | None:
        """Return the points of a front that a trial with the same policies has stored, or None.

        Only fronts of iterations before the last are stored.
        """
        try:
            folder = Storage(self.plan.store).fetch(f"fronts/{key}")
        except DamagedError as error:
            self.display.say(f"{error}; measured again")
            return None
        return sealed.read_jsonl(folder / "front.jsonl") if folder else None

    def _stored_ceiling(self) -> Ceiling | None:
        """Return the trial's ceiling, if a trial with the same one has stored it."""
        found = self.files.numerics(self.numerics_key)
        if found is None or not self.own.front.ceiling_completions:
            return None
        prompts = self.inputs.prompts.held_out[: self.own.front.prompts]
        key = ceiling_key(self.inputs.config, prompts_fingerprint(prompts), found)
        return find_ceiling(self.run.store, key, self.display.say)

    def _measure_front(self, state: warp.IterationState, key: str) -> list[dict[str, Any]]:
        """Measure the front on the line from SFT to SLERP, and keep it in the store."""
        candidates = front.run_candidates(self.own, state.init, state.policies)
        wanted = [candidate for candidate in candidates if candidate.eta is not None]
        kept = KeptPoints(self.run, points_key(self.own, self.inputs.front, state.determinants))
        with self.display.evaluation(len(wanted)) as done:
            results = evaluation.evaluate(
                state.session,
                self.own,
                wanted,
                self.inputs.prompts.held_out,
                done,
                self.inputs.texts,
                kept,
            )
        points = [asdict(point) for point, _ in results]
        with Storage(self.plan.store).writing(f"fronts/{key}") as folder:
            sealed.write_jsonl(folder / "front.jsonl", points)
        return points

    def _leave(self) -> None:
        """Leave the run, which releases its actors."""
        if self.states is not None:
            self.states.close()
            self.states = None

    def _listen(self) -> None:
        """Wait for the sweep's order to stop, then pass it on as SIGTERM. Runs in a thread."""
        table = Table(self.plan.store)
        while not table.ask("stopping", self.plan.id):
            time.sleep(STOP_POLL)
        runtime.request(SIGTERM)


def _move_to(folder: str) -> None:
    """Change to the command's working directory, and import modules from there.

    Relative paths and a user's own reward module are then found as by the command itself.
    """
    if Path(folder).is_dir():
        os.chdir(folder)
        if folder not in sys.path:
            sys.path.insert(0, folder)


def _numerics_key(config: Config, inputs: Inputs) -> str:
    """Return a key of all that a session's numerics and a reward's statistics may depend on."""
    read = {"rollout", "reward", "rewards", "lora", "cluster", "seed", "prompts"}
    sections = used_settings(config, {*read, "trust_remote_code"})
    nodes = resources.Nodes.present()
    machine = [resources.wish(config, nodes).dtype, nodes.total("GPU") > 0]
    completions = config.reward_training.sft_completions
    return identity.content_key(
        [sections, inputs.fingerprints(), versions((*PACKAGES, "peft")), machine, completions]
    )
