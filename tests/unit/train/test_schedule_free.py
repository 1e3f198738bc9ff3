"""Optimizers that train other weights than those to evaluate: what is validated, exported and kept to go on."""

import pytest
import torch
from tiny_trainer import build_job, build_trainer, micro, train, weights

from diffsynth_ray.config.schema import Job
from diffsynth_ray.errors import JobFileError
from diffsynth_ray.train.optim import check_optimizer, state_bytes
from diffsynth_ray.train.shards import ShardedState, write_shard
from diffsynth_ray.train.storage import Storage

torch.set_num_threads(1)

SGD = {"optimizer": "schedule_free.SGD", "learning_rate": 1.0}
ADAM = {"optimizer": "schedule_free.AdamW", "learning_rate": 1e-2}
MEMORY = {"ddp": {}, "on the host": {"offload": {"cpu_offload": True, "optimize_on_cpu": True}}}
BF16 = {"precision": "bf16"}


def job(training, memory):
    return build_job(training=training, **MEMORY[memory])


def z_of(trainer):
    return {name.removeprefix("z/"): part for name, part in trainer.strategy.state_slices().items() if name.startswith("z/")}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("training", [SGD, ADAM, ADAM | BF16], ids=["SGD", "AdamW", "AdamW in bf16"])
def test_inside_are_the_averaged_weights_and_outside_the_trained_ones(training, memory):
    trainer = build_trainer(job(training, memory))
    train(trainer, [micro([0, 1])])
    trained = weights(trainer)
    expected = {name: (trained[name] - 0.1 * z.values.reshape(z.shape)) / 0.9 for name, z in z_of(trainer).items()}
    with trainer.strategy.eval_weights():
        evaluated = weights(trainer)
        computed = {name: param.detach().clone() for name, param in parameters(trainer).items()}
    assert expected
    for name, tensor in expected.items():
        assert torch.allclose(evaluated[name], tensor, atol=1e-5), name
        assert torch.equal(computed[name], evaluated[name].to(computed[name].dtype)), "it is validated with what is exported"
    assert any(not torch.equal(evaluated[name], trained[name]) for name in expected)
    for name, param in parameters(trainer).items():
        assert torch.equal(weights(trainer)[name], trained[name])
        assert torch.equal(param, trained[name].to(param.dtype))


def parameters(trainer):
    """What the model computes with; a block on the host is looked up there."""
    if not hasattr(trainer.strategy, "_groups"):
        return trainer.trained
    return {
        name: param.detach() if home is None else home
        for group in trainer.strategy._groups
        for name, param, home in zip(group.names, group.params, group.homes, strict=True)
    }


@pytest.mark.parametrize("memory", MEMORY)
def test_validating_changes_nothing_and_a_block_that_was_loaded_is_loaded_anew(memory):
    plain, watched = (build_trainer(job(ADAM, memory)) for _ in range(2))
    expected, found, validated = [], [], []
    sample = plain.encode(micro([2]).batch)
    for _ in range(4):
        expected += train(plain, [micro([0, 1])], steps=1)
        found += train(watched, [micro([0, 1])], steps=1)
        inputs = sample, torch.ones_like(sample.latents), torch.tensor([500])
        outside = watched.evaluate(*inputs)
        with watched.strategy.eval_weights():
            validated.append(watched.evaluate(*inputs).item())
        assert torch.equal(watched.evaluate(*inputs), outside)
        assert validated[-1] != outside.item() or watched.step == 1, "after one step the average is its first weights"
    assert found == expected
    assert all(torch.equal(tensor, weights(watched)[name]) for name, tensor in weights(plain).items())


def test_on_the_host_it_trains_and_means_the_same():
    trainers = [build_trainer(job(ADAM | {"max_grad_norm": 0}, memory)) for memory in MEMORY]
    losses = [train(trainer, [micro([0, 1])], steps=4) for trainer in trainers]
    assert losses[0] == losses[1]
    evaluated = []
    for trainer in trainers:
        with trainer.strategy.eval_weights():
            evaluated.append(weights(trainer))
    assert all(torch.equal(tensor, evaluated[1][name]) for name, tensor in evaluated[0].items())


@pytest.mark.parametrize("memory", MEMORY)
def test_a_run_goes_on_with_the_same_bits(tmp_path, memory):
    straight, first, second = (build_trainer(job(ADAM, memory)) for _ in range(3))
    expected = train(straight, [micro([0, 1])], steps=5)
    losses = train(first, [micro([0, 1])], steps=3)
    write_shard(Storage.at(tmp_path), "state", first.strategy.state_slices())
    second.strategy.load_state(ShardedState(Storage.at(tmp_path), ["state"]))
    second.step = 3
    losses += train(second, [micro([0, 1])], steps=2)
    assert losses == expected
    assert all(torch.equal(tensor, weights(second)[name]) for name, tensor in weights(straight).items())


def test_its_state_is_reckoned_with():
    assert state_bytes(build_job(training=SGD).training) == 4
    assert state_bytes(build_job(training=ADAM).training) == 8


@pytest.mark.parametrize(("stage", "optimizer", "refused"), [(2, SGD, False), (3, SGD, True), (3, {}, False)])
def test_zero_3_is_refused(stage, optimizer, refused):
    given = Job.model_validate(
        {"name": "job", "training": optimizer, "distributed": {"strategy": "deepspeed", "zero_stage": stage}}
    )
    if not refused:
        check_optimizer(given)
        return
    with pytest.raises(JobFileError, match=r"distributed\.zero_stage: schedule_free\.SGD is schedule-free.*use zero_stage = 2"):
        check_optimizer(given)
