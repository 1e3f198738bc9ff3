"""One step of the trainer, at the tiny size, in this process."""

import math

import pytest
import torch
from forked import start_clean
from tiny_trainer import build_job, build_trainer, micro, train, train_as_rank, weights

from diffsynth_ray.errors import JobFileError, ModelError
from diffsynth_ray.train.checkpoint import commit_checkpoint, find_checkpoints, read_checkpoint, shard_name
from diffsynth_ray.train.shards import ShardedState, write_shard
from diffsynth_ray.train.storage import Storage
from diffsynth_ray.train.strategy import host

torch.set_num_threads(1)


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3]], [[0, 1, 2], [3]], [[3], [2, 0], [1]]])
def test_a_step_does_not_depend_on_how_its_samples_are_grouped(parts):
    reference = build_trainer(build_job())
    expected = train(reference, [micro([index]) for index in range(4)])
    trainer = build_trainer(build_job())
    assert train(trainer, [micro(part) for part in parts]) == pytest.approx(expected, abs=1e-5)
    for name, tensor in weights(reference).items():
        # Adam divides by the gradient's size, so that rounding shows in weights whose gradient is nearly zero.
        assert (tensor - trainer.strategy.full_masters()[name]).norm() <= 1e-3 * tensor.norm() + 1e-6, name


def test_gradients_of_a_batch_are_the_mean_of_singles():
    gradients = []
    for parts in ([[0, 1, 2, 3]], [[0], [1], [2], [3]]):
        trainer = build_trainer(build_job(training={"optimizer": "torch.optim.SGD", "max_grad_norm": 0}))
        before = weights(trainer)
        train(trainer, [micro(part) for part in parts], steps=1)
        gradients.append({name: (before[name] - after) / 1e-3 for name, after in weights(trainer).items()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5), name


def test_a_dummy_changes_nothing():
    plain, padded = build_trainer(build_job()), build_trainer(build_job())
    assert train(plain, [micro([0])]) == train(padded, [micro([0]), micro([1], is_dummy=True)])
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, padded.strategy.full_masters()[name])


def test_the_probe_changes_nothing():
    with_probe, without = build_trainer(build_job()), build_trainer(build_job(), probe=False)
    assert train(with_probe, [micro([0, 1])]) == train(without, [micro([0, 1])])


def test_gradient_checkpointing_is_bit_equal():
    kept = build_trainer(build_job(gradient={"checkpointing": False}))
    recomputed = build_trainer(build_job())
    assert train(kept, [micro([0, 1])]) == train(recomputed, [micro([0, 1])])


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "memory",
    [
        {"offload": {"cpu_offload": True}},
        {"offload": {"cpu_offload": True, "vram_budget_gib": 0.001}},
        {"offload": {"cpu_offload": True, "param_size_threshold": 0.05}},
        {"gradient": {"checkpointing_offload": True}, "offload": {"cpu_offload": True}},
        {"offload": {"cpu_offload": True, "optimize_on_cpu": True}},
        {"offload": {"cpu_offload": True, "optimize_on_cpu": True, "param_size_threshold": 0.05}},
    ],
)
def test_where_weights_and_activations_live_is_bit_equal(memory, full, monkeypatch):
    monkeypatch.setattr("diffsynth_ray.memory.activations.MIN_BYTES", 1)
    trained = {"training": {"trainable_models": ["dit"]}, "lora": {"base_model": None}} if full else {}
    plain, moved = build_trainer(build_job(**trained)), build_trainer(build_job(**trained, **memory))
    assert train(moved, [micro([0, 1]), micro([2])]) == train(plain, [micro([0, 1]), micro([2])])
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, weights(moved)[name]), name
    residency = moved.residency
    assert residency.offload.moved_bytes > 0
    assert {unit.name.split(".")[0] for unit in residency.offload.units} >= {"text_encoder", "vae"}
    assert residency.activations is None or residency.activations.moved_bytes > 0


