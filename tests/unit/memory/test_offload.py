"""Layer offload: which unit is where, what is copied, and that nothing computes with a weight that is away."""

import gc
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from forked import FORK, fork
from residency import resident_bytes
from torch import nn

from diffsynth_ray.memory.checkpointing import BlockCall
from diffsynth_ray.memory.host import HostSegment, NodePlace, populate
from diffsynth_ray.memory.offload import LayerOffload, Unit, choose_residents
from diffsynth_ray.memory.placement import place, split_units

torch.set_num_threads(1)
CPU = torch.device("cpu")
BLOCK_BYTES = 4 * (64 * 64 + 64)


class Source:
    """Weights from a state dict, and which of them were read."""

    def __init__(self, state):
        self.state, self.read_names = state, []

    def read(self, name, into=None):
        self.read_names.append(name)
        return self.state[name].clone()


class IntoSource(Source):
    """Reads straight to where a value is wanted."""

    def read(self, name, into=None):
        value = super().read(name)
        return value if into is None else into.copy_(value)


class Model(nn.Module):
    def __init__(self, num_blocks):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.embed = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(num_blocks))

    def forward(self, x):
        x = self.embed(x) * self.scale
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


def build(num_blocks=6, *, budget_bytes=None, trained=(), group=None, source_type=Source):
    torch.manual_seed(0)
    real = Model(num_blocks).requires_grad_(False)
    model = Model(num_blocks).requires_grad_(False).to("meta")
    for number in trained:
        real.blocks[number].requires_grad_(True)
        model.blocks[number].requires_grad_(True)
    source = source_type(real.state_dict())
    units = {"model": split_units(model, list(model.blocks), max_bytes=None)}
    built = place({"model": model}, {"model": source}, device=CPU, units=units, group=group, say=print)
    offload = LayerOffload(list(built.values()), device=CPU, budget_bytes=budget_bytes)
    for module, unit in built.items():
        module.forward = BlockCall(module, recompute=True, unit=unit, offload=offload)
    return real, model, offload, source


def step(model, x):
    x = x.clone().requires_grad_()
    result = model(x)
    result.square().sum().backward()
    return result.detach(), x.grad


def test_values_are_read_straight_to_their_places():
    real, model, offload, source = build(trained=(2,), source_type=IntoSource)
    assert len(source.read_names) == len(real.state_dict())
    x = torch.randn(3, 64)
    offload.begin()
    result, gradient = step(model, x)
    expected, expected_gradient = step(real, x)
    assert torch.equal(result, expected)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("trained", [(), (2, 5)])
@pytest.mark.parametrize("budget_units", [0, 3, 100])
def test_offloaded_computes_the_same(budget_units, trained):
    real, model, offload, source = build(budget_bytes=budget_units * BLOCK_BYTES, trained=trained)
    x = torch.randn(3, 64)
    for _ in range(3):
        offload.begin()
        for got, expected in zip(step(model, x), step(real, x), strict=True):
            assert torch.equal(got, expected)
        assert offload.loaded_bytes <= max(budget_units, 2) * BLOCK_BYTES
    for number in trained:
        assert torch.equal(model.blocks[number].weight.grad, real.blocks[number].weight.grad)
    assert sorted(source.read_names) == sorted(real.state_dict())


def test_a_weight_that_is_away_is_nan_and_takes_no_memory():
    _, model, _, _ = build()
    weight = model.blocks[0].weight
    assert weight.shape == (64, 64)
    assert weight.isnan().all()
    assert weight.untyped_storage().nbytes() == 4
    assert model.scale == 0.5, "what belongs to no unit is on the device"


@pytest.mark.parametrize(("slots", "loads"), [(2, 10), (3, 8), (4, 6), (6, 2), (7, 0)])
def test_known_order_loads_no_more_than_the_optimum(slots, loads):
    """Forward 0..6 and backward 6..0 through 7 units: what is on the device at a turn is not loaded again.

    With s units on the device each of the two turns keeps all of them, so that 2 (7 - s) loads are left.
    """
    _, model, offload, _ = build(budget_bytes=slots * BLOCK_BYTES)
    for _ in range(3):
        offload.begin()
        step(model, torch.ones(1, 64))
    before = offload.moved_bytes
    offload.begin()
    step(model, torch.ones(1, 64))
    assert (offload.moved_bytes - before) / BLOCK_BYTES <= loads


