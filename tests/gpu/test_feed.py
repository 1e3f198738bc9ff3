"""Pixels on their way to the GPU."""

import time

import numpy as np
import pytest
import torch

from diffsynth_ray.data.batches import MicroBatch
from diffsynth_ray.data.samples import DecodedBatch
from diffsynth_ray.data.stream import StreamedBatch
from diffsynth_ray.train.feed import DeviceFeed

pytestmark = pytest.mark.gpu


def batches(num_steps, shape):
    for step in range(num_steps):
        pixels = np.random.default_rng(step).integers(0, 256, shape, dtype=np.uint8)
        micro = MicroBatch(0, shape[2], shape[3], shape[1], (step,), (0,))
        yield StreamedBatch(step, 1, True, micro, DecodedBatch(pixels, (step,), ("",), {}))


def test_pixels_arrive_whole_while_the_gpu_is_busy():
    """Memory that is reused too early, or read before its copy is done, would show in the sums."""
    shape = (2, 5, 256, 256, 3)
    work = torch.randn(2048, 2048, device="cuda")
    sums = []
    for fed in DeviceFeed(batches(20, shape), torch.device("cuda")):
        for _ in range(20):
            work = (work @ work).tanh()
        pixels = fed.micro_inputs[0].batch.pixels
        assert pixels.device.type == "cuda"
        sums.append(pixels.long().sum())
    expected = [int(batch.pixels.astype(np.int64).sum()) for batch in batches(20, shape)]
    assert [int(total) for total in sums] == expected


def test_the_copy_does_not_wait_for_the_computation():
    """The next step is on the device while a long computation of the one before still runs."""
    work = torch.randn(8192, 8192, device="cuda")
    feed = DeviceFeed(batches(3, (4, 17, 480, 832, 3)), torch.device("cuda"))
    next(feed)
    torch.cuda.synchronize()
    for _ in range(100):
        work = (work @ work).tanh()
    done = torch.cuda.Event()
    done.record()
    fetched = feed._ready.get(timeout=30)
    while not fetched.copied.query():
        assert not done.query(), "the copy ended after the computation only"
        time.sleep(0.001)
    torch.cuda.synchronize()