@pytest.mark.parametrize("parts", [[[0, 1]], [[0, 1], [2]]])
def test_the_update_in_one_pass_is_that_of_the_plain_run(parts, monkeypatch):
    """As on a GPU: gradients of one micro step come straight from the staging memory, those of several are summed before."""
    full = {"training": {"trainable_models": ["dit"], "weight_decay": 0.1}, "lora": {"base_model": None}}
    plain = build_trainer(build_job(**full))
    monkeypatch.setattr(host, "_PLAIN_DEVICES", ())
    moved = build_trainer(build_job(**full, offload={"cpu_offload": True, "optimize_on_cpu": True}))
    assert any(group.in_one_pass for group in moved.strategy._groups) == (host.compiled_steps() is not None)
    micros = [micro(part) for part in parts]
    assert train(moved, micros) == pytest.approx(train(plain, micros), rel=1e-5)
    for name, tensor in weights(plain).items():
        assert (tensor - weights(moved)[name]).norm() <= 1e-3 * tensor.norm() + 1e-6, name


def test_fp8_is_close_and_is_the_same_with_offload():
    plain = train(build_trainer(build_job()), [micro([0, 1])])
    stored = build_trainer(build_job(model={"fp8_models": ["dit"]}))
    losses = train(stored, [micro([0, 1])])
    assert losses != plain
    assert losses == pytest.approx(plain, rel=2e-2)
    moved = build_trainer(build_job(model={"fp8_models": ["dit"]}, offload={"cpu_offload": True}))
    assert train(moved, [micro([0, 1])]) == losses
    dtypes = {param.dtype for name, param in stored.graph.named_parameters() if "base_layer.weight" in name}
    assert torch.float8_e4m3fn in dtypes


def test_fp8_of_a_component_that_is_not_there_is_refused():
    with pytest.raises(JobFileError, match="no loaded component 'unet'; it has dit, text_encoder, vae"):
        build_trainer(build_job(model={"fp8_models": ["unet"]}))


def test_full_training_of_two_components_beside_a_lora():
    job = build_job(training={"trainable_models": ["text_encoder"]})
    trainer = build_trainer(job)
    before = weights(trainer)
    train(trainer, [micro([0])], steps=1)
    changed = {name.split(".")[0] for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}
    assert changed == {"dit", "text_encoder"}
    frozen = [name for name, param in trainer.graph.named_parameters() if not param.requires_grad]
    assert any(name.startswith("components.vae") for name in frozen)


def test_masters_keep_what_bf16_rounds_away():
    training = {"precision": "bf16", "learning_rate": 1e-7, "trainable_models": ["dit"]}
    job = build_job(training=training, lora={"base_model": None})
    trainer = build_trainer(job)
    before = weights(trainer)
    train(trainer, [micro([0])], steps=1)
    moved = [not torch.equal(before[name], after) for name, after in weights(trainer).items()]
    assert sum(moved) > 50
    assert all(master.dtype == torch.float32 for master in trainer.strategy.full_masters().values())
    without = build_trainer(
        build_job(
            training=training | {"master_weights": False},
            lora={"base_model": None},
        )
    )
    assert all(master.dtype == torch.bfloat16 for master in without.strategy.full_masters().values())


def test_bf16_sums_gradients_of_micro_steps_in_float32():
    trainer = build_trainer(build_job(training={"precision": "bf16"}))
    one = build_trainer(build_job(training={"precision": "bf16"}))
    losses = train(trainer, [micro([0]), micro([1]), micro([2]), micro([3])])
    assert losses == pytest.approx(train(one, [micro([0, 1, 2, 3])]), rel=2e-2)
    assert all(param.grad is None for param in trainer.trained.values())


def test_resuming_is_bit_equal(tmp_path):
    straight = build_trainer(build_job())
    expected = train(straight, [micro([0, 1])], steps=5)
    first = build_trainer(build_job())
    losses = train(first, [micro([0, 1])], steps=2)
    storage = Storage.at(tmp_path)
    shard = write_shard(storage, shard_name(2, rank=0, world_size=1, writer="w"), first.strategy.state_slices())
    commit_checkpoint(storage, step=2, shards=[shard], token="t", may_commit=lambda: True, keep=2)
    second = build_trainer(build_job())
    [found] = find_checkpoints(storage)
    second.strategy.load_state(read_checkpoint(storage, found, expected_masters=set(second.trained)))
    second.step = found.step
    losses += train(second, [micro([0, 1])], steps=3)
    assert losses == expected
    for name, tensor in weights(straight).items():
        assert torch.equal(tensor, second.strategy.full_masters()[name]), name