def units_of(sizes):
    return [Unit(f"{n}", [], size, host=torch.zeros(size, dtype=torch.uint8)) for n, size in enumerate(sizes)]


def use_all(offload, order, kind="train"):
    offload.begin(kind)
    for unit in order:
        with offload.use(unit):
            pass


def loads(offload, order):
    """Names of the units that a predicted micro step with these uses loads; it waits for none of them."""
    for _ in range(4):
        use_all(offload, order)
    loaded, load = [], offload._load
    offload._load = lambda unit: (loaded.append(unit.name), load(unit))
    offload.stalls.take_s()
    use_all(offload, order)
    assert offload.stalls.take_s() == 0
    offload._load = load
    return loaded


@pytest.mark.parametrize(
    ("count", "slots", "resident"), [(12, 2, 0), (12, 4, 0), (12, 5, 1), (12, 8, 4), (12, 11, 7), (12, 12, 12), (60, 30, 26)]
)
@pytest.mark.parametrize("rounds", [1, 3])
def test_what_only_goes_forward_loads_what_does_not_fit_beside_the_ring(count, slots, resident, rounds):
    """Units that come round and round; loading ahead alone would load all of them in each round."""
    units = units_of([10] * count)
    offload = LayerOffload(units, device=CPU, budget_bytes=10 * slots)
    assert len(loads(offload, units * rounds)) == (count - resident) * rounds


def test_residents_lie_evenly_between_the_others():
    units = units_of([10] * 12)
    offload = LayerOffload(units, device=CPU, budget_bytes=80)
    assert set(loads(offload, units)) == {unit.name for number, unit in enumerate(units) if number % 3 != 2}


def test_a_pictures_steps_keep_their_units_though_others_come_before_and_after():
    encoder, dit, vae = units_of([30] * 3), units_of([10] * 40), units_of([20])
    offload = LayerOffload([*encoder, *dit, *vae], device=CPU, budget_bytes=4 * 30 + 60)
    found = loads(offload, encoder * 2 + dit * 8 + vae)
    assert len(found) <= 2 * 3 + (40 - 6) * 8 + 1


def test_large_and_small_units_take_no_more_than_the_budget():
    sizes = [30, 10, 20, 10, 30, 10, 20, 10, 10, 10]
    units = units_of(sizes)
    offload = LayerOffload(units, device=CPU, budget_bytes=4 * 30 + 30)
    highest, load = [], offload._load
    offload._load = lambda unit: (load(unit), highest.append(offload.loaded_bytes))
    assert len(loads(offload, units)) < len(units)
    assert max(highest) <= 150


@pytest.mark.parametrize("budget", [20, 40, 50, 80, 110])
def test_where_passes_go_forth_and_back_nothing_stays_by_plan(budget):
    units = units_of([10] * 12)
    both = [*units, *reversed(units)]
    assert choose_residents(both, budget_bytes=budget) == set()
    assert choose_residents([*units_of([10] * 3), *both], budget_bytes=budget) == set()
    assert choose_residents([], budget_bytes=budget) == set()


def test_the_next_unit_is_loaded_while_one_computes():
    _, model, offload, _ = build(budget_bytes=3 * BLOCK_BYTES)
    offload.begin()
    step(model, torch.ones(1, 64))
    offload.begin()
    seen = []
    inner = model.blocks[2].forward.inner
    model.blocks[2].forward.inner = lambda x: (seen.append(model.blocks[3].weight.isnan().any().item()), inner(x))[1]
    step(model, torch.ones(1, 64))
    assert seen[0] is False, "block 3 is there while block 2 computes"


