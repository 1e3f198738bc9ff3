"""Stage one of a data set: name every row's entries, encode those that the cache lacks, and leave the manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from diffsynth_ray.config.resolve import ResolvedJob
from diffsynth_ray.config.schema import DatasetSection, Job
from diffsynth_ray.data.bad_samples import check_limit
from diffsynth_ray.data.cache import Cache, Kind
from diffsynth_ray.data.cached import PLURAL, locate_rows
from diffsynth_ray.data.digests import file_digests
from diffsynth_ray.data.manifest import Manifest, only_manifest, write_manifest
from diffsynth_ray.data.samples import SampleRule, build_sample_index
from diffsynth_ray.errors import DataError, listed
from diffsynth_ray.models.family import ComponentFiles, ModelFamily
from diffsynth_ray.run_dir import EncodeProgress
from diffsynth_ray.train.encode import encode_missing
from diffsynth_ray.train.named_rows import NamedRows, name_rows
from diffsynth_ray.train.split import encoder_digests, sample_prompts, split_parts, text_key
from diffsynth_ray.train.units import TextItem

Say = Callable[[str], None]


@dataclass(frozen=True)
class FoundModel:
    """A job's model on this machine. A tiny one has no files."""

    family: type[ModelFamily]
    files: Mapping[str, ComponentFiles] = field(default_factory=dict)
    """By component."""
    tokenizers: Mapping[str, Path] = field(default_factory=dict)
    """Folders by key of [model]."""

    def components(self, job: Job) -> tuple[str, ...]:
        """Those that there are."""
        return self.family.tiny_components(job.model.extra_inputs) if job.model.tiny else tuple(self.files)


def cache_dataset(
    resolved: ResolvedJob,
    model: FoundModel,
    *,
    board: Any,
    say: Say,
    report: Callable[[EncodeProgress], None],
) -> str:
    """Make the cache hold the job's data set; returns the manifest's id.

    Without [dataset] it is the one that the cache holds. Raises DataError with every file that cannot be read.
    """
    job, family = resolved.job, model.family
    parts = split_parts(family, job, present=model.components(job))
    cache = Cache(job.split.cache_path)
    encoders = encoder_digests(family, job, model.files, tokenizers=model.tokenizers, parts=parts, store=cache.store, say=say)
    prompts = sample_prompts(family, job, parts)
    if job.dataset.base_path is None:
        return _check_cached(cache, resolved, family, kinds=parts.kinds, prompts=prompts, encoders=encoders, say=say).id
    if lacking := [name for name in parts.components(parts.kinds) if name not in model.components(job)]:
        raise DataError(
            f"stage encode needs {', '.join(lacking)}, and model.paths has none",
            hint="add the files to model.paths, or leave [dataset] out to train from a cache that holds the data set",
        )
    rule = SampleRule(family.size_multiple, family.clip_step)
    # A share that is held out is encoded like all other rows; which these are is stage two's matter.
    holdout = job.validation.holdout if isinstance(job.validation.holdout, str) else None
    index = build_sample_index(resolved.with_keys(validation={"holdout": holdout}), say, rule=rule)
    digest = partial(_digests, cache=cache, dataset=job.dataset, say=say)
    name = partial(name_rows, resolved, family, encoders=encoders, digest=digest)
    rows, held = name(index), None if index.holdout is None else name(index.holdout)
    named = [rows] if held is None else [rows, held]
    items = {kind: {key: item for each in named for key, item in each.found[kind].items()} for kind in rows.found}
    texts = {prompt: text_key(encoders["text"], prompt) for prompt in prompts}
    items["text"] |= {key: TextItem(key, prompt) for prompt, key in texts.items()}
    known = cache.index()
    lack = set(known.missing([key for found in items.values() for key in found]))
    new = {kind: [item for key, item in found.items() if key in lack] for kind, found in items.items()}
    needed = {kind: len(found) for kind, found in items.items()}
    reused = {kind: len(found) - len(new[kind]) for kind, found in items.items()}
    say(f"cache {cache.path}: {_count(needed)} are needed, {_count(reused)} are there")
    if any(new.values()):
        components = parts.components([kind for kind in parts.kinds if new[kind]])
        assert resolved.encode is not None  # resolve has made it
        say(f"starting {resolved.encode.num_workers} encoder(s) that load {', '.join(components)}")
        errors = encode_missing(resolved, new, rule=rule, components=components, encoders=encoders, board=board, report=report)
        if errors and job.dataset.bad_sample == "error":
            raise DataError(_summary(errors, "files cannot be encoded; all others are in the cache"))
        unreadable = {error.key: error.cause for error in errors}
        for each in named:
            each.mark_bad(unreadable)
        new = {kind: [item for item in found if item.key not in unreadable] for kind, found in new.items()}
    say(f"encoded {_count({kind: len(found) for kind, found in new.items()})}, reused {_count(reused)}")
    _replace_bad(resolved, rows, say)
    of_holdout = None
    if held is not None:
        of_holdout = held.manifest(resolved, family, encoders, metadata_path=holdout, is_holdout=True)
        write_manifest(cache, of_holdout)
    manifest = rows.manifest(
        resolved, family, encoders, metadata_path=job.dataset.metadata_path, holdout=of_holdout, texts=texts
    )
    write_manifest(cache, manifest)
    return manifest.id


