"""A run in this process, without Ray, exports and checkpoints: the numbers that every other way of running a job must give."""

import torch

from diffsynth_ray.data.cached import open_cached_samples, read_batches
from diffsynth_ray.data.samples import SampleRule, build_sample_index
from diffsynth_ray.models.family import get_family
from diffsynth_ray.schedule import build_schedule
from diffsynth_ray.train.cached_input import CachedInput
from diffsynth_ray.train.graph import SampleBatch
from diffsynth_ray.train.group import Group
from diffsynth_ray.train.residency import settle
from diffsynth_ray.train.split import job_of_stage, split_parts
from diffsynth_ray.train.trainer import MicroInput, Trainer, load_family, select_trained
from diffsynth_ray.train.validation_loss import ValidationLoss


def train_in_process(resolved, *, manifest_id=None, steps=2, validated=None):
    """(loss of each step from 1, float32 masters by name): combined, or with a manifest stage two of split training.

    `validated` is given the validation before the first and after the last step.
    """
    device, job, components, cached, cached_holdout = torch.device("cpu"), resolved.job, None, None, None
    kind = get_family(job.model.family)
    rule = SampleRule(kind.size_multiple, kind.clip_step)
    if manifest_id is None:
        index = build_sample_index(resolved, lambda line: None, rule=rule)
    else:
        parts = split_parts(kind, job)
        index, rows = open_cached_samples(resolved, manifest_id, kinds=parts.kinds, rule=rule, say=lambda line: None)
        cached, components = CachedInput(index, rows, device=device), parts.train
        if index.holdout is not None:
            cached_holdout = CachedInput(index.holdout, rows.holdout or rows, device=device)
        job = job_of_stage(job, components)
    family = load_family(job, device=device, components=components)
    assert components is None or tuple(family.components) == components
    select_trained(family, job)
    residency = settle(family, job, say=lambda line: None)
    schedule = build_schedule(job, num_samples=index.order.num_samples, global_batch_size=resolved.global_batch_size)
    trainer = Trainer(job, family, schedule, residency=residency)
    inputs = list(_inputs(index, cached, steps))
    trainer.start(cached.probe(index.largest_micro_batch()) if cached else inputs[0][2])
    validation = None
    if validated is not None:
        around = {"group": Group(1), "rank": 0, "world_size": 1, "enter": lambda what: None}
        validation = ValidationLoss(trainer, index.holdout, **around, cached=cached_holdout)
        validated.append(validation.load(skip_bad=job.dataset.bad_sample == "skip"))
        validated.append(validation.compute(0))
    losses = {}
    for step in range(steps):
        micro_inputs = [micro for of_step, _, micro in inputs if of_step == step]
        num_samples = next(count for of_step, count, _ in inputs if of_step == step)
        result = trainer.train_step(micro_inputs, num_samples=num_samples)
        losses[step + 1] = result.loss_sum.item() / num_samples
    if validation is not None:
        validated.append(validation.compute(steps))
    return losses, {name: tensor.clone() for name, tensor in trainer.strategy.full_masters().items()}


def _inputs(index, cached, steps):
    """(step, samples of the step, micro input) in order."""
    bounds = {"start_step": 0, "num_steps": steps, "rank": 0, "world_size": 1}
    if cached is not None and cached.rows.has("image"):
        for batch in read_batches(index, cached.rows, **bounds):
            yield batch.step, batch.num_samples, cached.from_cache(batch)
        return
    for step, num_samples, _, micro in index.micro_batches(**bounds):
        decoded = index.decode(micro, step=step)
        if cached is not None:
            yield step, num_samples, cached.from_pixels(micro, decoded.rows, torch.from_numpy(decoded.pixels))
        else:
            samples = SampleBatch(decoded.pixels, decoded.prompts, decoded.rows, decoded.extra)
            yield step, num_samples, MicroInput(samples, micro.indices)