def test_another_order_than_predicted_is_survived():
    real, model, offload, _ = build(budget_bytes=2 * BLOCK_BYTES)
    offload.begin()
    step(model, torch.ones(1, 64))
    x = torch.randn(2, 64)
    for order in ([5, 0, 3], [0, 1, 2, 3, 4, 5], [2, 2]):
        offload.begin()
        for number in order:
            assert torch.equal(model.blocks[number](x), real.blocks[number](x))
    assert offload.loaded_bytes <= 2 * BLOCK_BYTES


def test_units_are_split_at_the_threshold():
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64))) for _ in range(2))
    model.head = nn.Linear(64, 64)
    model.requires_grad_(False)
    assert list(split_units(model, list(model.blocks), max_bytes=None)) == ["blocks.0", "blocks.1", "head"]
    split = split_units(model, list(model.blocks), max_bytes=BLOCK_BYTES)
    assert list(split) == ["blocks.0.0", "blocks.0.1", "blocks.1.0", "blocks.1.1", "head"]


class PipeGroup:
    """Two processes of one node."""

    def __init__(self, is_first, pipe, barrier):
        self.place = NodePlace(0, 0 if is_first else 1, 2)
        self.pipe, self.wait = pipe, barrier

    def broadcast(self, value):
        if self.place.local_rank == 0:
            self.pipe.send(value)
            return value
        return self.pipe.recv()

    def barrier(self):
        self.wait.wait(100)


def _second_worker(pipe, barrier, done):
    group = PipeGroup(False, pipe, barrier)
    _, model, _, source = build(group=group)
    result = model(torch.ones(1, 64))
    done.send((source.read_names, result.tolist()))
    done.recv()


def test_two_workers_share_one_copy():
    mine, theirs = FORK.Pipe()
    done, reported = FORK.Pipe()
    barrier = FORK.Barrier(2)
    second = fork(_second_worker, theirs, barrier, reported)
    real, *_ = build(group=PipeGroup(True, mine, barrier))
    names, result = done.recv()
    assert names == ["scale"], "the second worker reads only what it has for itself"
    assert result == real(torch.ones(1, 64)).tolist()
    # One memory: what the first one writes the second one's pages show; here it is enough that it has no name.
    assert not [name for name in os.listdir("/dev/shm") if "dsray" in name]
    done.send("end")
    second.join(100)
    assert second.exitcode == 0


class OneOfTwo:
    """The first worker of two, whose second one is not looked at."""

    place = NodePlace(0, 0, 2)

    def broadcast(self, value):
        return value

    def barrier(self):
        pass


@pytest.mark.parametrize("group", [None, OneOfTwo()])
def test_a_segment_goes_with_its_last_user(group):
    segment = HostSegment(64 << 20, device=CPU, group=group)
    segment.data.fill_(1)
    place = segment.data.data_ptr(), segment.data.numel()
    assert resident_bytes(*place) >= 60 << 20
    del segment
    gc.collect()
    assert resident_bytes(*place) < 30 << 20


@pytest.mark.parametrize("group", [None, OneOfTwo()])
def test_memory_is_there_before_it_is_written(group):
    segment = HostSegment((200 << 20) + 5, device=CPU, group=group)
    place = segment.data.data_ptr(), segment.data.numel()
    before = resident_bytes(*place)
    populate(segment.data)
    assert resident_bytes(*place) - before >= 190 << 20
    assert not segment.data.any()


def test_a_process_that_forks_does_not_copy_what_is_pinned():
    segment = HostSegment(64 << 20, device=CPU)
    segment.data.fill_(1)
    address = segment.data.data_ptr()
    here, there = FORK.Pipe()
    child = fork(lambda: there.send(Path("/proc/self/maps").read_text()))
    maps = here.recv()
    child.join()
    assert not is_mapped(address, maps)
    assert is_mapped(address, Path("/proc/self/maps").read_text())


