"""Signs of life: sent by a thread of their own, whatever the training thread does."""

import threading
import time

from diffsynth_ray.train.heartbeat import Heartbeat


def test_age_grows_while_the_training_thread_stands_still_and_nothing_comes_after_the_end():
    sent, enough = [], threading.Event()

    def send(phase, step, age_s):
        sent.append((phase, step, age_s))
        if len(sent) >= 4:
            enough.set()

    heartbeat = Heartbeat(send, every_s=0.05)
    heartbeat.enter("training", 7)
    assert enough.wait(5)
    heartbeat.end()
    ages = [age for phase, step, age in sent if (phase, step) == ("training", 7)]
    assert ages == sorted(ages)
    assert ages[-1] >= 0.05
    assert sent[-1][:2] == ("done", 7)
    time.sleep(0.15)
    assert sum(phase == "done" for phase, _, _ in sent) == 1
    assert sent[-1][0] == "done"
