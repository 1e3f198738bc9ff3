"""`gradient.checkpointing = "auto"`: which blocks are recomputed changes no number; all workers choose the same."""

from dataclasses import replace

import pytest
import torch
from tiny_trainer import build_job, build_trainer, micro

from diffsynth_ray.memory.checkpointing import BlockCall
from diffsynth_ray.memory.selective import BlockUse, RecomputationMeter, choose
from diffsynth_ray.train.residency import recomputes_at_first
from diffsynth_ray.train.selection import DeviceMemory, keep_what_fits

torch.set_num_threads(1)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def block_calls(trainer):
    return tuple(block.forward for block in trainer.family.repeated_blocks("dit"))


def losses(trainer):
    return [trainer.train_step([micro([0, 1])], num_samples=2).loss_sum.item() for _ in range(3)]


def test_losses_and_weights_are_the_same_whichever_blocks_are_recomputed():
    found = []
    for kept in ([], [0], [1], [0, 1]):
        trainer = build_trainer(build_job())
        for position in kept:
            block_calls(trainer)[position].recompute = False
        found.append((losses(trainer), [param.detach().clone() for param in trainer.trained.values()]))
    for run_losses, weights in found[1:]:
        assert run_losses == found[0][0]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights, found[0][1], strict=True))


def test_as_many_blocks_as_fit_the_costliest_to_recompute_first():
    same = [BlockUse(10, 1.0)] * 4
    assert choose(same, budget_bytes=25) == [2, 3]
    assert choose(same, budget_bytes=9) == []
    assert choose(same, budget_bytes=40) == [0, 1, 2, 3]
    # Twice the time a byte; and a small one fits where a large one does not.
    assert choose([BlockUse(10, 1.0), BlockUse(10, 2.0), BlockUse(4, 0.1)], budget_bytes=15) == [1, 2]


def test_a_recomputation_is_measured():
    held = iter([100, 150])
    block = torch.nn.Linear(2, 2)
    call = BlockCall(block, recompute=True)
    call.meter = RecomputationMeter(lambda: next(held))
    call(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert call.meter.use is not None
    assert call.meter.use.kept_bytes == 150 - 100 - 8  # two results of four bytes
    assert call.meter.use.seconds > 0


def measured_trainer(*, use=BlockUse(1000, 0.01)):
    trainer = build_trainer(build_job())
    calls = block_calls(trainer)
    for call in calls:
        call.meter = RecomputationMeter(lambda: 0)
        call.meter.use = use
    trainer.residency = replace(trainer.residency, selectable=calls)
    return trainer


def budget_for(trainer, num_bytes, *, peak=5000):
    """A device on which `num_bytes` are left after everything else."""
    elements = sum(param.numel() for param in trainer.trained.values())
    return DeviceMemory(int((num_bytes + peak + 12 * elements) / 0.92) + 2, peak)


@pytest.mark.parametrize(("left", "kept"), [(990, 0), (1000, 1), (1990, 1), (2000, 2), (-500, 0)])
def test_what_fits_is_kept_and_said(left, kept):
    trainer, said = measured_trainer(), []
    memory = budget_for(trainer, left)
    assert keep_what_fits(trainer, memory, gather=lambda value: [value], say=said.append) == kept
    assert [call.recompute for call in block_calls(trainer)] == [True] * (2 - kept) + [False] * kept
    assert said[0].startswith(f'gradient.checkpointing = "auto": {kept} of 2 blocks keep their activations (')
    assert all(call.meter is None for call in block_calls(trainer))


def test_all_workers_decide_by_the_smallest_budget_and_the_largest_blocks():
    trainer = measured_trainer()
    other = (2050, [BlockUse(1100, 9.0), BlockUse(1000, 9.0)])
    kept = keep_what_fits(trainer, budget_for(trainer, 5000), gather=lambda value: [value, other], say=lambda line: None)
    assert kept == 1  # rank 0 alone would keep both, of 1000 bytes each, and so in the other's 2050
    assert [call.recompute for call in block_calls(trainer)] == [True, False]


def test_a_block_that_was_not_measured_leaves_everything_as_it_is():
    trainer = measured_trainer(use=None)
    assert keep_what_fits(trainer, budget_for(trainer, 5000), gather=lambda value: [value], say=lambda line: None) == 0
    assert all(call.recompute for call in block_calls(trainer))


def test_auto_begins_with_recomputation_on_a_device_only():
    auto = build_job(gradient={"checkpointing": "auto"})
    assert [recomputes_at_first(auto, device) for device in (CPU, CUDA)] == [False, True]
    offload = build_job(gradient={"checkpointing": "auto"}, offload={"cpu_offload": True})
    assert recomputes_at_first(offload, CPU)
    assert [recomputes_at_first(build_job(gradient={"checkpointing": asked}), CUDA) for asked in (True, False)] == [True, False]


def test_auto_on_a_cpu_trains_as_without_recomputation():
    runs = []
    for asked in (True, "auto"):
        trainer = build_trainer(build_job(gradient={"checkpointing": asked}))
        runs.append(losses(trainer))
        assert [call.recompute for call in block_calls(trainer)] == [asked is True] * 2
        assert trainer.residency.selectable == ()
    assert runs[0] == runs[1]
