"""The job file: one frozen class a section, every key with its bounds, default, unit and meaning.

The reference of the job file (jobs/REFERENCE.md) is generated from here. Two marks travel with a key:

* ``identity``: it changes what a step computes, so it is part of a run's name (see `resolve.identity`);
* ``path``: it names a file or folder, relative to the directory the command is run in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
"""What a job can be called: run names, submission ids and folders are made of it."""


MOST_SAMPLES = 2**62
"""Of an epoch, and so of a step: positions are int64, and what shuffles them takes up to four times as many."""
MOST_A_SIDE = 16384
"""Pixels, as many as Wan's DiT has positions for; what is asked for can then be reckoned with in 64 bits."""


def _key(default: Any = None, *, identity: bool = False, path: bool = False, **rules: Any) -> Any:
    extra: dict[str, Any] = {"identity": identity, "path": path}
    if isinstance(default, (list, dict)):
        return Field(default_factory=lambda: default.copy(), json_schema_extra=extra, **rules)
    return Field(default, json_schema_extra=extra, **rules)


def _whole_numbers(value: object) -> Iterator[int]:
    """All in a value of a key, however deep in arrays and tables."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _whole_numbers(inner)


class Section(BaseModel):
    """Frozen; unknown keys are errors; attribute docstrings are the keys' descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, validate_default=False
    )

    @field_validator("*")
    @classmethod
    def _within_64_bits(cls, value: Any) -> Any:
        """Numbers end up in tensors and arrays, which have no larger ones."""
        if any(abs(number) >= 2**63 for number in _whole_numbers(value)):
            raise PydanticCustomError("too_large", "whole numbers are below 2**63 = 9223372036854775808")
        return value


class DatasetSection(Section):
    """What is trained on."""

    base_path: str | None = _key(path=True)
    """Folder (local, file:// or s3://) that the paths in the metadata are relative to. Required."""
    metadata_path: str | None = _key(identity=True, path=True)
    """csv, json, jsonl or parquet file with one row a sample. Unset: the folder's media with .txt captions of the same name."""
    repeat: int = _key(1, identity=True, ge=1)
    """How often each row appears in one epoch. Costs no memory."""
    num_workers: int = _key(0, ge=0)
    """Upper bound of Ray Data CPU tasks that decode for one training worker; 0 = automatic."""
    data_file_keys: list[str] = _key(["image", "video"], identity=True)
    """Columns that hold media files. Columns absent from the metadata are skipped, but one must be there."""
    height: int | None = _key(identity=True, ge=16, le=MOST_A_SIDE)
    """Fixed height in pixels (needs width); unset = dynamic resolution."""
    width: int | None = _key(identity=True, ge=16, le=MOST_A_SIDE)
    """Fixed width in pixels (needs height); unset = dynamic resolution."""
    max_pixels: int = _key(1048576, identity=True, ge=256, le=MOST_A_SIDE**2)
    """Dynamic resolution: larger images are scaled down to this area; nothing is ever enlarged."""
    num_frames: int = _key(81, identity=True, ge=1, le=4096)
    """Frames of a video sample; Wan takes 4n + 1. A shorter clip gives the largest 4n + 1 that it has."""
    frame_rate: float | None = _key(identity=True, gt=0)
    """Frames a second that a video is sampled at; unset = the file's own."""
    batch_size: int = _key(1, identity=True, ge=1, le=1024)
    """Samples a worker processes in one micro step."""
    global_batch_size: int | None = _key(identity=True, ge=1)
    """Samples of one optimizer step. Default: batch_size x most workers x gradient.accumulation_steps."""
    bad_sample: Literal["error", "skip"] = _key("error")
    """What a file that cannot be decoded does: end the run with its name, or be replaced and listed in bad_samples.jsonl."""
    bad_sample_limit: float = _key(0.01, ge=0, le=1)
    """Share of the rows that may be bad (with bad_sample = "skip") before the run fails; 1 = all but one."""


