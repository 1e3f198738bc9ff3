"""The training state and one step of it. Knows nothing of Ray, files or the network.

b batch of a micro step, c latent channels, f frames, h/w height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffsynth_ray.config.distillation import DIRECT_DISTILL, condition_columns
from diffsynth_ray.config.schema import Job, as_list
from diffsynth_ray.config.zero import check_shared_encoders
from diffsynth_ray.errors import JobFileError, Problem
from diffsynth_ray.models.family import EncodedBatch, ModelFamily, get_family
from diffsynth_ray.models.flow_matching import draw_noise_and_timestep, timestep_id_range
from diffsynth_ray.models.lora import add_lora
from diffsynth_ray.models.weights import find_model
from diffsynth_ray.schedule import Schedule, partitioned_components, trained_components
from diffsynth_ray.train.distill import DistillGraph, draw_noise, teacher_runs
from diffsynth_ray.train.graph import AnyBatch, HalfEncodedBatch, SampleBatch, TrainGraph
from diffsynth_ray.train.optim import MasterOptimizer, lr_factor
from diffsynth_ray.train.residency import Residency
from diffsynth_ray.train.strategy import build_strategy, trained_parameters
from diffsynth_ray.train.strategy.base import Strategy


@dataclass(frozen=True)
class MicroInput:
    """What one worker computes in one micro step."""

    batch: AnyBatch
    indices: tuple[int, ...]
    """[b] positions in the global batch: with seed and step they name each sample's noise and timestep."""
    is_dummy: bool = False
    """Computed only to keep collectives in step with the other workers; counts nothing."""

    def describe(self) -> str:
        """The samples, for an error."""
        batch = self.batch
        if isinstance(batch, EncodedBatch):
            shape = "x".join(str(side) for side in batch.latents.shape[1:])
            rows = [int(row) + 1 for row in batch.sample_ids]
            return f"{len(rows)} x latents {shape} from the cache, metadata rows {rows}"
        rows = [row + 1 for row in batch.rows]
        if isinstance(batch, HalfEncodedBatch):
            return f"{len(rows)} samples, half of each from the cache, metadata rows {rows}"
        height, width, num_frames = batch.size
        size = f"{height}x{width}" + (f", {num_frames} frames" if num_frames > 1 else "")
        return f"{len(rows)} x {size}, metadata rows {rows}"


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. Tensors are on the device and not synchronised."""

    loss_sum: Tensor
    """Sum of this worker's real samples' losses."""
    grad_norm: Tensor
    lr: float
    num_tokens: int
    """Latent tokens (2x2 patches) of this worker's real samples."""


def fastest_attention() -> AbstractContextManager[None]:
    """cuDNN's attention first where there is one (on an H100 half as fast again as flash attention), then torch's own order."""
    backends = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return sdpa_kernel(backends, set_priority=True) if torch.cuda.is_available() else nullcontext()


def load_family(job: Job, *, device: torch.device, components: Sequence[str] | None = None) -> ModelFamily:
    """The job's model for `device`: from its files, or at the family's tiny size with random weights.

    Its weights are still on the meta device; `residency.settle` reads them to where they belong. `components` None = all;
    split training loads in each stage what that stage computes with.
    """
    family = _build_family(job, components)
    family.device = device
    return family


def _build_family(job: Job, components: Sequence[str] | None) -> ModelFamily:
    dtype = torch.bfloat16 if job.training.precision == "bf16" else torch.float32
    if job.model.tiny:
        assert job.model.family is not None  # resolve has checked it
        return get_family(job.model.family).build_tiny(
            job.seed,
            components=components,
            dtype=dtype,
            device="meta",
            extra_inputs=condition_columns(job),
            options=job.model.options,
        )
    name, files, tokenizers = find_model(job.model)
    return get_family(name).load(
        files,
        components=components,
        dtype=dtype,
        device="meta",
        tokenizer_paths=tokenizers,
        options=job.model.options,
    )


def check_components(family: ModelFamily | type[ModelFamily], job: Job) -> None:
    """Raise JobFileError for trained components that the family does not have or ZeRO-3 cannot share, and a LoRA without
    targets."""
    known = family.component_names
    problems = [
        Problem(key, f"the family {family.name} has no component {name!r}; it has {', '.join(known)}")
        for key, names in (
            ("training.trainable_models", job.training.trainable_models),
            ("lora.base_model", [job.lora.base_model] if job.lora.base_model else []),
            ("lora.preset_model", as_list(job.lora.preset_model)),
        )
        for name in names
        if name not in known
    ]
    base_model, targets = job.lora.base_model, job.lora.target_modules
    if base_model in known and targets is None and base_model not in family.default_lora_targets:
        message = f"the family {family.name} has no recipe for {base_model!r}; name the modules"
        problems.append(Problem("lora.target_modules", message))
    problems += check_shared_encoders(
        job,
        partitioned_components(job),
        predict_components=family.predict_components,
        clip_components=family.image_components if family.clip_step is not None else (),
    )
    if problems:
        raise JobFileError(f"job {job.name}", problems)


def select_trained(family: ModelFamily, job: Job) -> None:
    """Freeze everything, then make the job's components trainable: in full, or by a LoRA."""
    check_components(family, job)
    for module in family.components.values():
        module.requires_grad_(False)
        module.eval()
    for name in job.training.trainable_models:
        family.component(name).requires_grad_(True)
    if job.lora.base_model is not None:
        _add_job_lora(family, job)