def is_mapped(address, maps):
    """In the text of a process's /proc/PID/maps; neighbours of one kind may be one entry."""
    bounds = ([int(bound, 16) for bound in line.split()[0].split("-")] for line in maps.splitlines())
    return any(start <= address < end for start, end in bounds)


@pytest.mark.parametrize("failing", range(11))
def test_a_load_that_fails_leaves_nothing_in_use(failing, monkeypatch):
    """As when a sample between two steps finds no memory, and the training goes on."""
    real, model, offload, _ = build(budget_bytes=3 * BLOCK_BYTES)
    x = torch.randn(3, 64)
    step(model, x)
    offload.begin()
    load, calls = offload._load, iter(range(100))

    def scarce(unit):
        if next(calls) == failing:
            raise torch.OutOfMemoryError("no memory")
        load(unit)

    monkeypatch.setattr(offload, "_load", scarce)
    with torch.no_grad(), suppress(torch.OutOfMemoryError):
        model(x)
        model(x)
    assert next(calls) == failing + 1, "it went on after the error"
    assert [unit.uses for unit in offload.units] == [0] * len(offload.units)
    offload.begin()
    found, expected = step(model, x), step(real, x)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("slots", [3, 4, 6])
def test_in_a_known_order_everything_is_there_before_it_is_asked_for(slots, monkeypatch):
    _, model, offload, _ = build(budget_bytes=slots * BLOCK_BYTES)
    offload.begin()
    step(model, torch.ones(1, 64))
    assert offload.stalls.take_s() > 0
    late = []
    arrive = offload._arrive
    monkeypatch.setattr(offload, "_arrive", lambda unit: (late.append(unit.name), arrive(unit)))
    for _ in range(3):
        offload.begin()
        step(model, torch.ones(1, 64))
    assert late == []
    assert offload.stalls.take_s() == 0


@pytest.fixture
def late(monkeypatch):
    """How many units a micro step waits for."""

    def count(offload, order, kind):
        found = []
        with monkeypatch.context() as patched:
            arrive = offload._arrive
            patched.setattr(offload, "_arrive", lambda unit: (found.append(unit.name), arrive(unit)))
            use_all(offload, order, kind)
        return len(found)

    return count


def test_after_a_validation_the_order_of_training_is_known(late):
    units = units_of([10] * 12)
    offload = LayerOffload(units, device=CPU, budget_bytes=50)
    both = [*units, *reversed(units)]
    for _ in range(3):
        use_all(offload, both, "train")
        use_all(offload, units, "evaluate")
        use_all(offload, units, "evaluate")
    assert late(offload, both, "train") == 0
    assert late(offload, units, "evaluate") == 0


def test_the_first_pass_of_a_kind_is_predicted_by_what_was_used_last(late):
    """Also where what came between used nothing, as the encoding of samples that are encoded."""
    units = units_of([10] * 12)
    offload = LayerOffload(units, device=CPU, budget_bytes=50)
    for _ in range(3):
        use_all(offload, [*units, *reversed(units)], "train")
    use_all(offload, [], "encode")
    assert late(offload, units, "evaluate") == 0


def test_a_unit_that_is_being_written_is_waited_for_and_not_loaded_ahead():
    """As after an update on the host, whose threads write the weights while the next step begins."""
    _, model, offload, _ = build(budget_bytes=3 * BLOCK_BYTES)
    x = torch.ones(1, 64)
    for _ in range(2):
        offload.begin()
        step(model, x)

    class Writing:
        def __init__(self, unit):
            self.unit, self.waited = unit, False

        def done(self):
            return False

        def wait(self):
            self.waited = True
            for slot in self.unit.slots:
                slot.view(self.unit.host).fill_(0.25)

    for unit in offload.units:
        offload.evict(unit)
        unit.pending = Writing(unit)
    writing = [unit.pending for unit in offload.units]
    offload.begin()
    with offload.use(offload.units[0]):
        assert [each.waited for each in writing] == [True] + [False] * (len(writing) - 1)
        assert all(bool((slot.param == 0.25).all()) for slot in offload.units[0].slots)
    assert offload.units[0].pending is None