class ModelSection(Section):
    """Which weights are trained."""

    family: str | None = _key(identity=True)
    """Model family ("qwen_image"). Inferred from the files where possible; required with tiny."""
    paths: list[str | list[str]] = _key([], identity=True, path=True)
    """Local weight files, one entry a component; a nested list holds the shards of one component."""
    id_with_origin_paths: list[str] = _key([], identity=True)
    """Files of a model hub, one entry a component, as in "Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors":
    owner/name, a colon, a path with * for all shards. Downloaded once a node where they are not there yet; beside `paths`."""
    tokenizer_path: str | None = _key(identity=True, path=True)
    """Folder of the tokenizer, on disk or, as in "black-forest-labs/FLUX.2-klein-4B:tokenizer/", of a hub, as the next three
    may be. Default: `tokenizer` beside the weights' folders, else the family's own, downloaded."""
    tokenizer_1_path: str | None = _key(identity=True, path=True)
    """Folder of the first of two tokenizers (FLUX.1: CLIP)."""
    tokenizer_2_path: str | None = _key(identity=True, path=True)
    """Folder of the second of two tokenizers (FLUX.1: T5)."""
    processor_path: str | None = _key(identity=True, path=True)
    """Folder of the image processor of edit models (Qwen-Image-Edit)."""
    extra_inputs: list[str] = _key([], identity=True)
    """Further columns that the model is conditioned on: "edit_image" (Qwen-Image-Edit, FLUX.2), "kontext_images" (FLUX.1
    Kontext), "input_image" and "end_image" (Wan image to video; without such a column the video's own first and last frame),
    "vace_video", "vace_video_mask" and "vace_reference_image" (Wan VACE: clips as long and large as the video, a picture)."""
    fp8_models: list[str] = _key([], identity=True)
    """Frozen components kept in scaled FP8: by name, or by their entry in paths or id_with_origin_paths, exactly as there."""
    source: Literal["modelscope", "huggingface"] | None = _key()
    """Where ids are downloaded from; default DIFFSYNTH_DOWNLOAD_SOURCE, else "modelscope"."""
    base_path: str | None = _key(path=True)
    """Where downloaded models are kept, as {base_path}/{owner}/{name}/...; default DIFFSYNTH_MODEL_BASE_PATH, else ./models."""
    skip_download: bool | None = _key()
    """Use only what is there, and fail where something is missing; default DIFFSYNTH_SKIP_DOWNLOAD."""
    options: dict[str, Any] = _key({}, identity=True)
    """Settings of one family: `embedded_guidance` (flux, flux2), `zero_cond_t`, `edit_prompt`, `trained_vae` (qwen_image)."""
    tiny: bool = _key(False, identity=True)
    """Random weights of the family's tiny size, without any file: for trying things out."""


class TrainingSection(Section):
    """How the weights are trained."""

    learning_rate: float = _key(1e-4, identity=True, gt=0)
    """Peak learning rate."""
    num_epochs: int = _key(1, ge=1)
    """Passes over rows x repeat."""
    max_steps: int | None = _key(ge=1)
    """Optimizer steps; wins over num_epochs."""
    trainable_models: list[Annotated[str, Field(min_length=1)]] = _key([], identity=True)
    """Components trained in full; any number, also beside a LoRA on another component."""
    find_unused_parameters: bool | Literal["auto"] = _key("auto")
    """Whether DDP looks for parameters without a gradient each step; "auto" looks once, before step 0."""
    weight_decay: float = _key(0.01, identity=True, ge=0)
    """Decoupled weight decay of AdamW."""
    optimizer: str = _key("torch.optim.AdamW", identity=True)
    """Dotted name of an optimizer class (`--customized_optimizer`). Of a schedule-free one (with train() and eval()) the
    averaged weights are validated and exported."""
    optimizer_args: dict[str, Any] = _key({}, identity=True)
    """Further arguments of the optimizer class."""
    lr_scheduler: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"] = _key(
        "constant", identity=True
    )
    """Course of the learning rate after the warm-up."""
    warmup_steps: int = _key(0, identity=True, ge=0)
    """Optimizer steps over which the learning rate rises from 0."""
    max_grad_norm: float = _key(1.0, identity=True, ge=0)
    """Gradients are scaled down to this norm; 0 = never, as in DiffSynth-Studio."""
    precision: Literal["bf16", "fp32"] = _key("bf16", identity=True)
    """Number format of the computation."""
    master_weights: bool = _key(True, identity=True)
    """Under bf16, keep float32 copies of the trained weights, so that small updates are not rounded away."""
    ema_decay: float | None = _key(identity=True, gt=0, lt=1)
    """Decay of a moving average of the trained weights, as 0.999: kept in float32, part of the checkpoints, validated, and
    exported beside the weights themselves as NAME.ema.safetensors. Unset = none."""
    resume_from_checkpoint: str | list[str] | None = _key(identity=True, path=True)
    """Exported weights, one file or several, that the components trained in full start from: no resume."""
    min_timestep_boundary: float = _key(0.0, identity=True, ge=0, le=1)
    """First trained timestep, as a fraction of the timestep ids (0 = most noise)."""
    max_timestep_boundary: float = _key(1.0, identity=True, ge=0, le=1)
    """Last trained timestep, as a fraction of the timestep ids (1 = least noise)."""
    compile: bool | Literal["auto"] = _key("auto")
    """Compile the repeated blocks: once for samples of all sizes where these differ. "auto" = on GPUs."""