def _add_job_lora(family: ModelFamily, job: Job) -> None:
    component = job.lora.base_model
    assert component is not None
    add_lora(
        family.component(component),
        target_modules=job.lora.target_modules,
        default_targets=family.default_lora_targets.get(component, ()),
        rank=job.lora.rank,
        alpha=job.lora.alpha,
        seed=job.seed,
        dtype=family.dtype,
        names=family.layer_names(component),
        device=family.device,
    )


def _silent(line: str) -> None:
    """Where nobody listens."""


class Trainer:
    """All state of a run on one worker."""

    def __init__(self, job: Job, family: ModelFamily, schedule: Schedule, *, residency: Residency | None = None) -> None:
        self.job = job
        self.family = family
        self.schedule = schedule
        self.residency = residency or Residency()
        build_graph = DistillGraph if job.task == DIRECT_DISTILL else TrainGraph
        self.graph = build_graph(family, trained=trained_components(job), extra_inputs=condition_columns(job))
        self.id_range = timestep_id_range(job.training.min_timestep_boundary, job.training.max_timestep_boundary)
        has_own = job.distributed.strategy == "deepspeed" or job.offload.optimize_on_cpu
        self.optimizer = None if has_own else MasterOptimizer(self.trained, job.training)
        """None where the strategy has its own, over the parts that a worker updates."""
        self.strategy: Strategy | None = None
        self.step = 0
        """Optimizer steps done."""

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by "component.parameter"; a strategy may hold them in parts."""
        return trained_parameters(self.graph)

    def start(self, probe: MicroInput | None, *, say: Callable[[str], object] = _silent) -> None:
        """Build the strategy; `probe` is run once forward and backward and thrown away.

        The probe finds parameters without a gradient ("auto") and an out-of-memory before the first step.
        """
        inputs = None if probe is None else (probe.batch, *self._draw(probe, step=0))
        self.residency.begin()
        with fastest_attention():
            self.strategy = build_strategy(
                self.job,
                self.family,
                self.graph,
                optimizer=self.optimizer,
                residency=self.residency,
                probe=inputs,
                say=say,
            )

    def _draw(self, micro: MicroInput, *, step: int) -> tuple[Tensor, Tensor]:
        """Noise [b, c, (f,) h, w] and timestep ids (in direct distillation: numbers of steps) [b] int64 of a micro batch."""
        shape = self.graph.latents_shape(micro.batch)
        if isinstance(self.graph, DistillGraph):
            assert isinstance(micro.batch, SampleBatch)  # refused with split training
            runs = teacher_runs(micro.batch)
            noise = draw_noise(runs, shape, family=self.family)
            if self.graph.has_reference:
                noise = noise.roll(1, dims=2)  # DiffSynth-Studio's pipeline gives the reference the last frame's
            return noise, torch.tensor([run.num_inference_steps for run in runs])
        draws = [
            draw_noise_and_timestep(self.job.seed, step, index, shape=shape, id_range=self.id_range) for index in micro.indices
        ]
        noise = torch.stack([noise for noise, _ in draws])
        if self.family.device.type == "cuda":
            noise = noise.pin_memory().to(self.family.device, non_blocking=True)
        return noise, torch.tensor([timestep_id for _, timestep_id in draws])

    @torch.no_grad()
    def encode(self, batch: AnyBatch) -> EncodedBatch:
        """Samples, decoded or not, -> encoded ones, outside of a step and without gradients."""
        self.residency.begin("encode")
        with fastest_attention():
            return self.graph.encode(batch)

    @torch.no_grad()
    def evaluate(self, batch: AnyBatch, noise: Tensor, timestep_ids: Tensor) -> Tensor:
        """Weighted losses [b] at this noise and these timesteps, without gradients; changes nothing."""
        assert self.strategy is not None, "start() comes first"
        self.residency.begin("evaluate")
        with fastest_attention():
            return self.strategy.evaluate(batch, noise, timestep_ids)

    def lr(self, step: int) -> float:
        """Learning rate of a step (from 0)."""
        training = self.job.training
        factor = lr_factor(
            training.lr_scheduler, step=step, warmup_steps=training.warmup_steps, num_steps=self.schedule.num_steps
        )
        return training.learning_rate * factor

    def train_step(self, micro_inputs: Sequence[MicroInput], *, num_samples: int) -> StepResult:
        """One optimizer step from this worker's micro batches.

        `num_samples` counts the real samples of all workers; the step's loss is the mean over them, however they are dealt.
        """
        with fastest_attention():
            return self._train_step(micro_inputs, num_samples=num_samples)

    def _train_step(self, micro_inputs: Sequence[MicroInput], *, num_samples: int) -> StepResult:
        assert self.strategy is not None, "start() comes first"
        loss_sum, num_tokens = torch.zeros((), device=self.family.device), 0
        for number, micro in enumerate(micro_inputs, start=1):
            last = number == len(micro_inputs)
            noise, timestep_ids = self._draw(micro, step=self.step)
            self.residency.begin()
            weight = 0.0 if micro.is_dummy else 1.0
            losses = self.strategy.micro_step(
                micro.batch, noise, timestep_ids, weight=weight, num_samples=num_samples, last=last
            )
            loss_sum += losses.sum() * weight
            num_tokens += 0 if micro.is_dummy else noise.numel() // noise.shape[1] // 4
        lr = self.lr(self.step)
        grad_norm = self.strategy.step(lr)
        self.step += 1
        return StepResult(loss_sum=loss_sum, grad_norm=grad_norm, lr=lr, num_tokens=num_tokens)
