"""Time of marked stretches; the GPU's events are stood in for by a stream that has not got to the last one yet."""

from types import SimpleNamespace

import pytest
import torch

from diffsynth_ray.memory import timing
from diffsynth_ray.memory.timing import DeviceTimer


def test_stretches_add_up_and_are_taken_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    timer = DeviceTimer(torch.device("cpu"))
    for _ in range(2):
        with timer.stretch():
            now[0] += 1
    now[0] += 2
    assert timer.take_s() == 2
    assert timer.take_s() == 0


@pytest.fixture
def events(monkeypatch):
    """Numbers of the GPU's events that it has passed; between two is a second."""
    passed, made = set(), []

    def make_event(*, enable_timing):
        event = SimpleNamespace(number=len(made))
        event.record = lambda: None
        event.query = lambda: event.number in passed
        event.elapsed_time = lambda end: 1000.0 * (end.number - event.number)  # milliseconds
        made.append(event)
        return event

    monkeypatch.setattr(torch.cuda, "Event", make_event)
    return passed


def test_a_stretch_that_the_device_has_not_passed_counts_later(events):
    timer = DeviceTimer(torch.device("cuda"))
    for _ in range(2):
        with timer.stretch():
            pass
    events.update({0, 1, 2})
    assert timer.take_s() == pytest.approx(1.0)
    events.add(3)
    assert timer.take_s() == pytest.approx(1.0)
    assert timer.take_s() == 0


def test_what_is_forgotten_counts_neither_now_nor_later(events):
    timer = DeviceTimer(torch.device("cuda"))
    for _ in range(2):
        with timer.stretch():
            pass
    events.update({0, 1})
    timer.forget()
    events.update({2, 3})
    assert timer.take_s() == 0
    with timer.stretch():
        pass
    events.update({4, 5})
    assert timer.take_s() == pytest.approx(1.0)
