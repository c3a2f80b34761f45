"""What Ray Tune says of a sweep's trials, to whoever wants to hear it."""

from typing import Any, Protocol

from ray.tune import Callback


class TrialListener(Protocol):
    """trial: Tune's own, with `trial_id` and `config`. A trial that ended or died is not heard of again."""

    def began(self, trial: Any) -> None: ...

    def reported(self, trial: Any, result: dict[str, Any]) -> None: ...

    def ended(self, trial: Any) -> None: ...

    def died(self, trial: Any) -> None: ...


def callback(listener: TrialListener) -> Callback:
    """For Tune, which stores its callbacks: consoles and connections cannot be, so what it stores is an empty one."""

    class Told(Callback):
        def __reduce__(self) -> Any:
            return (Callback, ())

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            listener.began(trial)

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            listener.reported(trial, result)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            listener.ended(trial)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            listener.died(trial)

    return Told()
