"""What will run where: stages, workers, batch arithmetic, steps and files. Needs neither a GPU, a cluster nor torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from diffsynth_ray.config.distillation import DIRECT_DISTILL
from diffsynth_ray.config.origins import local_tokenizer
from diffsynth_ray.config.packages import extra_of, is_installed, missing_name, missing_trackers, note_on_estimates
from diffsynth_ray.config.resolve import ResolvedJob, show_amounts
from diffsynth_ray.config.schema import MOST_SAMPLES, Job, as_list
from diffsynth_ray.config.zero import read_zero_config
from diffsynth_ray.data.holdout import held_out, held_out_rows, holdout_errors
from diffsynth_ray.data.metadata import PROMPT_COLUMN, Metadata, read_metadata
from diffsynth_ray.data.teacher import check_teacher_runs
from diffsynth_ray.errors import DataError, JobFileError, Problem
from diffsynth_ray.models.inspection import ModelFiles, check_family, inspect_model, unknown_family
from diffsynth_ray.schedule import build_schedule, export_file_names, trained_components

_SHOWN_FILES = 3


@dataclass(frozen=True)
class Plan:
    """The plan of a resolved job, ready to be shown."""

    run: str
    stages: list[str]
    num_workers: int
    min_workers: int
    device: str
    strategy: str
    resources_per_worker: dict[str, float]
    decode_tasks: int
    decode_cpus: float
    trained: list[str]
    num_rows: int
    repeat: int
    batch_size: int
    micro_steps: int
    global_batch_size: int
    steps_per_epoch: int
    num_steps: int
    num_exports: int
    files: list[str]
    models: list[ModelFiles]
    output_path: str
    notes: list[str]
    encode: dict[str, Any] | None = None
    """Stage one of split training: its workers, their resources, and the cache."""
    num_held_out: int = 0
    """Samples of the validation loss."""
    num_prompts: int = 0
    """That samples are made of."""

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return self.num_rows * self.repeat

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self) | {"num_samples": self.num_samples}

    def lines(self) -> list[str]:
        """For people; the arithmetic is written out."""
        resources = show_amounts(self.resources_per_worker)
        per_worker = self.batch_size * self.micro_steps
        whole = per_worker * self.num_workers
        batch = f"{self.batch_size} x {self.micro_steps} micro steps x {self.num_workers} workers = {whole}"
        if whole != self.global_batch_size:
            batch += f", of which {self.global_batch_size} are used"
        epochs = self.num_steps / self.steps_per_epoch
        shown = ", ".join(self.files[:_SHOWN_FILES])
        more = f" ... {self.files[-1]}" if len(self.files) > _SHOWN_FILES else ""
        count = f"{self.min_workers} to {self.num_workers}" if self.min_workers < self.num_workers else str(self.num_workers)
        return [
            f"run       {self.run}",
            f"stages    {' -> '.join(self.stages)} on {self.device}, training {', '.join(self.trained)}",
            *(f"model     {entry.line()}" for entry in self.models),
            *self._encode_lines(),
            f"workers   {count} x ({resources}) under {self.strategy}, {self.decode_tasks} decoding task(s) of "
            f"{self.decode_cpus:g} CPU each",
            f"samples   {self.num_rows} rows x repeat {self.repeat} = {self.num_samples} an epoch",
            f"batch     {batch} samples a step",
            f"steps     ceil({self.num_samples} / {self.global_batch_size}) = {self.steps_per_epoch} an epoch, "
            f"{self.num_steps} in all ({epochs:.3g} epochs)",
            *self._validation_lines(),
            f"output    {self.output_path}",
            f"files     {shown}{more} ({self.num_exports} exports), job.json, loss.csv, checkpoints/",
            *(f"note      {note}" for note in self.notes),
        ]

    def _validation_lines(self) -> list[str]:
        loss = [f"the loss of {self.num_held_out} samples that are held out"] if self.num_held_out else []
        samples = [f"makes samples of {self.num_prompts} prompts"] if self.num_prompts else []
        return [f"validate  {'; '.join([*loss, *samples])}"] if loss or samples else []

    def _encode_lines(self) -> list[str]:
        if self.encode is None:
            return []
        resources = show_amounts(self.encode["resources_per_worker"])
        return [
            f"encode    {self.encode['num_workers']} x ({resources}) on {self.encode['device']}, loads the encoders that "
            "are not trained; what is in the cache is not encoded again",
            f"cache     {self.encode['cache_path']}",
            f"train     loads what {' and '.join(self.trained)} is trained through"
            + (", and the VAE for samples" if self.num_prompts else "")
            + "; encodes nothing that is cached",
        ]


def build_plan(resolved: ResolvedJob, *, check_files: bool = True, runs_here: bool = False) -> Plan:
    """Plan a run; reads the metadata. Raises DataError where they cannot be used, JobFileError for what else is wrong too.

    `runs_here`: packages that are not installed here are missing where they are needed; else that is noted.
    """
    job = resolved.job
    models, refusal = [], None
    lacking = _look_for_packages(job) if check_files else []
    try:
        models = _inspect_model(resolved, check_files=check_files)
    except JobFileError as error:
        refusal = error
    if wrong := [problem for problem, is_certain in lacking if is_certain or runs_here]:
        refusal = JobFileError(f"job {job.name}", [*(refusal.problems if refusal else []), *wrong])
    try:
        num_rows, num_held_out, notes = _count_rows(resolved, check_files=check_files)
    except DataError as error:
        if refusal is None:
            raise
        raise JobFileError(refusal.source, [*refusal.problems, Problem("", error.message)]) from error
    if num_rows * job.dataset.repeat > MOST_SAMPLES:
        most = MOST_SAMPLES // num_rows
        problem = Problem("dataset.repeat", f"got {job.dataset.repeat} for {num_rows} rows; at most {most} for so many")
        refusal = JobFileError(f"job {job.name}", [*(refusal.problems if refusal else []), problem])
    if refusal is not None:
        raise refusal
    schedule = build_schedule(job, num_samples=num_rows * job.dataset.repeat, global_batch_size=resolved.global_batch_size)
    every = job.output.save_steps or schedule.steps_per_epoch
    num_exports = -(-schedule.num_steps // every)
    stems = list(islice(schedule.export_stems(), _SHOWN_FILES + 1))
    if num_exports > len(stems):
        last = schedule.export_stem(schedule.num_steps)
        assert last is not None  # the last step always exports
        stems.append(last)
    return Plan(
        run=resolved.run,
        stages=list(resolved.stages),
        num_workers=resolved.num_workers,
        min_workers=resolved.min_workers,
        device=resolved.device,
        strategy=_strategy(job),
        resources_per_worker=resolved.resources_per_worker,
        decode_tasks=resolved.decode_tasks,
        decode_cpus=resolved.decode_cpus,
        trained=trained_components(job),
        num_rows=num_rows,
        repeat=job.dataset.repeat,
        batch_size=job.dataset.batch_size,
        micro_steps=resolved.micro_steps,
        global_batch_size=resolved.global_batch_size,
        steps_per_epoch=schedule.steps_per_epoch,
        num_steps=schedule.num_steps,
        num_exports=num_exports,
        files=[name for stem in stems for name in export_file_names(job, stem).values()],
        models=models,
        output_path=str(resolved.output_path),
        notes=[
            *notes,
            *(f"training.optimizer: {note}" for note in [note_on_estimates(job)] if note),
            *(f"{problem.key}: {problem.message}" for problem, _ in lacking),
        ],
        encode=None if resolved.encode is None else resolved.encode.model_dump() | {"cache_path": job.split.cache_path},
        num_held_out=num_held_out,
        num_prompts=len(job.validation.prompts),
    )


def _count_held_out(resolved: ResolvedJob, metadata: Metadata, *, check_files: bool) -> int:
    """Samples of the validation loss; reads their metadata file where they have one."""
    job, holdout = resolved.job, resolved.job.validation.holdout
    if holdout is None:
        return 0
    if isinstance(holdout, float):
        return len(held_out_rows(metadata, share=holdout, seed=job.seed))
    assert job.dataset.base_path is not None  # resolve has checked it
    with holdout_errors():
        held_out = read_metadata(
            job.dataset.base_path,
            holdout,
            data_file_keys=job.dataset.data_file_keys,
            required_columns=[PROMPT_COLUMN],
            check_files=check_files,
        )
    return len(held_out)


def _count_rows(resolved: ResolvedJob, *, check_files: bool) -> tuple[int, int, list[str]]:
    """Rows to train on and held out, and notes about the data set; without [dataset], of the one that the cache holds."""
    job, dataset = resolved.job, resolved.job.dataset
    if dataset.base_path is None:
        from diffsynth_ray.data.cache import Cache
        from diffsynth_ray.data.manifest import holdout_of, only_manifest

        cache, holdout, num_held_out = Cache(job.split.cache_path), job.validation.holdout, 0
        manifest = only_manifest(cache)
        num_rows = len(manifest.rows)
        if isinstance(holdout, float):
            num_held_out = len(held_out(manifest.media, share=holdout, seed=job.seed))
            num_rows -= num_held_out
        elif holdout is not None:
            num_held_out = len(holdout_of(cache, manifest).rows)
        return num_rows, num_held_out, [f"trains from the data set {manifest.id} in the cache"]
    metadata = read_metadata(
        dataset.base_path,
        dataset.metadata_path,
        data_file_keys=dataset.data_file_keys,
        required_columns=[PROMPT_COLUMN],
        # Under "skip" a missing file is a bad sample like any other.
        check_files=check_files and dataset.bad_sample == "error",
    )
    if job.task == DIRECT_DISTILL:
        check_teacher_runs(metadata)
    num_held_out = _count_held_out(resolved, metadata, check_files=check_files)
    num_rows = len(metadata.rows) - (num_held_out if isinstance(job.validation.holdout, float) else 0)
    return num_rows, num_held_out, list(metadata.notes)


def _strategy(job: Job) -> str:
    distributed = job.distributed
    if distributed.strategy == "ddp":
        return "DDP"
    offloaded = [
        what
        for what, device in (
            ("optimizer", distributed.offload_optimizer_device),
            ("parameters", distributed.offload_param_device),
        )
        if device != "none"
    ]
    return f"DeepSpeed ZeRO-{distributed.zero_stage}" + (f", {' and '.join(offloaded)} on the host" if offloaded else "")


def _look_for_packages(job: Job) -> list[tuple[Problem, bool]]:
    """What this machine lacks of other packages, and whether another machine would lack it too."""
    name, family = job.training.optimizer, job.model.family
    found = []
    if family is not None and (message := unknown_family(family)):
        found.append((Problem("model.family", message), False))
    if not is_installed(name):
        message = f"no package {name.partition('.')[0]!r} is installed here; the workers need it for {name}"
        found.append((Problem("training.optimizer", message), False))
    elif missing := missing_name(name):
        found.append((Problem("training.optimizer", f"got {name!r}; {missing}"), True))
    return found + [
        (Problem(f"logging.{key}", f"the package {package} is not installed here: pip install '{extra_of(key)}'"), False)
        for key, package in missing_trackers(job.logging).items()
    ]


def _inspect_model(resolved: ResolvedJob, *, check_files: bool) -> list[ModelFiles]:
    job = resolved.job
    if not check_files:
        if problems := check_family(job, job.model.family):
            raise JobFileError(f"job {job.name}", problems)
        return []
    entries, problems = inspect_model(job)
    named = [
        (key, path)
        for key, value in (
            ("model.tokenizer_path", local_tokenizer(job.model)),
            ("training.resume_from_checkpoint", job.training.resume_from_checkpoint),
            ("validation.inputs", job.validation.inputs),
            ("lora.checkpoint", job.lora.checkpoint),
            ("distributed.deepspeed_config", job.distributed.deepspeed_config),
            ("lora.preset_path", job.lora.preset_path),
        )
        for path in as_list(value)
    ]
    problems += [Problem(key, f"{path} does not exist") for key, path in named if not Path(path).exists()]
    if problems:
        raise JobFileError(f"job {job.name}", problems)
    if job.distributed.strategy == "deepspeed":
        read_zero_config(job)
    return entries
