"""What measurements on held-out prompts cost a policy's training, at the defaults.

    .venv/bin/python tests/bench/tracking.py

One session trains policies in turn, without measurements and with them. Both sides take the same
steps. A step's time is the wall clock of the whole fine-tuning over its steps.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

from raywarp.cluster.runtime import start_ray
from raywarp.config.load import load_config
from raywarp.config.schema import Config
from raywarp.data.prompt_set.table import PromptSplits
from raywarp.front_stage import TEXTS
from raywarp.planning.inputs import prepare_prompts
from raywarp.run.policy_files import Job
from raywarp.storage.location import Storage
from raywarp.training.session import Session


def settings(steps: int, overrides: list[str]) -> Config:
    """The defaults on the embedded model, with a reward that costs next to nothing."""
    own = [
        "prompts.max_words=4",
        "reward.function=raywarp.embedded:vader",
        "control.function=raywarp.embedded:vader",
        "warp.iterations=1",
        "warp.policies=1",
        f"warp.steps={steps}",
    ]
    return load_config(None, [*own, *overrides])


def seconds(session: Session, job: Job, prompts: PromptSplits, tracked: bool) -> float:
    """The time of one policy's fine-tuning, in seconds per step."""
    front, steps = session.config.front, 0
    held_out = {1: prompts.tracked(front.tracked_prompts)} if tracked else None
    start = time.perf_counter()
    for event in session.fine_tune([job], session.zero, prompts.train, held_out):
        steps += event["event"] == "step"
    return (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("overrides", nargs="*", help="key=value")
    options = parser.parse_args()
    config = settings(options.steps, options.overrides)
    model, _, prompts = prepare_prompts(config)
    texts = [prompt.token_ids for prompt in prompts.train[:TEXTS]]
    start_ray()
    found: dict[bool, list[float]] = {False: [], True: []}
    number = itertools.count(1)
    with (
        tempfile.TemporaryDirectory() as folder,
        Session(config, model, prompts.longest, texts=texts) as session,
    ):
        for turn in range(options.turns + 1):  # the first warms up
            for tracked in (False, True):
                job = Job(1, 1, f"policy-{next(number)}", Storage(Path(folder)))
                each = seconds(session, job, prompts, tracked)
                if turn:
                    found[tracked].append(each)
                print(f"turn {turn}, {'measured' if tracked else 'plain'}: {each:.2f} s a step")
    ratios = [b / a for a, b in zip(found[False], found[True], strict=True)]
    result = {
        "steps": options.steps,
        "every": config.front.every,
        "tracked_prompts": config.front.tracked_prompts,
        "plain_seconds": statistics.median(found[False]),
        "measured_seconds": statistics.median(found[True]),
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
