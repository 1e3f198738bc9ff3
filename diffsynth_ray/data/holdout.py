"""Which rows of a dataset are kept for the validation loss and never trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from diffsynth_ray.data.metadata import Metadata, media_path
from diffsynth_ray.data.order import IntArray, KeyedPermutation, derive_key
from diffsynth_ray.errors import DataError


@contextmanager
def holdout_errors() -> Iterator[None]:
    """What is wrong with the validation's own metadata file is told under the key that names it."""
    try:
        yield
    except DataError as error:
        message = error.message.removeprefix("dataset.metadata_path: ")
        raise DataError(f"validation.holdout: {message}", hint=error.hint) from error


def held_out_rows(metadata: Metadata, *, share: float, seed: int) -> IntArray:
    """`held_out` of metadata."""
    return held_out([media_path(metadata, row) for row in range(len(metadata))], share=share, seed=seed)


def held_out(media: Sequence[object], *, share: float, seed: int) -> IntArray:
    """Rows [n], ascending: all rows of about `share` of the files, at least of one, chosen by the seed.

    By file and not by row, so that a picture that several rows have is not trained on and held out at once. `media` [num_rows]
    tells the files apart.
    """
    files: dict[object, list[int]] = {}
    for row, name in enumerate(media):
        files.setdefault(name, []).append(row)
    if len(files) < 2:
        raise DataError(
            f"validation.holdout: got a share of {share:g}, but the data set has {len(files)} file; nothing would be left",
            hint="name a metadata file of its own instead",
        )
    count = min(max(1, round(share * len(files))), len(files) - 1)
    chosen = KeyedPermutation(len(files), derive_key(seed, 0, "holdout"))(np.arange(count))
    groups = list(files.values())
    return np.array(sorted(row for number in chosen.tolist() for row in groups[number]), dtype=np.int64)