class OutputSection(Section):
    """What is written where."""

    path: str = _key("./outputs/{name}", path=True)
    """Folder of the run; {name} stands for the job's name. It belongs to one run."""
    remove_prefix_in_ckpt: str | None = _key()
    """Prefix taken off the exported key names. Default: the component's own ("pipe.dit.")."""
    save_steps: int | None = _key(ge=1)
    """Export weights every so many optimizer steps and at the end; unset = after every epoch."""
    formats: list[Literal["diffsynth", "diffusers", "comfyui", "kohya"]] = _key(["diffsynth"])
    """Key names of the exports: diffsynth's always, those of other formats (LoRA only) in {path}/{format}/."""
    checkpoint_path: str | None = _key(path=True)
    """Folder or URL (s3://, gs://, hdfs://, any file system of pyarrow) of the checkpoints; default {path}/checkpoints."""
    checkpoint_minutes: float | None = _key(15.0, gt=0)
    """Minutes between two checkpoints (resume state)."""
    checkpoint_steps: int | None = _key(ge=1)
    """Optimizer steps between two checkpoints, besides checkpoint_minutes."""
    keep_checkpoints: int = _key(2, ge=1)
    """Checkpoints kept; exported weights are never deleted."""


class LoraSection(Section):
    """A low-rank adapter on one component."""

    base_model: str | None = _key(identity=True, min_length=1)
    """Component that gets the LoRA ("dit"); unset = no LoRA."""
    target_modules: list[str] | None = _key(identity=True)
    """Module names; unset = the family's recipe, [] = every large Linear of the repeated blocks."""
    rank: int = _key(32, identity=True, ge=1, le=65536)
    """Rank r of A [r, in] and B [out, r]."""
    alpha: float | None = _key(identity=True, gt=0)
    """Scale alpha / rank; default alpha = rank."""
    checkpoint: str | None = _key(identity=True, path=True)
    """LoRA weights to start from."""
    preset_path: str | list[str] | None = _key(identity=True, path=True)
    """LoRA (or several) merged into the base before training (differential LoRA)."""
    preset_model: str | list[str] | None = _key(identity=True)
    """Component that the preset LoRA is merged into, or one for each; default: the one that is trained first."""


class GradientSection(Section):
    """Gradients: recomputation and accumulation."""

    checkpointing: bool | Literal["auto"] = _key(True)
    """Recompute the blocks' activations in the backward pass: much less memory, about a third more time. "auto": as few blocks
    as the device's memory demands, found out before the first step; on a CPU none."""
    checkpointing_offload: bool = _key(False)
    """Keep the blocks' inputs in host memory."""
    accumulation_steps: int = _key(1, ge=1)
    """Micro steps of one optimizer step, where global_batch_size is unset."""


