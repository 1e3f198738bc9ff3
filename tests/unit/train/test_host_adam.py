"""Adam on the host in one pass against torch's own step."""

import mmap
import re
from pathlib import Path

import pytest
import torch

from diffsynth_ray.train.strategy.host_adam import MasterUpdate, compiled_steps, in_huge_pages, takes, update_masters

SHAPES = [(700, 3), (64,), (1, 5000)]
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HAS_HUGE_PAGES = THP.exists() and "[never]" not in THP.read_text()


def train(optimizer_class, step, dtype, **settings):
    """Masters, homes and state after three steps of `step(optimizer, masters, gradients, homes)`."""
    generator = torch.Generator().manual_seed(0)
    masters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    homes = [master.detach().to(torch.bfloat16) for master in masters]
    optimizer = optimizer_class(masters, lr=1e-2, fused=True, **settings)
    for _ in range(3):
        gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
        step(optimizer, masters, gradients, homes)
    state = [{key: value.clone() for key, value in optimizer.state[master].items()} for master in masters]
    return masters, homes, state


def by_torch(optimizer, masters, gradients, homes, *, scale):
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = gradient.float() * scale
    optimizer.step()
    for master, home in zip(masters, homes, strict=True):
        home.copy_(master.detach())


def in_one_pass(optimizer, masters, gradients, homes, *, scale):
    assert takes(optimizer)
    update_masters(compiled_steps(), optimizer, map(MasterUpdate, masters, gradients, homes), scale=scale)


@pytest.fixture(scope="module", autouse=True)
def compiler():
    if compiled_steps() is None:
        pytest.skip("no C++ compiler")


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("optimizer_class", "settings"),
    [(torch.optim.AdamW, {"weight_decay": 0.1}), (torch.optim.Adam, {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6})],
)
def test_same_numbers_as_the_fused_step(optimizer_class, settings, dtype, scale):
    expected = train(optimizer_class, lambda *given: by_torch(*given, scale=scale), dtype, **settings)
    found = train(optimizer_class, lambda *given: in_one_pass(*given, scale=scale), dtype, **settings)
    for ours, theirs in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    for master, home in zip(found[0], found[1], strict=True):
        assert torch.equal(home, master.detach().to(torch.bfloat16))
    for ours, theirs in zip(found[2], expected[2], strict=True):
        assert ours.keys() == theirs.keys()
        assert int(ours["step"]) == int(theirs["step"]) == 3
        torch.testing.assert_close(ours["exp_avg_sq"], theirs["exp_avg_sq"], rtol=1e-6, atol=1e-9)


def test_settings_that_it_does_not_know_are_left_to_torch():
    param = [torch.nn.Parameter(torch.zeros(2))]

    class Subclass(torch.optim.AdamW):
        pass

    assert not takes(torch.optim.AdamW(param, amsgrad=True))
    assert not takes(torch.optim.SGD(param, lr=0.1))
    assert not takes(Subclass(param))


def huge_bytes(tensor):
    """Of the mapping that the tensor lies in: the process's other memory comes and goes."""
    lies_in = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            lies_in = int(bounds[1], 16) <= tensor.data_ptr() < int(bounds[2], 16)
        elif lies_in and (found := re.match(r"AnonHugePages: *(\d+) kB", line)):
            return int(found[1]) * 1024
    raise AssertionError("not mapped")


def has_huge_pages_left():
    """Whether this system gives some now: not where its memory is in pieces."""
    memory = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return huge_bytes(torch.frombuffer(memory, dtype=torch.uint8).fill_(1)) > 32 << 20


@pytest.mark.skipif(not HAS_HUGE_PAGES, reason="this system gives no huge pages")
def test_huge_pages_are_huge():
    copied = in_huge_pages(torch.ones(16 << 20))
    if huge_bytes(copied) <= 32 << 20 and not has_huge_pages_left():
        pytest.skip("this system has no huge pages left")
    assert huge_bytes(copied) > 32 << 20


def test_huge_pages_hold_what_was_copied_after_the_source_is_gone():
    values = torch.randn(700_000)
    copied = in_huge_pages(values)
    expected = values.clone()
    del values
    assert torch.equal(copied, expected)
    assert torch.equal(in_huge_pages(torch.ones(3)), torch.ones(3))
