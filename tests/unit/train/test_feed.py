"""Steps fetched ahead."""

import threading
import time

import numpy as np
import pytest
import torch
from waiting import wait_until

from diffsynth_ray.data.bad_samples import BadSample
from diffsynth_ray.data.batches import MicroBatch
from diffsynth_ray.data.samples import DecodedBatch
from diffsynth_ray.data.stream import StreamedBatch
from diffsynth_ray.errors import DataError
from diffsynth_ray.train.feed import DeviceFeed

CPU = torch.device("cpu")


def streamed(step, row, *, is_last=True, bad=(), is_dummy=False):
    pixels = np.full((1, 1, 16, 16, 3), row, dtype=np.uint8)
    pixels.flags.writeable = False
    micro = MicroBatch(0, 16, 16, 1, (row,), (step,), is_dummy)
    decoded = DecodedBatch(pixels, (row,), (f"prompt {row}",), {"speed": (3,)}, tuple(bad))
    return StreamedBatch(step, 5, is_last, micro, decoded)


def test_micro_batches_come_as_steps():
    bad = BadSample(7, 10, "7.png", "damaged", 0, 1)
    batches = [streamed(0, 1, is_last=False, bad=[bad]), streamed(0, 2, is_dummy=True), streamed(1, 3)]
    first, second = DeviceFeed(iter(batches), CPU)
    assert (first.rows, first.num_samples, first.bad) == ((1, 2), 5, (bad,))
    assert [micro.is_dummy for micro in first.micro_inputs] == [False, True]
    assert (second.rows, second.bad) == ((3,), ())
    batch = second.micro_inputs[0].batch
    assert torch.equal(batch.pixels, torch.full((1, 1, 16, 16, 3), 3, dtype=torch.uint8))
    assert (batch.size, batch.prompts, batch.rows, batch.extra) == ((16, 16, 1), ("prompt 3",), (3,), {"speed": (3,)})


def test_an_error_comes_at_its_step_and_stays():
    def batches():
        yield streamed(0, 1)
        raise DataError("row 2 is damaged")

    feed = DeviceFeed(batches(), CPU)
    assert next(feed).rows == (1,)
    for _ in range(2):
        with pytest.raises(DataError, match="row 2"):
            next(feed)


def test_the_next_step_is_fetched_meanwhile_and_no_more():
    fetched = []

    def batches():
        for step in range(10):
            fetched.append(step)
            yield streamed(step, step)

    others = set(threading.enumerate())  # an earlier test may have left its feed waiting
    feed = DeviceFeed(batches(), CPU)
    [thread] = [each for each in threading.enumerate() if each.name == "feed" and each not in others]
    assert next(feed).rows == (0,)
    wait_until(lambda: len(fetched) >= 3)
    time.sleep(0.1)
    # One is computed, one is ready, one waits for a place.
    assert fetched == [0, 1, 2]
    feed.close()
    thread.join(100)
    assert not thread.is_alive()
