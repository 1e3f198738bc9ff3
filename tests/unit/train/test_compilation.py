"""How often blocks are compiled. The compiler here runs what it has traced: what counts is how often it is asked."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from diffsynth_ray.config.schema import Job
from diffsynth_ray.memory import checkpointing
from diffsynth_ray.memory.compilation import CompileTime
from diffsynth_ray.models.family import BatchShape, EncodedBatch, get_family
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train.residency import settle
from diffsynth_ray.train.trainer import MicroInput, Trainer, select_trained

torch.set_num_threads(1)
VARIANTS = {"qwen_image": 3, "wan": 3, "flux": 7, "flux2": 5, "z_image": 5}
"""Of a kind of blocks one without gradients, one with, and one where the first block's inputs have none. Those of FLUX's later
single blocks lie in memory otherwise than the first one's: two more."""
SIZES = [(80, 96, 12), (64, 64, 12), (64, 64, 21), (96, 48, 33), (112, 80, 9)]


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(checkpointing.torch, "compile", partial(torch.compile, backend="eager"))


def build_trainer(name, *, sizes_vary=True, num_samples=1, compile=True, **sections):
    job = Job.model_validate(
        {
            "name": "test",
            "training": {"precision": "fp32", "learning_rate": 1e-3, "compile": compile},
            "lora": {"base_model": "dit", "rank": 4},
            **sections,
        }
    )
    family = get_family(name).build_tiny(0, components=["dit"], dtype=torch.float32, device="meta")
    family.device = torch.device("cpu")
    select_trained(family, job)
    residency = settle(family, job, sizes_vary=sizes_vary, say=print)
    trainer = Trainer(job, family, build_schedule(job, num_samples=8, global_batch_size=1), residency=residency)
    trainer.start(micro(family, *SIZES[0], num_samples=num_samples))
    return trainer


def micro(family, height, width, tokens, *, num_samples=1):
    blank = family.blank_batch(BatchShape(num_samples, height, width, 5 if family.clip_step else 1, text_tokens=tokens))
    generator = torch.Generator().manual_seed(tokens)

    def noise(value):
        return torch.randn(value.shape, generator=generator) if value.is_floating_point() else value

    conditions = {name: noise(value) for name, value in blank.conditions.items()}
    return MicroInput(EncodedBatch(noise(blank.latents), conditions), tuple(range(num_samples)))


def train(trainer, sizes=SIZES, *, num_samples=1):
    inputs = [micro(trainer.family, *size, num_samples=num_samples) for size in sizes]
    return [trainer.train_step([each], num_samples=num_samples).loss_sum.item() for each in inputs]


def variants():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", VARIANTS)
def test_blocks_are_compiled_once_for_samples_of_all_sizes(name):
    before = variants()
    trainer = build_trainer(name)
    compiled = variants() - before
    assert compiled == VARIANTS[name]
    losses = train(trainer)
    assert variants() - before == compiled
    assert losses == pytest.approx(train(build_trainer(name, compile=False)), rel=1e-5)


def test_so_are_several_samples_at_a_time_and_blocks_that_are_not_recomputed():
    for keys in ({}, {"gradient": {"checkpointing": False}}):
        trainer = build_trainer("qwen_image", num_samples=2, **keys)
        before = variants()
        train(trainer, num_samples=2)
        train(trainer, num_samples=3)
        assert variants() == before


def test_sizes_that_are_said_not_to_vary_are_fixed():
    trainer = build_trainer("qwen_image", sizes_vary=False)
    before = variants()
    train(trainer, SIZES[1:2])
    assert variants() == before + 3


def test_the_time_of_compiling_is_known_and_its_begin_told():
    said = []
    with CompileTime(said.append) as compiling:
        trainer = build_trainer("qwen_image", sizes_vary=False)
        assert compiling.take_s() > 0
        assert [line.startswith("compiling blocks") for line in said] == [True]
        assert compiling.take_s() == 0
        train(trainer, SIZES[1:2])
        assert compiling.take_s() > 0
        assert len(said) == 2
    train(trainer, SIZES[2:3])
    assert compiling.take_s() == 0, "it looks at what is compiled inside only"


def test_families_say_whether_their_texts_have_lengths_of_their_own():
    for name in VARIANTS:
        family = get_family(name).build_tiny(0, components=["dit"], device="meta")
        one, other = (family.blank_batch(BatchShape(1, 64, 64, 1, text_tokens=tokens)).conditions for tokens in (7, 8))
        varies = family.padded_text_tokens is None and any(one[key].shape != other[key].shape for key in one)
        assert family.text_tokens_vary == varies, name