class Counting(torch.optim.Optimizer):
    """Its steps are a number, as in optimizers of other packages."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, {"lr": lr})

    def step(self):
        for param in self.param_groups[0]["params"]:
            if param.grad is not None:
                state = self.state[param]
                state["step"] = state["step"] + 1 if state else 1
                param.data.add_(param.grad.sign(), alpha=-self.param_groups[0]["lr"] / state["step"])


def test_resuming_on_the_host_keeps_an_optimizer_s_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.optim.Counting", Counting, raising=False)
    on_host = {"offload": {"cpu_offload": True, "optimize_on_cpu": True}}
    optimizer = {"training": {"optimizer": "torch.optim.Counting"}}
    straight = build_trainer(build_job(**optimizer))
    expected = train(straight, [micro([0, 1])], steps=4)
    storage, losses, step = Storage.at(tmp_path), [], 0
    for number, memory in enumerate([{}, on_host, on_host, {}]):
        trainer = build_trainer(build_job(**optimizer, **memory))
        if number:
            trainer.strategy.load_state(ShardedState(storage, [f"state-{number - 1}"]))
            trainer.step = step
        losses += train(trainer, [micro([0, 1])], steps=1)
        step = trainer.step
        write_shard(storage, f"state-{number}", trainer.strategy.state_slices())
    assert losses == expected
    assert all(torch.equal(tensor, weights(trainer)[name]) for name, tensor in weights(straight).items())


ON_HOST = {"offload": {"cpu_offload": True, "optimize_on_cpu": True}}
ESTIMATING = {"training": {"optimizer": "estimating_optimizer.Estimating", "learning_rate": 1e-2}}


def through_checkpoint(trainer, memory, folder):
    """Another trainer that goes on where this one is, with other memory keys."""
    storage = Storage.at(folder)
    write_shard(storage, f"state-{trainer.step}", trainer.strategy.state_slices())
    other = build_trainer(build_job(**ESTIMATING, **memory))
    other.strategy.load_state(ShardedState(storage, [f"state-{trainer.step}"]))
    other.step = trainer.step
    return other


@pytest.mark.parametrize("memory", [{}, ON_HOST, {"offload": ON_HOST["offload"] | {"param_size_threshold": 0.05}}])
def test_resuming_keeps_what_an_optimizer_has_estimated(tmp_path, memory):
    straight, first = (build_trainer(build_job(**ESTIMATING, **memory)) for _ in range(2))
    expected = train(straight, [micro([0, 1])], steps=5)
    losses = train(first, [micro([0, 1])], steps=3)
    second = through_checkpoint(first, memory, tmp_path)
    losses += train(second, [micro([0, 1])], steps=2)
    assert losses == expected
    assert all(torch.equal(tensor, weights(second)[name]) for name, tensor in weights(straight).items())


def test_what_an_optimizer_has_estimated_goes_to_the_host_and_back(tmp_path):
    """On the host each block has an estimate of its own; elsewhere a run goes on with the largest."""
    first = build_trainer(build_job(**ESTIMATING))
    train(first, [micro([0, 1])], steps=3)
    [estimate] = estimates(first.strategy.optimizer.optimizer)
    assert estimate[0] > 0.25
    second = through_checkpoint(first, ON_HOST, tmp_path)
    assert {found for group in second.strategy._groups for found in estimates(group.optimizer)} == {estimate}
    train(second, [micro([0, 1])], steps=2)
    third = through_checkpoint(second, {}, tmp_path)  # updates go on after a step; a checkpoint has waited for them
    theirs = {found for group in second.strategy._groups for found in estimates(group.optimizer)}
    assert len(theirs) > 1
    assert estimates(third.strategy.optimizer.optimizer) == [(max(distance for distance, _ in theirs), 5)]


def estimates(optimizer):
    return [(group["distance"], group["count"]) for group in optimizer.param_groups]


def test_fp8_of_a_component_without_blocks_is_told(capsys):
    build_trainer(build_job(model={"fp8_models": ["vae", "dit"]}))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("model.fp8_models")]
    assert said == ["model.fp8_models: vae has no repeated blocks of Linear layers, and stays as it is"]


def test_a_component_that_does_not_exist_is_named():
    with pytest.raises(JobFileError, match=r"no component 'controlnet'; it has dit, text_encoder, vae"):
        build_trainer(build_job(training={"trainable_models": ["controlnet"]}))


def test_a_component_without_part_in_the_loss_is_refused():
    job = build_job(training={"trainable_models": ["dit"]}, lora={"base_model": None})
    trainer = build_trainer(job, probe=False)
    trainer.graph.forward = lambda *inputs: torch.ones(1, requires_grad=True)
    with pytest.raises(ModelError, match="no trained parameter has a gradient"):
        trainer.start(micro([0]))


def test_not_looking_for_unused_parameters_that_there_are_is_refused_on_two_workers(monkeypatch):
    """Torch ends in the second step, without naming the key."""
    full = {"trainable_models": ["dit"], "find_unused_parameters": False}
    job = build_job(training=full, lora={"base_model": None})
    build_trainer(job)  # one worker has no use for them
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    with pytest.raises(ModelError, match=r"find_unused_parameters: got false, and 6 of 77 .* \(first: dit\..*use \"auto\""):
        build_trainer(job)


def test_the_learning_rate_follows_the_schedule():
    job = build_job(training={"lr_scheduler": "cosine", "warmup_steps": 2, "num_epochs": 1})
    trainer = build_trainer(job)  # 40 samples / 4 = 10 steps
    assert trainer.lr(0) == 0
    assert trainer.lr(1) == pytest.approx(0.5e-3)
    assert trainer.lr(2) == pytest.approx(1e-3)
    assert trainer.lr(6) == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 0.5)))


def test_a_step_has_its_own_learning_rate_and_noise():
    trainer = build_trainer(build_job(training={"warmup_steps": 2}))
    before = weights(trainer)
    first = trainer.train_step([micro([0])], num_samples=1)
    assert all(torch.equal(after, before[name]) for name, after in weights(trainer).items()), "warm-up begins with 0"
    second = trainer.train_step([micro([0])], num_samples=1)
    assert not all(torch.equal(after, before[name]) for name, after in weights(trainer).items())
    assert (first.lr, second.lr) == (trainer.lr(0), trainer.lr(1))
    assert first.loss_sum != second.loss_sum, "the same sample and weights: only noise and timestep are others"


def test_the_trained_range_of_timesteps_is_the_jobs():
    trainer = build_trainer(
        build_job(training={"min_timestep_boundary": 0.4, "max_timestep_boundary": 0.5}), probe=False, num_samples=4
    )
    ids = [trainer._draw(micro([0, 1, 2, 3]), step=step)[1] for step in range(50)]
    assert 400 <= int(torch.cat(ids).min()) < 410
    assert 490 <= int(torch.cat(ids).max()) < 500


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_workers_sum_the_gradients_of_all_their_micro_steps(precision, tmp_path):
    """In bf16 each micro step's go over the workers by themselves, before they are added to the masters' gradients."""
    sgd = {"optimizer": "torch.optim.SGD", "max_grad_norm": 0, "weight_decay": 0, "learning_rate": 1.0}
    job = build_job(training={"precision": precision} | sgd)
    alone = build_trainer(job)
    before = weights(alone)
    alone.train_step([micro([index]) for index in range(4)], num_samples=4)
    hands = [[micro([0]), micro([1])], [micro([2]), micro([3])]]
    ranks = [start_clean(train_as_rank, rank, tmp_path, job, hand) for rank, hand in enumerate(hands)]
    for process in ranks:
        process.join(100)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, expected in weights(alone).items():
        assert torch.equal(first[name], second[name]), name
        update, expected_update = first[name] - before[name], expected - before[name]
        tolerance = 1e-5 if precision == "fp32" else 0.02
        assert (update - expected_update).norm() <= tolerance * expected_update.norm() + 1e-7, name
