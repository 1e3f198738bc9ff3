"""What a plan says of a job's model: where its files are, what they hold, what is wrong with them. No network, no torch."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffsynth_ray.config.distillation import condition_columns
from diffsynth_ray.config.schema import Job, ModelSection, as_list
from diffsynth_ray.config.sizes import check_clip_length, check_micro_batch, check_sample_size
from diffsynth_ray.config.zero import check_shared_encoders
from diffsynth_ray.errors import ModelError, Problem
from diffsynth_ray.models import layouts, sources
from diffsynth_ray.models.fp8_entries import entry_number, fp8_components, fp8_problems, names_entries
from diffsynth_ray.schedule import partitioned_components, trained_components


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
        return f"{what}, {self.num_files} file(s), {sources.size(self.num_bytes)} in {self.directory}"


def inspect_model(job: Job) -> tuple[list[ModelFiles], list[Problem]]:
    """Where every entry of [model] is and what it holds, and all that is wrong with the files that are here."""
    model = job.model
    problems: list[Problem] = []
    known: list[tuple[int, str, str, sources.Files, layouts.Shapes | None]] = []
    for number, (key, name, files) in enumerate(_entries(model)):
        shapes = None
        if gone := [path for path in files.files if not path.exists()]:
            problems += [Problem(key, f"{path} does not exist") for path in gone]
            continue
        if files.missing is None:
            try:
                shapes = _read_shapes(_weights(files), model.family)
            except ModelError as error:
                problems.append(Problem(key, error.message))
        elif key == "model.paths":
            problems.append(Problem(key, f"{name}: {files.missing} is missing in {files.directory}"))
        elif model.skip_download:
            message = f"{name}: {files.missing} in {files.directory}, and model.skip_download is set"
            problems.append(Problem(key, message))
        known.append((number, key, name, files, shapes))
    read = [shapes for *_, shapes in known if shapes is not None]
    family = model.family or layouts.common_family(read, layouts.KEY_LAYOUTS)
    problems += check_family(job, family)
    entries, components = [], {}
    for number, key, name, files, shapes in known:
        held = None
        if shapes is not None:
            try:
                held = _detect(shapes, family)
            except ModelError as error:
                problems.append(Problem(key, f"{', '.join(map(str, _weights(files)))}: {error.message}"))
            problems += _lora_problems(job, family, held)
        if held is not None:
            components[number] = held
        entries.append(_describe(" and ".join(held) if held else None, name, files, model))
    if family is not None and len(components) == len(model.paths) + len(model.id_with_origin_paths) > 0:
        known_names = layouts.KEY_LAYOUTS.get(family, {})
        absent = check_trained(job, [name for held in components.values() for name in held])
        problems += [problem for name, problem in absent.items() if name in known_names]
    if names_entries(job):
        problems += fp8_problems(job, fp8_components(job, components))
    if any(entry.component in (None, "text_encoder") for entry in entries):
        weights = [paths for *_, files, _ in known if (paths := _weights(files))]
        more, lacking = _tokenizers_of_a_hub(model, family, weights)
        entries, problems = entries + more, problems + lacking
    return entries, problems


def check_trained(job: Job, present: Collection[str]) -> dict[str, Problem]:
    """Trained component -> what is wrong, of those that are in none of the files."""
    found = {}
    for name in trained_components(job):
        if name not in present:
            key = "lora.base_model" if name == job.lora.base_model else "training.trainable_models"
            found[name] = Problem(key, f"{name} is in none of the model's files, which hold {', '.join(present)}")
    return found


def unknown_family(family: str) -> str | None:
    """What to say of a family that no package here has; its own may be on the cluster only."""
    known = sorted({*layouts.KEY_LAYOUTS, *layouts.family_entry_points()})
    if family in known:
        return None
    near = difflib.get_close_matches(family, known, n=1)
    advice = f"; did you mean {near[0]!r}?" if near else ""
    return f"no package here has the family {family!r}{advice}; known: {', '.join(known)}"


def check_family(job: Job, family: str | None) -> list[Problem]:
    """What the family has not or cannot do. Of other packages' families only the cluster can tell."""
    if family not in layouts.KEY_LAYOUTS:
        return []
    return _name_problems(job, family) + _option_problems(job, family) + _call_problems(job, family)


def _name_problems(job: Job, family: str) -> list[Problem]:
    """Components, inputs and options that the family has not."""
    components, inputs, options = (
        tuple(layouts.KEY_LAYOUTS[family]),
        layouts.EXTRA_INPUTS[family],
        tuple(layouts.OPTIONS[family]),
    )
    named = [("training.trainable_models", "component", name, components) for name in job.training.trainable_models]
    named += [("lora.base_model", "component", job.lora.base_model, components)] if job.lora.base_model is not None else []
    named += [("lora.preset_model", "component", name, components) for name in as_list(job.lora.preset_model)]
    named += [
        ("model.fp8_models", "component", name, components)
        for name in job.model.fp8_models
        if entry_number(job.model, name) is None
    ]
    named += [("model.extra_inputs", "extra input", name, inputs) for name in condition_columns(job)]
    named += [("model.options", "option", name, options) for name in job.model.options]
    problems = []
    for key, what, name, known in named:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            advice = f"; did you mean {near[0]!r}?" if near else ""
            have = ", ".join(known) or "none"
            problems.append(Problem(key, f"the family {family} has no {what} {name!r}; it has {have}{advice}"))
    return problems


