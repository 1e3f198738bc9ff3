"""Optimizer, learning rate, clipping."""

import pytest
import torch
from torch import nn

from diffsynth_ray.config.schema import Job, TrainingSection
from diffsynth_ray.errors import JobFileError
from diffsynth_ray.train import optim
from diffsynth_ray.train.optim import MasterOptimizer, check_optimizer, load_optimizer_class, lr_factor


def build(param, **training):
    return MasterOptimizer({"w": param}, TrainingSection.model_validate({"learning_rate": 0.1} | training))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0, 0.5, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.5, 0]),
        ("cosine", [0, 0.5, 1, 0.5, 0]),
        ("polynomial", [0, 0.5, 1, 0.5005, 1e-3]),
    ],
)
def test_lr_factor_at_start_warm_up_peak_half_and_end(name, expected):
    steps = [0, 1, 2, 6, 10]
    found = [lr_factor(name, step=step, warmup_steps=2, num_steps=10) for step in steps]
    assert found == pytest.approx(expected)


def test_restarts_return_to_the_peak():
    peaks = [lr_factor("cosine_with_restarts", step=step, warmup_steps=0, num_steps=8) for step in (0, 2, 4, 6)]
    assert peaks == [1, 1, 1, 1]


def test_clipping_scales_to_the_norm_and_reports_the_norm_before():
    param = nn.Parameter(torch.zeros(4))
    optimizer = build(param, optimizer="torch.optim.SGD", weight_decay=0, max_grad_norm=1.0)
    param.grad = torch.full((4,), 3.0)
    norm = optimizer.step(lr=1.0)
    assert norm.item() == pytest.approx(6.0)
    assert param.detach().norm().item() == pytest.approx(1.0, rel=1e-5)


def test_zero_means_no_clipping():
    param = nn.Parameter(torch.zeros(4))
    optimizer = build(param, optimizer="torch.optim.SGD", weight_decay=0, max_grad_norm=0)
    param.grad = torch.full((4,), 3.0)
    optimizer.step(lr=1.0)
    assert param.detach().norm().item() == pytest.approx(6.0)


def test_bf16_gradients_are_summed_in_float32():
    param = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = build(param, optimizer="torch.optim.SGD", weight_decay=0, max_grad_norm=0)
    for _ in range(512):  # in bf16 a sum of 2**-9 stops growing at 1
        param.grad = torch.full((1,), 2.0**-9, dtype=torch.bfloat16)
        optimizer.collect_gradients()
    param.grad = torch.full((1,), 1.0, dtype=torch.bfloat16)
    optimizer.step(lr=1.0)
    assert optimizer.masters[0].item() == -2.0


def test_unknown_optimizer_names_the_key():
    with pytest.raises(JobFileError, match=r"training\.optimizer: got 'torch\.optim\.Adamw'"):
        load_optimizer_class("torch.optim.Adamw")
    with pytest.raises(JobFileError, match="not a subclass"):
        load_optimizer_class("torch.nn.Linear")


@pytest.mark.parametrize("arguments", [{"beta": 3}, {"betas": [0.9]}, {"betas": 3}, {"betas": [2.0, 0.9]}, {"eps": "small"}])
def test_refused_optimizer_arguments_name_the_key(arguments):
    with pytest.raises(JobFileError, match=r"training\.optimizer_args"):
        build(nn.Parameter(torch.zeros(1)), optimizer_args=arguments)


def test_arguments_that_exclude_each_other_are_told_before_anything_is_loaded():
    job = Job.model_validate({"name": "job", "training": {"optimizer_args": {"foreach": True, "fused": True}}})
    with pytest.raises(JobFileError, match=r"training\.optimizer_args: torch\.optim\.AdamW does not take .*`foreach`"):
        check_optimizer(job)


