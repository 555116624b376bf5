"""Observers learn what happens, in their order, and end in the reverse order whatever ends the stage."""

import pytest

from rlhf.config import SFTRun
from rlhf.stages import STAGES
from rlhf.train.observers import CallbackObserver, Observer, Observers, StageStart

START = StageStart(STAGES["sft"], SFTRun(), 0, 3, ())


class Recorder(Observer):
    """Writes down every call, behind its name, into a list that observers share."""

    def __init__(self, name, calls, *, fails=False, stops=False):
        self.name, self.calls, self.fails, self.stops = name, calls, fails, stops

    def on_start(self, start):
        if self.fails:
            raise OSError("no disk")
        self.calls.append((self.name, "start", start.stage.name))

    def on_step(self, step, metrics):
        self.calls.append((self.name, "step", step, dict(metrics)))
        return self.stops

    def on_samples(self, step, samples):
        self.calls.append((self.name, "samples", step, list(samples)))

    def on_event(self, name, values):
        self.calls.append((self.name, name, dict(values)))

    def on_save(self, step, state):
        self.calls.append((self.name, "save", step, state))

    def on_end(self, error):
        self.calls.append((self.name, "end", type(error)))


def test_all_are_called_in_order_and_ended_in_reverse():
    calls: list = []
    observers = Observers([Recorder("a", calls), Recorder("b", calls)])
    with observers.observe(START):
        assert not observers.step(1, {"loss": 2.0})
        observers.samples(1, [{"prompt": "x"}])
        observers.event("fault", what="worker")
        observers.save(1, {"kl_coef": 0.1})
    expected = [("start", "sft"), ("step", 1, {"loss": 2.0}), ("samples", 1, [{"prompt": "x"}])]
    expected += [("fault", {"what": "worker"}), ("save", 1, {"kl_coef": 0.1})]
    assert calls[:-2] == [(name, *call) for call in expected for name in "ab"]
    assert calls[-2:] == [("b", "end", type(None)), ("a", "end", type(None))]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()], ids=repr)
def test_they_learn_what_ended_the_stage(error):
    calls: list = []
    with pytest.raises(type(error)), Observers([Recorder("a", calls)]).observe(START):
        raise error
    assert calls[-1] == ("a", "end", type(error))


def test_those_that_were_started_are_ended_where_another_cannot_start():
    calls: list = []
    observers = Observers([Recorder("a", calls), Recorder("b", calls, fails=True), Recorder("c", calls)])
    with pytest.raises(OSError, match="no disk"), observers.observe(START):
        raise AssertionError("nothing runs")
    assert calls == [("a", "start", "sft"), ("a", "end", OSError)]


@pytest.mark.parametrize("stopping", [0, 1])
def test_one_that_asks_to_stop_is_enough_and_all_learn_of_the_step(stopping):
    calls: list = []
    observers = Observers([Recorder(str(number), calls, stops=number == stopping) for number in range(2)])
    assert observers.step(1, {})
    assert len(calls) == 2


def test_a_callback_gets_metrics_of_its_own_and_its_exception_is_kept():
    def spoil(stage, step, metrics):
        assert stage == "sft"
        metrics.clear()
        if step == 2:
            raise ZeroDivisionError

    observer, metrics = CallbackObserver(spoil), {"loss": 1.0}
    observer.on_start(START)
    assert not observer.on_step(1, metrics)
    assert observer.error is None
    assert observer.on_step(2, metrics)
    assert isinstance(observer.error, ZeroDivisionError)
    assert metrics == observer.metrics == {"loss": 1.0}
