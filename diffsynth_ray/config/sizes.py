"""Sizes that a family of models demands, whoever knows the family: the plan from a table, a cluster from the class."""

from __future__ import annotations

from diffsynth_ray.config.schema import DatasetSection, Job
from diffsynth_ray.errors import Problem

_MOST_PIXELS = 1 << 34


def check_clip_length(dataset: DatasetSection, *, step: int | None) -> list[Problem]:
    """Clips have a multiple of `step` frames and one more; None: the family takes images only."""
    length = dataset.num_frames
    if step is None or (length - 1) % step == 0:
        return []
    near = (length - 1) // step * step + 1
    message = f"got {length}; this family takes a multiple of {step} frames and one more, as in {near} or {near + step}"
    return [Problem("dataset.num_frames", message)]


def check_micro_batch(dataset: DatasetSection, *, step: int | None, area: int | None = None) -> list[Problem]:
    """More pixels than any device has room for: neither reckoned with nor decoded.

    `area`: pixels of a picture where the job fixes none. `step` as in `check_clip_length`.
    """
    if dataset.height is not None and dataset.width is not None:
        area = dataset.height * dataset.width
    num_frames = dataset.num_frames if step is not None else 1
    count = dataset.batch_size * num_frames * (area or 1)
    if count <= _MOST_PIXELS:
        return []
    clip = f" x {num_frames} frames" if num_frames > 1 else ""
    message = (
        f"a micro batch of {dataset.batch_size} samples{clip} has {count:.3g} pixels, more than any device has room for "
        f"({_MOST_PIXELS:.3g}); lower batch_size, height and width (or max_pixels) or num_frames"
    )
    return [Problem("dataset.batch_size", message)]


def check_sample_size(job: Job, *, multiple: int) -> list[Problem]:
    """Sample pictures that the family cannot make: height and width are multiples of `multiple`."""
    size = job.validation.size
    if size is None or not any(side < multiple or side % multiple for side in size):
        return []
    message = f"got {size}; height and width of this family are multiples of {multiple}, as in {[multiple * 16] * 2}"
    return [Problem("validation.size", message)]
