"""Waiting for what another process or thread does."""

import time


def wait_until(condition, seconds=200, explain=lambda: "", *, every_s=0.02):
    """What the condition gives, as soon as that is true; `seconds` are for a machine that does much else."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, explain()
        time.sleep(every_s)
    return found