class OffloadSection(Section):
    """Layerwise CPU offload."""

    cpu_offload: bool = _key(False)
    """Keep every component's weights in host memory and load block by block."""
    optimize_on_cpu: bool = _key(False)
    """Trained weights, float32 masters, optimizer state and the update in host memory as well; needs cpu_offload."""
    param_size_threshold: float | None = _key(gt=0, le=1_000_000_000)
    """Largest unit that is loaded at once, in MB."""
    vram_budget_gib: float | None = _key(gt=0, le=1_000_000)
    """Device memory to use for weights that stay, in GiB."""


class DistributedSection(Section):
    """Workers and strategy."""

    num_workers: int | Annotated[list[int], Field(min_length=2, max_length=2)] | None = _key()
    """Training workers; unset = all GPUs, else 1; [min, max] = elastic: what there is room for, whenever nodes go or come."""
    strategy: Literal["ddp", "deepspeed"] = _key("ddp")
    """Every worker has everything (ddp), or DeepSpeed shares optimizer state, gradients and parameters out."""
    zero_stage: Literal[1, 2, 3] = _key(2)
    """What DeepSpeed shares out: 1 = optimizer state, 2 = and gradients, 3 = and parameters. There is no 0: that is ddp."""
    offload_optimizer_device: Literal["none", "cpu"] = _key("none")
    """Where DeepSpeed keeps masters and optimizer state, and updates them; "cpu" = in host memory."""
    offload_param_device: Literal["none", "cpu"] = _key("none")
    """Where DeepSpeed keeps parameters that are not in use (zero_stage = 3); "cpu" = in host memory."""
    deepspeed_config: str | None = _key(path=True)
    """DeepSpeed configuration (JSON) merged in; what contradicts a key of the job is an error."""
    resources_per_worker: dict[str, float] | None = _key()
    """Ray resources of a worker; default {GPU = 1, CPU = 1} with GPUs, else {CPU = 0.5}."""
    max_failures: int = _key(3, ge=0)
    """Restarts after a lost worker before the run fails."""
    priority: int = _key(0)
    """Order among runs that wait for a place on the cluster: the largest goes first, then who has waited longest."""
    timeout_s: float = _key(1800.0, gt=0, le=100_000_000)
    """Seconds without progress after which a worker counts as hung: it is named, ended and replaced."""


class SplitSection(Section):
    """Two-stage split training: stage one encodes, stage two trains without the encoders."""

    enabled: bool = _key(False)
    """Encode every text and image once, into the cache, then train from there with only what is trained through loaded."""
    cache_path: str = _key("./cache/dsray", path=True)
    """Folder or URI (s3://...) of encoded samples, shared by jobs. With `enabled`, [dataset] base_path may be left out where it
    holds one data set."""
    num_workers: int | None = _key(ge=1)
    """Encoding workers of stage one; unset = as many as training workers with GPUs, else 1."""
    resources_per_worker: dict[str, float] | None = _key()
    """Ray resources of an encoding worker, also parts of a GPU; default {GPU = 1, CPU = 1} with GPUs, else {CPU = 0.5}."""


class LoggingSection(Section):
    """Where the figures go."""

    csv: bool = _key(True)
    """Write loss.csv (step,key,value)."""
    tensorboard: bool = _key(True)
    """Write {path}/tensorboard."""
    wandb_project: str | None = _key()
    """Weights & Biases project; needs the package wandb, and WANDB_API_KEY on the nodes."""
    swanlab_project: str | None = _key()
    """SwanLab project; needs the package swanlab, and SWANLAB_API_KEY on the nodes."""
    mlflow_tracking_uri: str | None = _key()
    """Address of an MLflow server; needs the package mlflow-skinny."""
    every_steps: int = _key(1, ge=1)
    """Optimizer steps between two logged figures; each costs one synchronisation with the host."""


