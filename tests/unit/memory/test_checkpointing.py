"""BlockCall: recomputation, activations on the host and compiled blocks give what the plain block gives."""

import pytest
import torch
from torch import nn

from diffsynth_ray.memory import activations
from diffsynth_ray.memory.activations import FETCH_AHEAD, ActivationStore
from diffsynth_ray.memory.checkpointing import BlockCall

torch.set_num_threads(1)


class Block(nn.Module):
    """Two streams, a shared table and an argument that is no tensor, as in the real blocks."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.calls = 0

    def forward(self, hidden, text, *, mask=None, tables=None, scale=1.0):
        self.calls += 1
        hidden = hidden + torch.tanh(self.first(hidden) + self.second(text).mean()) * scale
        return text * (1 if mask is None else mask), hidden * tables[0]


def build(**options):
    torch.manual_seed(0)
    blocks = [Block() for _ in range(3)]
    if options:
        for block in blocks:
            block.forward = BlockCall(block, **options)
    return blocks


def run(blocks, *, frozen_input=True):
    generator = torch.Generator().manual_seed(1)
    hidden, text = torch.randn(2, 5, 8, generator=generator), torch.randn(2, 3, 8, generator=generator)
    hidden.requires_grad_(not frozen_input)
    tables = (torch.randn(5, 8, generator=generator), None)
    for block in blocks:
        text, hidden = block(hidden, text, tables=tables, mask=torch.ones(2, 3, 1), scale=0.5)
    (hidden.square().sum() + text.sum()).backward()
    return hidden.detach(), [param.grad for block in blocks for param in block.parameters()]


def assert_same(got, expected):
    assert torch.equal(got[0], expected[0])
    for one, other in zip(got[1], expected[1], strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("frozen_input", [True, False])
def test_recomputation_is_bit_equal(frozen_input):
    blocks = build(recompute=True)
    assert_same(run(blocks, frozen_input=frozen_input), run(build(), frozen_input=frozen_input))
    assert [block.calls for block in blocks] == [2, 2, 2]


class Answering(nn.Module):
    """A block whose results are not all tensors, as T5's (a cache that it has not) and Wan's time embedding (no picture's)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden, bias):
        return {"hidden": self.linear(hidden) + bias, "rest": (None, bias, 3)}


def test_results_that_are_no_tensors_come_through():
    torch.manual_seed(0)
    block = Answering()
    seen = []
    for forward in (block.forward, BlockCall(block, recompute=True)):
        block.zero_grad()
        hidden, bias = torch.ones(2, 8, requires_grad=True), torch.full((8,), 0.5, requires_grad=True)
        answer = forward(hidden, bias)
        none, bias_again, number = answer["rest"]
        assert (none, number) == (None, 3)
        (answer["hidden"].square().sum() + (2 * bias_again).sum()).backward()
        seen.append([answer["hidden"], hidden.grad, bias.grad, block.linear.weight.grad.clone()])
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


def test_without_gradients_nothing_is_recomputed():
    blocks = build(recompute=True)
    with torch.no_grad():
        blocks[0](torch.ones(1, 1, 8), torch.ones(1, 1, 8), tables=(torch.ones(1), None))
    assert blocks[0].calls == 1


def test_activations_on_the_host_are_bit_equal(monkeypatch):
    monkeypatch.setattr(activations, "MIN_BYTES", 1)
    store = ActivationStore(torch.device("cpu"))
    blocks = build(recompute=True, activations=store)
    expected = run(build())
    assert_same(run(blocks), expected)
    first = store.moved_bytes
    # Hidden states and text of the second and third block; the first block's inputs carry no gradient and stay.
    assert first == 2 * 4 * (2 * 5 * 8 + 2 * 3 * 8)
    for block in blocks:
        block.zero_grad()
    assert_same(run(blocks), expected)
    assert store.moved_bytes == 2 * first
    assert sum(len(pool) for pool in store._free.values()) == 4, "host memory is used again"


def test_all_inputs_of_the_next_blocks_are_on_their_way_back(monkeypatch):
    monkeypatch.setattr(activations, "MIN_BYTES", 1)
    store = ActivationStore(torch.device("cpu"))
    inputs = [[torch.full((3,), float(number), requires_grad=True) for number in (n, -n)] for n in range(1, 6)]
    saved = [store.save(tensors) for tensors in inputs]
    store._let_go(0)
    for number in (4, 3, 2, 1, 0):
        found = store.restore(saved[number])
        assert [torch.equal(*pair) for pair in zip(found, inputs[number], strict=True)] == [True, True]
        there = [{entry.on_device is not None for entry in entries} for entries in saved[:number]]
        assert there == [{before >= number - FETCH_AHEAD} for before in range(number)]
    assert sum(len(pool) for pool in store._free.values()) == 10


def test_blocks_without_a_gradient_are_not_fetched_in_the_place_of_others(monkeypatch):
    """A text encoder's last layers that its family does not read, and a block without inputs of its own."""
    monkeypatch.setattr(activations, "MIN_BYTES", 1)
    store = ActivationStore(torch.device("cpu"))
    shared = store.save([torch.ones(3)])
    saved = [store.save([torch.full((3,), float(number), requires_grad=True)]) for number in range(9)]
    store._let_go(0)
    store.restore(saved[5])
    there = [entry.on_device is not None for [entry] in saved]
    assert there == [2 <= number <= 4 for number in range(9)]
    assert torch.equal(store.restore(shared)[0], torch.ones(3))


def test_inputs_of_many_sizes_share_host_memory(monkeypatch):
    """A data set of many sizes: the memory of the largest, not of one after the other."""
    monkeypatch.setattr(activations, "MIN_BYTES", 1)
    store = ActivationStore(torch.device("cpu"))
    for length in range(40, 65):
        inputs = [torch.randn(2, length, requires_grad=True) for _ in range(3)]
        saved = [store.save([tensor]) for tensor in inputs]
        for tensor, entries in zip(reversed(inputs), reversed(saved), strict=True):
            assert torch.equal(store.restore(entries)[0], tensor)
    assert sum(raw.numel() for pool in store._free.values() for raw in pool) == 3 * 4 * 2 * 64


def test_a_forward_without_its_backward_leaves_nothing(monkeypatch):
    monkeypatch.setattr(activations, "MIN_BYTES", 1)
    store = ActivationStore(torch.device("cpu"))
    blocks = build(recompute=True, activations=store)
    text, hidden = blocks[0](torch.ones(1, 5, 8), torch.ones(1, 3, 8), tables=(torch.ones(1), None))
    blocks[1](hidden, text, tables=(torch.ones(1), None))
    store.clear()
    assert not store._stack
    assert_same(run(build(recompute=True, activations=store)), run(build()))
