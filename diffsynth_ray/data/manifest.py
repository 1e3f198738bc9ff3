"""What the rows of a data set are in a cache: which entries, of which size. Enough to train without the media."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from diffsynth_ray.data.cache import Cache, Kind
from diffsynth_ray.data.store import parse_parquet
from diffsynth_ray.errors import DataError

FOLDER = "datasets"
_SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("text_key", pa.string()),
        ("image_key", pa.string()),
        ("extra_key", pa.string()),
        ("height", pa.int64()),
        ("width", pa.int64()),
        ("num_frames", pa.int64()),
        ("bad", pa.list_(pa.string())),
        ("file", pa.int64()),
    ]
)
_LATER = {"file"}
"""Columns that older manifests lack."""
_MARK = b"dsray"
HOLDOUT = "holdout"
"""In a manifest's source: the id of the manifest with its validation samples, where these have metadata of their own."""
SAMPLE_TEXTS = "sample_texts"
"""In a manifest's source: the keys of the texts that samples are made of, by prompt."""
IS_HOLDOUT = "is_holdout"
"""In a manifest's source: it is that of another's validation samples."""
_OF_VALIDATION = (HOLDOUT, SAMPLE_TEXTS)
"""What a data set to train on can differ in and be the same."""


@dataclass(frozen=True)
class ManifestRow:
    """One row of the metadata."""

    prompt: str
    text_key: str | None
    """None where the text encoder is trained, so that nothing of it is in the cache, or reads the extra inputs too."""
    image_key: str | None
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    num_frames: int
    extra_key: str | None = None
    """None without model.extra_inputs."""
    bad: Sequence[str] | None = None
    """File and cause where it cannot be used: `bad_sample = "skip"` takes other rows in its place."""
    file: int | None = None
    """Number of what is trained on among the data set's files; None in older manifests, and where the files are not known."""

    def key(self, kind: Kind) -> str | None:
        """Of its entry of a kind."""
        return {"text": self.text_key, "image": self.image_key, "extra": self.extra_key}[kind]


@dataclass(frozen=True)
class Manifest:
    """A data set in a cache. Memory is O(rows)."""

    rows: tuple[ManifestRow, ...]
    source: dict[str, object] = field(default_factory=dict)
    """Where the rows come from and how they were cut to size, for people, and to know an older state of the same data set."""
    family: str = ""
    dtype: str = ""
    """Number format that was encoded in and is kept: "bf16" or "fp32"."""
    encoders: dict[str, str] = field(default_factory=dict)
    """Kind -> digest of what encoded it."""
    created: float = 0.0
    """Seconds since 1970."""

    @cached_property
    def id(self) -> str:
        """Follows from everything but the time."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([self.source, self.family, self.dtype, self.encoders], sort_keys=True).encode())
        for row in self.rows:
            values = asdict(row)
            if row.file is None:  # so have older manifests their names
                del values["file"]
            digest.update(json.dumps(list(values.values()), ensure_ascii=False).encode())
        return digest.hexdigest()

    @property
    def media(self) -> list[object]:
        """[num_rows] what tells the rows' files apart, as `held_out` wants it."""
        return [(row.image_key or (row.bad and row.bad[0])) if row.file is None else row.file for row in self.rows]

    def entry_keys(self) -> Iterable[str]:
        """The keys of all entries, repeated as rows repeat them."""
        for row in self.rows:
            yield from (key for key in (row.text_key, row.image_key, row.extra_key) if key is not None)
        yield from self.sample_texts.values()

    @property
    def sample_texts(self) -> dict[str, str]:
        """Prompt -> key of its entry, of the samples that a run makes to show what it trains."""
        return cast(dict[str, str], self.source.get(SAMPLE_TEXTS, {}))


def write_manifest(cache: Cache, manifest: Manifest) -> None:
    """Add a manifest; the same one again changes its time only."""
    table = pa.Table.from_pylist([asdict(row) for row in manifest.rows], schema=_SCHEMA)
    about = {name: getattr(manifest, name) for name in ("source", "family", "dtype", "encoders", "created")}
    buffer = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata({_MARK: json.dumps(about).encode()}),
        buffer,
        compression="zstd",
        write_page_checksum=True,
    )
    cache.store.write(f"{FOLDER}/{manifest.id}.parquet", buffer.getvalue())


def read_manifest(cache: Cache, manifest_id: str) -> Manifest:
    """Read one manifest; raises DataError where it is not there or damaged."""
    name = f"{FOLDER}/{manifest_id}.parquet"
    try:
        content = cache.store.read(name)
    except FileNotFoundError as error:
        message = f"{cache.store.path(name)}: no such data set in the cache"
        raise DataError(message, hint="`dsray cache ls` shows what is there") from error
    try:
        table = parse_parquet(content)
        about = json.loads(table.schema.metadata[_MARK])
        names = [name for name in _SCHEMA.names if name in table.column_names or name not in _LATER]
        rows = tuple(ManifestRow(**row) for row in table.select(names).to_pylist())
        manifest = Manifest(rows=rows, **about)
        found = manifest.id  # what is no text, say, has no name
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{cache.store.path(name)}: damaged, or of another version",
            hint="delete that file and submit with [dataset]: nothing is encoded twice for it",
        ) from error
    if found != manifest_id:
        raise DataError(f"{cache.store.path(name)}: its content does not fit its name", hint="delete that file")
    return manifest


def manifest_ids(cache: Cache) -> list[str]:
    """Ids of all manifests, sorted."""
    names = (name.removeprefix(f"{FOLDER}/") for name in cache.files(FOLDER))
    return [name.removesuffix(".parquet") for name in names if name.endswith(".parquet") and name[0] != "."]


def only_manifest(cache: Cache) -> Manifest:
    """The manifest of a cache that holds one data set to train on: of several states of it the newest. Else a DataError."""
    newest: dict[str, Manifest] = {}
    for manifest_id in manifest_ids(cache):
        manifest = read_manifest(cache, manifest_id)
        if manifest.source.get(IS_HOLDOUT):
            continue
        source = json.dumps({key: value for key, value in manifest.source.items() if key not in _OF_VALIDATION}, sort_keys=True)
        if source not in newest or newest[source].created < manifest.created:
            newest[source] = manifest
    if not newest:
        raise DataError(
            f"dataset.base_path is unset, and the cache {cache.path} holds no data set",
            hint="set dataset.base_path to encode one, or split.cache_path to a cache that has one",
        )
    if len(newest) > 1:
        lines = [f"  {manifest.id}: {len(manifest.rows)} rows of {source}" for source, manifest in newest.items()]
        raise DataError(
            "\n".join([f"dataset.base_path is unset, and the cache {cache.path} holds {len(newest)} data sets:", *lines]),
            hint="set dataset.base_path, or give every data set a cache of its own, or remove one: "
            "`dsray cache gc --dataset ID`",
        )
    return next(iter(newest.values()))


def holdout_of(cache: Cache, manifest: Manifest) -> Manifest:
    """The manifest of the validation samples with metadata of their own."""
    if HOLDOUT not in manifest.source:
        raise DataError(
            f"validation.holdout: the data set {manifest.id} in {cache.path} was cached without validation samples of its own",
            hint="submit the job where the media are, with [dataset]; or hold out a share, as in 0.1",
        )
    return read_manifest(cache, str(manifest.source[HOLDOUT]))