class NumbersInItsState(torch.optim.SGD):
    """An optimizer that counts in Python numbers, in a parameter's state and in its group."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.param_groups[0]["distance"] = 0.5

    def step(self):
        group = self.param_groups[0]
        group["distance"] *= 0.75
        for param in group["params"]:
            state = self.state[param]
            state["count"] = state.get("count", 0) + 1
            state["sum"] = state.get("sum", 0.0) + 0.1
            param.data.add_(group["distance"] * state["count"] * state["sum"])


class Tensors:
    """A StateReader over tensors in memory."""

    def __init__(self, tensors):
        self.tensors = tensors

    def names(self):
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name, start=0, stop=None):
        return self.tensors[name].reshape(-1)[start:stop].clone()


def test_numbers_of_an_optimizer_travel_too(monkeypatch):
    monkeypatch.setattr(optim, "load_optimizer_class", lambda name: NumbersInItsState)
    training = TrainingSection(precision="fp32")
    first, second = ({"w": torch.nn.Parameter(torch.zeros(3))} for _ in range(2))
    ours, other = optim.MasterOptimizer(first, training), optim.MasterOptimizer(second, training)
    for optimizer in (ours, ours):
        optimizer.params[0].grad = torch.ones(3)
        optimizer.step(1e-3)
    state = Tensors({name: tensor.clone() for name, tensor in ours.state_tensors().items()})
    own = {"master/w", "count#int/w", "sum#float/w", "group.distance#float/"}
    assert own | {"group.momentum#int/", "group.dampening#int/", "group.weight_decay#float/"} == set(state.names())
    other.load_state(state)
    for optimizer in (ours, other):
        optimizer.params[0].grad = torch.ones(3)
        optimizer.step(1e-3)
    assert torch.equal(first["w"], second["w"])
    assert type(other.optimizer.state[other.params[0]]["count"]) is int


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moving_averages_follow_their_formula_and_survive_a_restart(dtype):
    training = {"ema_decay": 0.75, "max_grad_norm": 0.0, "optimizer": "torch.optim.SGD", "weight_decay": 0.0}

    def start():
        return build(nn.Parameter(torch.tensor([1.0, 2.0], dtype=dtype)), **training)

    def step(optimizer):
        optimizer.params[0].grad = torch.tensor([1.0, -2.0], dtype=dtype)
        optimizer.step(0.1)

    optimizer, expected = start(), torch.tensor([1.0, 2.0])
    for _ in range(3):
        step(optimizer)
        expected = 0.75 * expected + 0.25 * optimizer.masters[0].detach().float()
    assert torch.allclose(optimizer.named_averages()["w"], expected, atol=1e-6)
    assert optimizer.named_averages()["w"].dtype == torch.float32
    before = optimizer.params[0].detach().clone()
    with optimizer.averaged():
        assert torch.equal(optimizer.params[0].detach(), optimizer.averages[0].to(dtype))
    assert torch.equal(optimizer.params[0].detach(), before)

    state = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    restored = start()
    restored.load_state(Tensors(state))
    for each in (optimizer, restored):
        step(each)
    assert torch.equal(optimizer.averages[0], restored.averages[0])


def test_gradients_are_collected_in_parts_with_the_same_result(monkeypatch):
    def step(part_bytes):
        monkeypatch.setattr(optim, "COLLECTED_BYTES", part_bytes)
        generator = torch.Generator().manual_seed(0)
        params = {name: nn.Parameter(torch.randn(8, 8, generator=generator).bfloat16()) for name in "abcde"}
        optimizer = MasterOptimizer(params, TrainingSection())
        for _ in range(2):
            for param in params.values():
                param.grad = torch.randn(8, 8, generator=generator).bfloat16()
            optimizer.collect_gradients()
        assert all(param.grad is None for param in params.values())
        optimizer.step(1e-3)
        return [master.detach().clone() for master in optimizer.masters]

    whole = step(1 << 30)
    for part_bytes in (1, 300):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(step(part_bytes), whole, strict=True))