_KINDS: dict[type, str] = {bool: "true or false", float: "a number"}


def _option_problems(job: Job, family: str) -> list[Problem]:
    """Options with values that the family does not take."""
    problems = []
    for name, value in job.model.options.items():
        allowed = layouts.OPTIONS[family].get(name)
        if isinstance(allowed, tuple):
            wrong, needed = value not in allowed, f"one of {', '.join(allowed)}"
        elif allowed is not None:
            # A whole number is a number too; true is none.
            wrong = not isinstance(value, (allowed, int)) or isinstance(value, bool) != (allowed is bool)
            needed = _KINDS[allowed]
        else:
            continue  # told as a name that the family has not
        if wrong:
            problems.append(Problem("model.options", f"{name} is {needed}, got {value!r}"))
    return problems


def _call_problems(job: Job, family: str) -> list[Problem]:
    """What the family cannot do with these sizes, or with components that workers share."""
    calls = layouts.CALLS[family]
    shared = check_shared_encoders(
        job,
        partitioned_components(job),
        predict_components=calls.predict_components,
        clip_components=calls.image_components if calls.clip_step is not None else (),
    )
    return [
        *shared,
        *check_clip_length(job.dataset, step=calls.clip_step),
        *check_micro_batch(job.dataset, step=calls.clip_step),
        *check_sample_size(job, multiple=calls.size_multiple),
    ]


def _tokenizers_of_a_hub(
    model: ModelSection, family: str | None, weights: list[list[Path]]
) -> tuple[list[ModelFiles], list[Problem]]:
    entries, problems = [], []
    defaults = layouts.DEFAULT_TOKENIZERS.get(family or "", {})
    for key, where in sources.find_tokenizers(model, defaults, weights).items():
        if not isinstance(where, sources.Found):
            continue
        if where.missing is not None and model.skip_download:
            which = "of" if getattr(model, key) else "not set, and of its default"
            message = f"{which} {where.origin} {where.missing} is here; model.skip_download is set"
            problems.append(Problem(f"model.{key}", message))
        entries.append(_describe(key.removesuffix("_path"), str(where.origin), where, model))
    return entries, problems


def _describe(component: str | None, name: str, files: sources.Files, model: ModelSection) -> ModelFiles:
    source = model.source if files.missing else None
    return ModelFiles(name, component, len(files.files), files.num_bytes, files.missing, source, str(files.directory))


def _entries(model: ModelSection) -> Iterator[tuple[str, str, sources.Files]]:
    """(key, as it is to be shown, where it is) of paths and ids."""
    for entry in model.paths:
        paths = tuple(Path(path) for path in as_list(entry))
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        missing = sources.what_lacks(paths) if all(path.exists() for path in paths) else None
        first = paths[0] if paths else Path()
        yield "model.paths", first.name + more, sources.Files(first.parent, paths, missing)
    for origin in sources.model_origins(model):
        assert model.base_path is not None  # resolve fills it in where there are ids
        yield "model.id_with_origin_paths", str(origin), sources.find(origin, model.base_path)


def _weights(files: sources.Files) -> list[Path]:
    return files.weights if isinstance(files, sources.Found) else list(files.files)


def _read_shapes(paths: list[Path], family: str | None) -> layouts.Shapes | None:
    """None where only the cluster can tell: torch's own formats, families of other packages."""
    if any(path.suffix != ".safetensors" for path in paths) or (family and family not in layouts.KEY_LAYOUTS):
        return None
    mine = {name: known for name, known in layouts.KEY_LAYOUTS.items() if family in (None, name)}
    return layouts.join_shards(((path, layouts.read_header(path)) for path in paths), mine)


def _detect(shapes: layouts.Shapes, family: str | None) -> dict[str, layouts.Shapes] | None:
    """The components, the first of them the files' own, each with its keys.

    None where the job names no family, so that it may be one of another package.
    """
    try:
        name, component = layouts.detect_component(shapes, layouts.KEY_LAYOUTS, family=family)
        return layouts.parts_of(shapes, layouts.KEY_LAYOUTS[name], component)
    except ModelError:
        if family is None:
            return None
        raise


def _lora_problems(job: Job, family: str | None, held: Mapping[str, layouts.Shapes] | None) -> list[Problem]:
    """LoRA targets that nothing in the files can be meant by."""
    component = job.lora.base_model
    if family is None or held is None or component is None or component not in held or not job.lora.target_modules:
        return []
    if not layouts.KEY_LAYOUTS[family][component].has_module_names:
        return []
    problems = []
    for target, near in layouts.unmatched_targets(held[component], job.lora.target_modules).items():
        advice = f"; did you mean {', '.join(near)}?" if near else ""
        problems.append(Problem("lora.target_modules", f"{target!r} matches nothing in {family}'s {component}{advice}"))
    return problems