class ValidationSection(Section):
    """Samples and validation loss during training."""

    prompts: list[str] = _key([])
    """Prompts of the sample pictures: made before the first step, with every validation and at the end; {path}/samples, and
    where [logging] sends the figures. Where the cluster has room for one more process with a worker's resources, that one makes
    them while the training goes on, one step's at a time, from the trained weights in a temporary file. The workers make them
    between steps where it has not, where those weights have more than 2 GiB, with offload.cpu_offload, and at the end."""
    inputs: list[str] = _key([], path=True)
    """Input pictures of the samples, one for each prompt or one for all: a picture to edit, or the first frame of a clip."""
    every_steps: int | None = _key(ge=1)
    """Optimizer steps between two validations; unset = with every export. One is before the first step, one at the end."""
    num_inference_steps: int = _key(30, ge=1, le=10000)
    """Denoising steps of a sample."""
    guidance_scale: float = _key(4.0, ge=0)
    """Classifier-free guidance of a sample, 1 or less = none; for FLUX.1-dev the guidance that it is told."""
    size: Annotated[list[Annotated[int, Field(ge=1, le=MOST_A_SIDE)]], Field(min_length=2, max_length=2)] | None = _key()
    """Height and width of a sample in pixels; unset = the dataset's fixed size, else a square of dataset.max_pixels. A clip has
    dataset.num_frames frames."""
    seed: int = _key(0, ge=0, lt=2**63)
    """Seed of the noise of samples and of the validation loss: the same in two runs makes them comparable."""
    holdout: float | str | None = _key(path=True)
    """What the validation loss is computed on: a share of the files, as 0.1 (their rows are not trained on; part of the run's
    name), or a metadata file of its own (its paths are relative to dataset.base_path)."""
    early_stopping: int | None = _key(ge=1)
    """Validations in a row that do not lower the loss after which the training ends, as if it had done all its steps."""
    keep_best: bool = _key(False)
    """Export the weights with the lowest validation loss as best.safetensors."""


class Job(Section):
    """A job file as the user gave it, checked."""

    name: str = _key(pattern=NAME)
    """Name of the job: letters, digits, '_', '.', '-'. Default: the file's name."""
    task: Literal["sft", "direct_distill"] = _key("sft", identity=True)
    """Training task: "sft" = supervised finetuning; "direct_distill" = the student draws each picture in its row's few
    `num_inference_steps` from its `seed`'s noise, and is trained through all steps (name these columns in
    model.extra_inputs)."""
    seed: int = _key(0, identity=True, ge=0, lt=2**63)
    """Seed of order, noise, timesteps and new weights."""
    dataset: DatasetSection = Field(default_factory=DatasetSection)
    model: ModelSection = Field(default_factory=ModelSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    output: OutputSection = Field(default_factory=OutputSection)
    lora: LoraSection = Field(default_factory=LoraSection)
    gradient: GradientSection = Field(default_factory=GradientSection)
    offload: OffloadSection = Field(default_factory=OffloadSection)
    distributed: DistributedSection = Field(default_factory=DistributedSection)
    split: SplitSection = Field(default_factory=SplitSection)
    logging: LoggingSection = Field(default_factory=LoggingSection)
    validation: ValidationSection = Field(default_factory=ValidationSection)

    @property
    def updates_on_host(self) -> bool:
        """Whether masters and optimizer state are in host memory, where they are updated."""
        return self.offload.optimize_on_cpu or self.distributed.offload_optimizer_device == "cpu"

    def with_keys(self, **sections: dict[str, Any]) -> Job:
        """The same with other values of some keys, by section; nothing is checked anew."""
        return self.model_copy(update={name: getattr(self, name).model_copy(update=keys) for name, keys in sections.items()})


def keys() -> dict[str, FieldInfo]:
    """All keys by dotted name, in the order of the reference."""
    found: dict[str, FieldInfo] = {}
    for name, field in Job.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            found.update({f"{name}.{inner}": info for inner, info in section.model_fields.items()})
        else:
            found[name] = field
    return found


def mark(field: FieldInfo, name: Literal["identity", "path"]) -> Any:
    """A key's mark, as given to `_key`."""
    extra = field.json_schema_extra
    return extra.get(name) if isinstance(extra, dict) else None


def as_list(value: str | list[str] | None) -> list[str]:
    """The texts of a key that takes one or several."""
    return [] if value is None else [value] if isinstance(value, str) else value


def lookup(job: Job, dotted: str) -> Any:
    """A key's value by its dotted name."""
    value: Any = job
    for part in dotted.split("."):
        value = getattr(value, part)
    return value
