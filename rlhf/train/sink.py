"""The function of the user that receives every line of metrics, for example for Weights & Biases."""

from rlhf.io.process_state import restored_process
from rlhf.io.run_log import Sink
from rlhf.io.user_functions import is_async, load_function
from rlhf.io.user_log import log_user


def open_sink(target: str | None) -> Sink | None:
    """Return a sink that calls the function `target`: `module:function` or `file.py:function`.

    The function is called with (stage, step, metrics). Its first exception is logged. Exceptions do not end the run.

    Raises:
        UserError: the function cannot be imported.
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
        except (Exception, SystemExit) as error:  # of the user's code, which must not end the run
            if not has_failed:
                log_user(f"--log.sink {target}: raised {type(error).__name__}: {error} at {stage} {step}; continuing")
            has_failed = True

    return sink
