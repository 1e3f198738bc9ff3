"""Signs of life: sent by a thread of their own, whatever the training thread does."""

import threading
import time

from waiting import wait_until

from diffsynth_ray.train.heartbeat import Heartbeat


def test_age_grows_while_the_training_thread_stands_still_and_nothing_comes_after_the_end():
    sent = []
    heartbeat = Heartbeat(lambda phase, step, age_s: sent.append((phase, step, age_s)), every_s=0.05)
    heartbeat.enter("training", 7)

    def ages():
        return [age for phase, step, age in list(sent) if (phase, step) == ("training", 7)]

    wait_until(lambda: len(ages()) >= 3 and ages()[-1] >= 0.05)
    heartbeat.end()
    assert ages() == sorted(ages())
    assert ages()[-1] >= 0.05
    assert sent[-1][:2] == ("done", 7)
    time.sleep(0.15)
    assert sum(phase == "done" for phase, _, _ in sent) == 1
    assert sent[-1][0] == "done"


def test_a_step_that_has_begun_is_told_at_once_and_never_taken_back():
    arrived, is_slow = [], threading.Event()

    def send(phase, step, age_s):
        if threading.current_thread() is not threading.main_thread() and step == 1:
            is_slow.set()
            time.sleep(0.2)  # long enough for the training thread to begin the next step
        arrived.append(step)

    heartbeat = Heartbeat(send, every_s=0.01)
    heartbeat.enter("training", 1)
    assert is_slow.wait(100)
    for step in (2, 3):
        heartbeat.enter("training", step)
        assert arrived[-1] == step
    heartbeat.end()
    for thread in [each for each in threading.enumerate() if each.name == "heartbeat"]:
        thread.join(100)
    assert arrived == sorted(arrived)


def test_the_end_comes_after_a_sign_that_is_being_sent():
    arrived, is_sending = [], threading.Event()

    def send(phase, step, age_s):
        if phase != "done":
            is_sending.set()
            time.sleep(0.2)  # long enough for the training function to end
        arrived.append(phase)

    heartbeat = Heartbeat(send, every_s=0.01)
    assert is_sending.wait(100)
    heartbeat.end()
    for thread in [each for each in threading.enumerate() if each.name == "heartbeat"]:
        thread.join(100)
    assert arrived[-1] == "done"