def _replace_bad(resolved: ResolvedJob, rows: NamedRows, say: Say) -> None:
    """Make rows that cannot be used replaceable; raises DataError where there are too many."""
    bad = rows.bad()
    if not bad:
        return
    causes = [f"row {row + 1}: {cause}" for row, cause in bad.items()]
    if len(bad) == len(rows.rows):
        raise DataError(_summary(causes, "rows, and none can be used"))
    check_limit(causes, num_bad=len(bad), num_rows=len(rows.rows), limit=resolved.job.dataset.bad_sample_limit)
    say(f"{len(bad)} of {len(rows.rows)} rows cannot be used; others are trained on in their place")
    rows.lend_sizes(resolved.job.seed)


def _count(counts: Mapping[Kind, int]) -> str:
    words = [f"{count} {PLURAL[kind]}" for kind, count in counts.items()]
    return " and ".join([", ".join(words[:-1]), words[-1]])


def _digests(
    paths: Sequence[str], places: Sequence[str], *, cache: Cache, dataset: DatasetSection, say: Say
) -> list[str | DataError]:
    """Hash of each file, or why it cannot be read; `places` say where in the metadata it is.

    Under `bad_sample = "error"` raises DataError with all that cannot be read.
    """
    say(f"hashing {len(set(paths))} media files, where that was not done before")
    found = file_digests(paths, cache.store, say)
    named = [(place, each) for place, each in zip(places, found, strict=True) if isinstance(each, DataError)]
    if named and dataset.bad_sample == "error":
        problems = [f"{place}: {error.message}" for place, error in named]
        raise DataError(_summary(problems, f"of {len(paths)} files cannot be read"))
    return found


def _check_cached(
    cache: Cache,
    resolved: ResolvedJob,
    family: type[ModelFamily],
    *,
    kinds: Sequence[Kind],
    prompts: Sequence[str],
    encoders: Mapping[Kind, str],
    say: Say,
) -> Manifest:
    """The only data set of the cache, if it fits the job: its encoders are compared where the job names their weights."""
    manifest = only_manifest(cache)
    where = f"the data set {manifest.id} in {cache.path}"
    if (manifest.family, manifest.dtype) != (family.name, resolved.job.training.precision):
        raise DataError(
            f"{where} was encoded for {manifest.family} in {manifest.dtype}, "
            f"the job trains {family.name} in {resolved.job.training.precision}",
            hint="set training.precision and model.family alike, or submit with [dataset] to encode anew",
        )
    if differing := [kind for kind, digest in encoders.items() if manifest.encoders.get(kind, digest) != digest]:
        raise DataError(
            f"{where} has its {' and '.join(PLURAL[kind] for kind in differing)} from other encoder weights than this job's",
            hint="submit with [dataset] to encode anew, or name the weights that it was encoded with",
        )
    if "image" not in kinds:
        raise DataError(
            "an image encoder is trained, so that the images themselves are needed, and dataset.base_path is unset",
            hint="set dataset.base_path",
        )
    num_bad = sum(row.bad is not None for row in manifest.rows)
    if num_bad and resolved.job.dataset.bad_sample == "error":
        raise DataError(
            f"{where} has {num_bad} rows that could not be encoded",
            hint='dataset.bad_sample = "skip" takes other rows in their place; or mend them and submit with [dataset]',
        )
    say(f"training from {where}, {len(manifest.rows)} rows")
    if unknown := [kind for kind in kinds if kind not in encoders or kind not in manifest.encoders]:
        named = ", ".join(PLURAL[kind] for kind in unknown)
        say(f"not compared, because the job or the cache does not say what encoded them: {named}")
    locate_rows(cache, manifest, kinds=kinds, prompts=prompts)
    return manifest


def _summary(problems: Sequence[object], what: str) -> str:
    return "\n  ".join([f"{len(problems)} {what}:", *listed(problems)])
