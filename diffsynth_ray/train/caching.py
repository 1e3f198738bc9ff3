"""Stage one of a data set: name every row's entries, encode those that the cache lacks, and leave the manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffsynth_ray.config.resolve import ResolvedJob
from diffsynth_ray.data.cache import Cache, Kind
from diffsynth_ray.data.cached import locate_rows
from diffsynth_ray.data.digests import file_digests
from diffsynth_ray.data.manifest import Manifest, ManifestRow, only_manifest, write_manifest
from diffsynth_ray.data.samples import SampleIndex, build_sample_index
from diffsynth_ray.errors import DataError
from diffsynth_ray.models.family import ComponentFiles, ModelFamily
from diffsynth_ray.run_dir import EncodeProgress
from diffsynth_ray.train.encode import ImageItem, TextItem, encode_missing
from diffsynth_ray.train.split import encoder_digests, image_key, split_parts, text_key

_SHOWN_PROBLEMS = 10

Say = Callable[[str], None]


def cache_dataset(
    resolved: ResolvedJob,
    family: type[ModelFamily],
    files: Mapping[str, ComponentFiles],
    *,
    board: Any,
    say: Say,
    report: Callable[[EncodeProgress], None],
) -> str:
    """Make the cache hold the job's data set; returns the manifest's id.

    Without [dataset] it is the one that the cache holds. Raises DataError with every file that cannot be read.
    """
    job = resolved.job
    parts = split_parts(family, job)
    cache = Cache(job.split.cache_path)
    encoders = encoder_digests(family, job, files, parts=parts, store=cache.store, say=say)
    if job.dataset.base_path is None:
        return _check_cached(cache, resolved, family, kinds=parts.kinds, encoders=encoders, say=say).id
    if lacking := [name for name in parts.components(parts.kinds) if not job.model.tiny and name not in files]:
        raise DataError(
            f"stage encode needs {', '.join(lacking)}, and model.paths has none",
            hint="add the files to model.paths, or leave [dataset] out to train from a cache that holds the data set",
        )
    index = build_sample_index(resolved, say)
    media = _media_digests(index, cache, say) if "image" in encoders else None
    manifest = _name_entries(resolved, family, index, encoders=encoders, media=media)
    texts, images = _items(manifest, index, media=media, frame_rate=job.dataset.frame_rate)
    known = cache.index()
    lack = set(known.missing([*texts, *images]))
    new_texts = [item for key, item in texts.items() if key in lack]
    new_images = [item for key, item in images.items() if key in lack]
    say(
        f"cache {cache.path}: {len(texts)} texts and {len(images)} images are needed, "
        f"{len(texts) - len(new_texts)} and {len(images) - len(new_images)} are there"
    )
    if new_texts or new_images:
        components = parts.components([kind for kind in parts.kinds if (new_texts if kind == "text" else new_images)])
        assert resolved.encode is not None  # resolve has made it
        say(f"starting {resolved.encode.num_workers} encoder(s) that load {', '.join(components)}")
        errors = encode_missing(
            resolved,
            new_texts,
            new_images,
            components=components,
            encoders=encoders,
            board=board,
            report=report,
        )
        if errors:
            raise DataError(_summary(errors, "files cannot be encoded; all others are in the cache"))
    say(
        f"encoded {len(new_texts)} texts and {len(new_images)} images, "
        f"reused {len(texts) - len(new_texts)} texts and {len(images) - len(new_images)} images"
    )
    write_manifest(cache, manifest)
    return manifest.id


def _check_cached(
    cache: Cache,
    resolved: ResolvedJob,
    family: type[ModelFamily],
    *,
    kinds: Sequence[Kind],
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
            f"{where} has its {' and '.join(f'{kind}s' for kind in differing)} from other encoder weights than this job's",
            hint="submit with [dataset] to encode anew, or name the weights that it was encoded with",
        )
    if "image" not in kinds:
        raise DataError(
            "an image encoder is trained, so that the images themselves are needed, and dataset.base_path is unset",
            hint="set dataset.base_path",
        )
    say(f"training from {where}, {len(manifest.rows)} rows")
    if unknown := [kind for kind in kinds if kind not in encoders or kind not in manifest.encoders]:
        say(f"not compared, because the job or the cache does not say what encoded them: {', '.join(unknown)}s")
    locate_rows(cache, manifest, kinds=kinds)
    return manifest


def _media_digests(index: SampleIndex, cache: Cache, say: Say) -> list[str]:
    """[num_rows] hash of each row's file. Raises DataError with all files that cannot be read."""
    paths = [index.path(row) for row in range(len(index.metadata))]
    say(f"hashing {len(paths)} media files, where that was not done before")
    found = file_digests(paths, cache.store, say)
    problems = [f"row {row + 1}: {each.message}" for row, each in enumerate(found) if isinstance(each, DataError)]
    if problems:
        raise DataError(_summary(problems, f"of {len(paths)} files cannot be read"))
    return [digest for digest in found if isinstance(digest, str)]


def _name_entries(
    resolved: ResolvedJob,
    family: type[ModelFamily],
    index: SampleIndex,
    *,
    encoders: Mapping[Kind, str],
    media: Sequence[str] | None,
) -> Manifest:
    """The manifest of the job's rows; `media` [num_rows] are the hashes of their files, None where images are not cached."""
    dataset = resolved.job.dataset
    sizes: dict[int, tuple[int, int, int]] = {}
    for bucket in index.order.buckets:
        sizes.update(dict.fromkeys(bucket.rows.tolist(), (bucket.height, bucket.width, bucket.num_frames)))
    rows = []
    for row in range(len(index.metadata)):
        prompt, (height, width, num_frames) = index.prompt(row), sizes[row]
        text = text_key(encoders["text"], prompt) if "text" in encoders else None
        image = None
        if media is not None:
            rate = dataset.frame_rate if num_frames > 1 else None
            image = image_key(
                encoders["image"], media[row], height=height, width=width, num_frames=num_frames, frame_rate=rate
            )
        rows.append(ManifestRow(prompt, text, image, height, width, num_frames))
    return Manifest(
        rows=tuple(rows),
        source={
            "base_path": dataset.base_path,
            "metadata_path": dataset.metadata_path,
            "size": [dataset.height, dataset.width, dataset.max_pixels],
        },
        family=family.name,
        dtype=resolved.job.training.precision,
        encoders={str(kind): digest for kind, digest in encoders.items()},
        created=time.time(),
    )


def _items(
    manifest: Manifest, index: SampleIndex, *, media: Sequence[str] | None, frame_rate: float | None
) -> tuple[dict[str, TextItem], dict[str, ImageItem]]:
    """Every text and every image once, by key."""
    texts: dict[str, TextItem] = {}
    images: dict[str, ImageItem] = {}
    for number, row in enumerate(manifest.rows):
        if row.text_key is not None and row.text_key not in texts:
            texts[row.text_key] = TextItem(row.text_key, row.prompt)
        if media is not None and row.image_key is not None and row.image_key not in images:
            images[row.image_key] = ImageItem(
                key=row.image_key,
                path=index.path(number),
                digest=media[number],
                row=number,
                height=row.height,
                width=row.width,
                num_frames=row.num_frames,
                frame_rate=frame_rate if row.num_frames > 1 else None,
            )
    return texts, images


def _summary(problems: Sequence[str], what: str) -> str:
    shown = [*problems[:_SHOWN_PROBLEMS]]
    more = [f"... and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
    return "\n  ".join([f"{len(problems)} {what}:", *shown, *more])
