"""A saver that can be held, so that a test finds a checkpoint half written."""

import threading

from diffsynth_ray.train import saver


def hold(monkeypatch, name):
    """An event that the saver's function `name` (`write_shard` or `commit_checkpoint`) waits for before it begins."""
    may_begin = threading.Event()
    original = getattr(saver, name)

    def held(*args, **kwargs):
        assert may_begin.wait(100)
        return original(*args, **kwargs)

    monkeypatch.setattr(saver, name, held)
    return may_begin
