"""Direct distillation against a straightforward loop."""

import dataclasses

import pytest
import torch
from tiny_trainer import build_job, build_trainer, micro, train, weights

from diffsynth_ray.config.distillation import check_distillation
from diffsynth_ray.data.metadata import Metadata
from diffsynth_ray.data.teacher import TeacherRun, check_teacher_runs, longest_run, read_teacher_run
from diffsynth_ray.errors import DataError
from diffsynth_ray.models.family import get_family
from diffsynth_ray.train.distill import draw_noise

COLUMNS = ["seed", "rand_device", "num_inference_steps", "cfg_scale"]


def distill_job(**sections):
    model = {"extra_inputs": COLUMNS, **sections.pop("model", {})}
    return build_job(task="direct_distill", model=model, **sections)


def drawn(indices, num_steps, *, is_dummy=False):
    """Samples as metadata in csv give them: cells are text."""
    cells = {
        "seed": tuple(str(7 + index) for index in indices),
        "rand_device": ("cpu",) * len(indices),
        "num_inference_steps": tuple(str(count) for count in num_steps),
        "cfg_scale": ("4",) * len(indices),
    }
    one = micro(indices, is_dummy=is_dummy)
    return dataclasses.replace(one, batch=dataclasses.replace(one.batch, extra=cells))


def losses_of(trainer, samples):
    noise, counts = trainer._draw(samples, step=0)
    return trainer.graph(samples.batch, noise, counts)


def reference_loss(trainer, index, num_steps):
    """The schedule of Qwen-Image written out, one sample at a time."""
    family = trainer.family
    encoded = trainer.encode(micro([index]).batch)
    even = torch.linspace(1, 0, num_steps + 1)[:-1]
    sigmas = torch.exp(torch.tensor(0.8)) / (torch.exp(torch.tensor(0.8)) + 1 / even - 1)
    if num_steps > 1:
        sigmas = 1 - (1 - sigmas) * (1 - 0.02) / (1 - sigmas[-1])
    latents = torch.randn(encoded.latents.shape, generator=torch.Generator().manual_seed(7 + index))
    for position in range(num_steps):
        following = sigmas[position + 1] if position + 1 < num_steps else torch.tensor(0.0)
        velocity = family.predict(encoded, latents, 1000 * sigmas[position : position + 1])
        latents = latents + velocity * (following - sigmas[position])
    return torch.nn.functional.mse_loss(latents, encoded.latents)


def test_the_loss_is_that_of_the_drawn_picture():
    trainer = build_trainer(distill_job(), probe=False)
    found = losses_of(trainer, drawn([0, 1], [4, 4]))
    expected = [reference_loss(trainer, index, 4).item() for index in (0, 1)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_samples_of_a_batch_may_differ_in_their_steps():
    trainer = build_trainer(distill_job(), probe=False)
    found = losses_of(trainer, drawn([0, 1], [1, 3]))
    assert found.tolist() == pytest.approx(
        [reference_loss(trainer, 0, 1).item(), reference_loss(trainer, 1, 3).item()], rel=1e-5
    )


def test_gradients_are_those_of_all_steps():
    trainer = build_trainer(distill_job(), probe=False)
    trained = {name: param for name, param in trainer.trained.items() if ".lora_B." in name}
    found = torch.autograd.grad(losses_of(trainer, drawn([0], [3])).sum(), trained.values(), allow_unused=True)
    expected = torch.autograd.grad(reference_loss(trainer, 0, 3), trained.values(), allow_unused=True)
    assert sum(gradient is not None and bool(gradient.any()) for gradient in found) > 10
    for name, ours, theirs in zip(trained, found, expected, strict=True):
        assert (ours is None) == (theirs is None), name
        assert ours is None or torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6), name


def started(job):
    trainer = build_trainer(job, probe=False)
    trainer.start(drawn([0], [3]))
    return trainer


def test_it_learns_and_does_not_depend_on_where_weights_live():
    plain, moved = started(distill_job()), started(distill_job(offload={"cpu_offload": True}))
    samples = [drawn([0, 1], [3, 3]), drawn([2], [2])]
    losses = train(plain, samples, steps=6)
    assert losses[-1] < losses[0]
    assert train(moved, samples, steps=6) == losses
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, weights(moved)[name]), name


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"seed": "", "num_inference_steps": 4}, "seed: got '', wanted a whole number"),
        ({"seed": 1, "num_inference_steps": "4.5"}, "num_inference_steps: got '4.5'"),
        ({"seed": 1, "num_inference_steps": 0}, "got 0, allowed are 1 to 1000"),
        ({"seed": -1, "num_inference_steps": 4}, "seed: got -1"),
        ({"seed": 1, "num_inference_steps": "nan"}, "got 'nan'"),
        ({"seed": 1, "num_inference_steps": 4, "rand_device": "tpu"}, "rand_device: got 'tpu', allowed are cpu, cuda"),
    ],
)
def test_cells_that_say_nothing_are_refused(cells, message):
    with pytest.raises(DataError, match=message):
        read_teacher_run(cells)


def test_cells_of_text_and_of_numbers():
    assert read_teacher_run({"seed": "9007199254740993", "num_inference_steps": 4.0}) == TeacherRun(9007199254740993, 4)


def test_every_wrong_row_is_named():
    rows = [
        {"seed": "1", "num_inference_steps": "4"},
        {"seed": "x", "num_inference_steps": "4"},
        {"seed": "1", "num_inference_steps": ""},
    ]
    metadata = Metadata(rows, ("seed", "num_inference_steps"), (), "", "")
    with pytest.raises(DataError, match=r"(?s)row 2, seed.*row 3, num_inference_steps"):
        check_teacher_runs(metadata)
    with pytest.raises(DataError, match="no column seed"):
        check_teacher_runs(Metadata([{"num_inference_steps": 4}], ("num_inference_steps",), (), "", ""))
    assert longest_run(Metadata([rows[0], rows[0] | {"num_inference_steps": "8"}], (), (), "", "")).num_inference_steps == 8


def test_noise_is_drawn_as_the_pipeline_of_the_family_draws_it():
    """Some draw in bf16, which gives other numbers than float32 rounded."""
    shape = (16, 8, 8)
    qwen, flux = (get_family(name).build_tiny(0, components=["dit"], dtype=torch.bfloat16) for name in ("qwen_image", "flux"))
    noise = {family.name: draw_noise([TeacherRun(5, 4)], shape, family=family) for family in (qwen, flux)}
    for name, dtype in (("qwen_image", torch.bfloat16), ("flux", torch.float32)):
        expected = torch.randn((1, *shape), generator=torch.Generator().manual_seed(5), dtype=dtype).bfloat16()
        assert torch.equal(noise[name], expected)
    with pytest.raises(DataError, match="this worker has no GPU"):
        draw_noise([TeacherRun(1, 4, "cuda")], shape, family=qwen)


def test_what_does_not_go_together_is_refused():
    assert check_distillation(distill_job()) == []
    wrong = distill_job(
        split={"enabled": True},
        validation={"holdout": 0.1},
        training={"max_timestep_boundary": 0.5},
        model={"extra_inputs": []},
    )
    keys = {problem.key for problem in check_distillation(wrong)}
    assert keys == {"split.enabled", "validation.holdout", "training.max_timestep_boundary", "model.extra_inputs"}
    assert check_distillation(build_job()) == []
