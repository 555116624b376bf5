"""Every line of metrics, handed to a function of the user's as well: to Weights & Biases, a data base, a chat."""

from rlhf.io.process_state import restored_process
from rlhf.io.run_log import Sink
from rlhf.io.user_functions import is_async, load_function
from rlhf.io.user_log import log_user


def open_sink(target: str | None) -> Sink | None:
    """The function `target`, `module:function` or `file.py:function`, called with (stage, step, metrics).

    What it raises is told once and never ends the run.

    Raises:
        UserError: it cannot be imported.
    """
    if target is None:
        return None
    function, has_failed = load_function(target, f"--log.sink {target}"), False

    def sink(stage: str, step: int, metrics: dict[str, float]) -> None:
        nonlocal has_failed
        try:
            with restored_process(f"--log.sink {target}"):
                result = function(stage, step, metrics)
            if is_async(result):
                raise TypeError("it returned a coroutine (async), which is not awaited here")
        except (Exception, SystemExit) as error:  # it is the user's code, and the run is worth more
            if not has_failed:
                log_user(f"--log.sink {target}: raised {type(error).__name__}: {error} at {stage} {step}; going on")
            has_failed = True

    return sink
