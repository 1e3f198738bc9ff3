"""Stage one of split training in this process: the functions that Ray Data runs elsewhere."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffsynth_ray.config.resolve import ResolvedJob, Resources, resolve
from diffsynth_ray.config.schema import Job
from diffsynth_ray.models.family import ComponentFiles, get_family
from diffsynth_ray.train import caching, encode, units


class _Nobody:
    """A board that nobody reads."""

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *given: None)


class Stage:
    """A copy of the photographs, a cache, and jobs with both."""

    def __init__(self, tmp_path: Path, photos: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr(caching, "encode_missing", encode_here)
        monkeypatch.setattr(encode, "available_cpus", lambda: 1)  # one thread, as this process has elsewhere
        self.photos = tmp_path / "photos"
        shutil.copytree(photos, self.photos)
        self.cache_path = tmp_path / "cache"
        self.said: list[str] = []

    def job(self, **sections: Any) -> ResolvedJob:
        raw: dict[str, Any] = {
            "name": "job",
            "dataset": {
                "base_path": str(self.photos),
                "metadata_path": str(self.photos / "metadata.csv"),
                "max_pixels": 1024,
                "repeat": 2,
                "global_batch_size": 4,
            },
            "model": {"family": "qwen_image", "tiny": True},
            "training": {"precision": "fp32", "learning_rate": 1e-3},
            "split": {"enabled": True, "cache_path": str(self.cache_path)},
        }
        for name, values in sections.items():
            raw[name] = raw.get(name, {}) | values if isinstance(values, dict) else values
        return resolve(Job.model_validate(raw), Resources(cpus=4, gpus=0))

    def run(
        self,
        resolved: ResolvedJob,
        files: dict[str, ComponentFiles] | None = None,
        tokenizers: dict[str, Path] | None = None,
    ) -> str:
        self.said.clear()
        model = caching.FoundModel(get_family(str(resolved.job.model.family)), files or {}, tokenizers or {})
        return caching.cache_dataset(resolved, model, board=_Nobody(), say=self.said.append, report=lambda progress: None)

    @property
    def counts(self) -> str:
        return next(line for line in self.said if line.startswith("encoded "))


def encode_here(resolved, items, *, rule, components, encoders, board, report):
    worker = encode._EncodeUnit(resolved_json=resolved.model_dump_json(), components=tuple(components), board=board)
    errors = []
    for unit in encode.units_of(items):
        block = encode.pa.table({"unit": [encode.json.dumps(unit)]})
        decoded = encode._decode_units(block, dataset_json=resolved.job.dataset.model_dump_json(), rule=rule)
        written = encode._write_shard(worker(decoded), cache_path=resolved.job.split.cache_path, encoders=encoders, board=board)
        errors += [units.Unreadable(**encode.json.loads(text)) for found in written["errors"].to_pylist() for text in found]
    return errors
