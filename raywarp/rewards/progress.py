"""The progress of a reward model's training: a bar in a terminal, else a line per validation."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raywarp.run.display import Display, bars
from raywarp.storage.sealed import read_jsonl

# Seconds between two looks at the metrics. The workers' own output does not reach this terminal.
POLL = 0.5

# Keys of a validation's row, unless the row was damaged.
VALIDATION = {"step", "validation_accuracy", "validation_loss"}


@contextmanager
def following(metrics: Path, steps: int, display: Display) -> Iterator[None]:
    """Show what the workers write to the metrics file in the block, without its earlier rows."""
    over, follower = threading.Event(), _Follower(metrics, steps, display)

    def follow() -> None:
        while not over.wait(POLL):
            follower.look()

    with follower.bar:
        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            follower.look()


class _Follower:
    def __init__(self, metrics: Path, steps: int, display: Display):
        self.metrics, self.steps, self.display = metrics, steps, display
        self.bar = bars(display.console, display.quiet)
        self.task = self.bar.add_task("  reward model", total=steps, note="starting")
        self.validated = {row["step"] for row in read_jsonl(metrics) if row.keys() >= VALIDATION}
        self.told: set[str] = set()
        self.accuracy = ""

    def look(self) -> None:
        rows = read_jsonl(self.metrics)
        for row in rows:
            if "fault" in row and row["fault"] not in self.told:
                self.told.add(row["fault"])
                self.display.say(f"reward model: {row['fault']}")
            if row.keys() >= VALIDATION and row["step"] not in self.validated:
                self._validation(row)
        if steps := [row for row in rows if "loss" in row and "step" in row]:
            self.bar.update(
                self.task,
                completed=steps[-1]["step"],
                note=f"loss {steps[-1]['loss']:.3f}{self.accuracy}",
            )

    def _validation(self, row: dict[str, Any]) -> None:
        self.validated.add(row["step"])
        self.accuracy = f"  validation accuracy {row['validation_accuracy']:.3f}"
        if not self.display.console.is_terminal:
            scores = (
                f"validation accuracy {row['validation_accuracy']:.3f}  loss"
                f" {row['validation_loss']:.3f}"
            )
            self.display.progress(f"reward step {row['step']}/{self.steps}  {scores}")
