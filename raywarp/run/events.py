"""The journal of a run: it records events in events.jsonl, the display and the metrics.

From earlier events it learns that the previous driver was killed.
"""

from types import TracebackType
from typing import Any

from raywarp.cluster.claims import Elsewhere
from raywarp.cluster.node_report import PACKAGES, versions
from raywarp.cluster.runtime import Stopped
from raywarp.run.config_file import SAMPLER_VERSION
from raywarp.run.display import Display
from raywarp.run.folder import Run
from raywarp.run.prometheus import RunMetrics

ENDS = {"finished", "failed", "stopped"}


class Journal:
    """A context manager that records the events of a run.

    Nothing is written before `begin`, because a run that cannot start leaves no folder.
    """

    def __init__(self, run: Run, display: Display, gauges: RunMetrics):
        self.run, self.display, self.gauges, self.begun = run, display, gauges, False

    def begin(self) -> None:
        """Record the start of the run, once it has its actors.

        If the previous start has no end, its driver was killed. This fault is recorded first.
        """
        last = next(
            (row for row in reversed(self.run.events()) if row["event"] in ENDS | {"started"}), None
        )
        self.begun = True
        if last and last["event"] == "started":
            self.report(
                "fault",
                what="driver",
                cause="killed",
                message=f"the run that started at {last['time']} did not come to its end",
            )
        self.report(
            "started",
            versions=versions((*PACKAGES, "ray", "peft", "datasets", "numpy")),
            sampler=SAMPLER_VERSION,
        )

    def report(self, event: str, **details: Any) -> None:
        """Record an event and show it; Run.add_event describes the arguments."""
        if event == "fault":
            self.gauges.fault(details["what"], details["cause"])
        self.display.event(
            self.run.add_event(event, **details) if self.begun else {"event": event, **details}
        )

    def __enter__(self) -> "Journal":
        if lost := self.run.lost_events():
            self.display.say(lost)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.begun:
            return
        if error is None:
            self.report("finished")
            self.display.faults(self.run.events())
        elif isinstance(error, Stopped | Elsewhere):
            self.report("stopped", message=str(error))
        elif isinstance(error, GeneratorExit):
            self.report("stopped", message="ended by whoever asked for it")
        else:
            self.report(
                "failed", message=str(error).splitlines()[0] if str(error) else type(error).__name__
            )
