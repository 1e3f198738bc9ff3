"""What will run where: stages, workers, batch arithmetic, steps and files. Needs neither a GPU, a cluster nor torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from diffsynth_ray.config.resolve import ResolvedJob
from diffsynth_ray.config.schema import Job, ModelSection
from diffsynth_ray.data.metadata import PROMPT_COLUMN, read_metadata
from diffsynth_ray.errors import DsrayError, JobFileError, ModelError, Problem
from diffsynth_ray.models import layouts, sources
from diffsynth_ray.schedule import build_schedule, export_file_names, trained_components

_SHOWN_FILES = 3


@dataclass(frozen=True)
class ModelFiles:
    """One entry of model.paths or model.id_with_origin_paths."""

    entry: str
    component: str | None
    """None where it cannot be told yet."""
    num_files: int
    num_bytes: int
    """Of the files that are here."""
    missing: str | None
    """What has to be downloaded, in words."""
    source: str | None
    """From where."""
    directory: str

    def line(self) -> str:
        """For people."""
        what = f"{self.component}: {self.entry}" if self.component else self.entry
        if self.missing is not None:
            lacks = "" if self.missing == "no file" else f" ({self.missing} missing)"
            return f"{what}, to be downloaded from {self.source} to {self.directory}{lacks}"
        return f"{what}, {self.num_files} file(s), {self.num_bytes / 2**30:.3g} GiB in {self.directory}"


@dataclass(frozen=True)
class Plan:
    """The plan of a resolved job, ready to be shown."""

    run: str
    stages: list[str]
    num_workers: int
    min_workers: int
    device: str
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

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return self.num_rows * self.repeat

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self) | {"num_samples": self.num_samples}

    def lines(self) -> list[str]:
        """For people; the arithmetic is written out."""
        resources = ", ".join(f"{amount:g} {name}" for name, amount in self.resources_per_worker.items())
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
            f"workers   {count} x ({resources}), {self.decode_tasks} decoding task(s) of "
            f"{self.decode_cpus:g} CPU each",
            f"samples   {self.num_rows} rows x repeat {self.repeat} = {self.num_samples} an epoch",
            f"batch     {batch} samples a step",
            f"steps     ceil({self.num_samples} / {self.global_batch_size}) = {self.steps_per_epoch} an epoch, "
            f"{self.num_steps} in all ({epochs:.3g} epochs)",
            f"output    {self.output_path}",
            f"files     {shown}{more} ({self.num_exports} exports), job.json, loss.csv, checkpoints/",
            *(f"note      {note}" for note in self.notes),
        ]


def build_plan(resolved: ResolvedJob, *, check_files: bool = True) -> Plan:
    """Plan a run; reads the metadata. Raises DataError where they cannot be used."""
    job = resolved.job
    assert job.dataset.base_path is not None  # resolve has checked it
    models = _inspect_model(resolved) if check_files else []
    metadata = read_metadata(
        job.dataset.base_path,
        job.dataset.metadata_path,
        data_file_keys=job.dataset.data_file_keys,
        required_columns=[PROMPT_COLUMN],
        check_files=check_files,
    )
    num_rows = len(metadata.rows)
    schedule = build_schedule(
        job, num_samples=num_rows * job.dataset.repeat, global_batch_size=resolved.global_batch_size
    )
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
        notes=list(metadata.notes),
    )


def _inspect_model(resolved: ResolvedJob) -> list[ModelFiles]:
    """Where every entry of [model] is and what it holds. Raises JobFileError with all that is wrong with local files."""
    model = resolved.job.model
    problems: list[Problem] = []
    family, entries = model.family, []
    for key, name, files in _entries(model):
        component = None
        if gone := [path for path in files.files if not path.exists()]:
            problems += [Problem(key, f"{path} does not exist") for path in gone]
            continue
        if files.missing is None:
            try:
                paths = files.weights if isinstance(files, sources.Found) else list(files.files)
                family, component = _detect(paths, family)
                problems += _lora_problems(resolved.job, family, component, paths)
            except DsrayError as error:
                problems.append(Problem(key, error.message))
        elif key == "model.paths":
            problems.append(Problem(key, f"{name}: {files.missing} is missing in {files.directory}"))
        elif model.skip_download:
            problems.append(
                Problem(key, f"{name}: {files.missing} in {files.directory}, and model.skip_download is set")
            )
        source = model.source if files.missing else None
        entries.append(
            ModelFiles(name, component, len(files.files), files.num_bytes, files.missing, source, str(files.directory))
        )
    problems += _missing_paths(resolved)
    if problems:
        raise JobFileError(f"job {resolved.job.name}", problems)
    return entries


def _entries(model: ModelSection) -> Iterator[tuple[str, str, sources.Files]]:
    """(key, as it is to be shown, where it is) of paths and ids."""
    for entry in model.paths:
        paths = tuple(Path(path) for path in ([entry] if isinstance(entry, str) else entry))
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        missing = sources.what_lacks(paths) if all(path.exists() for path in paths) else None
        first = paths[0] if paths else Path()
        yield "model.paths", first.name + more, sources.Files(first.parent, paths, missing)
    for origin in sources.model_origins(model):
        assert model.base_path is not None  # resolve fills it in where there are ids
        yield "model.id_with_origin_paths", str(origin), sources.find(origin, model.base_path)


def _detect(paths: list[Path], family: str | None) -> tuple[str | None, str | None]:
    """(family, component), None where only the cluster can tell: torch's own formats, families of other packages."""
    if any(path.suffix != ".safetensors" for path in paths) or (family and family not in layouts.KEY_LAYOUTS):
        return family, None
    mine = {name: known for name, known in layouts.KEY_LAYOUTS.items() if family in (None, name)}
    shapes = layouts.join_shards(((path, layouts.read_header(path)) for path in paths), mine)
    try:
        return layouts.detect_component(shapes, layouts.KEY_LAYOUTS, family=family)
    except ModelError as error:
        if family is None:
            return None, None
        raise ModelError(f"{', '.join(map(str, paths))}: {error.message}") from error


def _lora_problems(job: Job, family: str | None, component: str | None, paths: list[Path]) -> list[Problem]:
    """LoRA targets that nothing in the files can be meant by."""
    if family is None or component is None or component != job.lora.base_model or not job.lora.target_modules:
        return []
    if not layouts.KEY_LAYOUTS[family][component].has_module_names:
        return []
    shapes = {key: shape for path in paths for key, shape in layouts.read_header(path).items()}
    problems = []
    for target, near in layouts.unmatched_targets(shapes, job.lora.target_modules).items():
        advice = f"; did you mean {', '.join(near)}?" if near else ""
        problems.append(Problem("lora.target_modules", f"{target!r} matches nothing in {family}'s {component}{advice}"))
    return problems


def _missing_paths(resolved: ResolvedJob) -> list[Problem]:
    job = resolved.job
    named = {
        "model.tokenizer_path": job.model.tokenizer_path,
        "training.resume_from_checkpoint": job.training.resume_from_checkpoint,
        "lora.checkpoint": job.lora.checkpoint,
        "lora.preset_path": job.lora.preset_path,
    }
    return [
        Problem(key, f"{path} does not exist")
        for key, value in named.items()
        for path in ([value] if isinstance(value, str) else value or [])
        if not Path(path).exists()
    ]
