"""Samples that could not be used and were replaced: what is known of one, and the list of a run.

The list is `bad_samples.jsonl` in the output directory, one line a row of the metadata, however often the row comes up. It has
one writer, the driver; a later attempt goes on with it, but for files that have changed since.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth_ray.data.storage import Stamp, read_stamps
from diffsynth_ray.errors import MOST_LISTED, DataError, listed
from diffsynth_ray.run_dir import append_line, read_jsonl, write_whole


@dataclass(frozen=True)
class BadSample:
    """A row that could not be used."""

    row: int
    """Position in the metadata, from 0."""
    num_rows: int
    """Of the metadata."""
    path: str
    cause: str
    step: int | None = None
    """Step (from 0) that met it first; None where its header was already enough."""
    replaced_by: int | None = None
    """Row that was trained on instead, there."""

    def __str__(self) -> str:
        return f"row {self.row + 1}: {self.cause}"

    def as_dict(self) -> dict[str, Any]:
        """A line of the list: rows and steps count from 1, as in messages and in the log."""
        stamp = read_stamps([self.path])[self.path]
        return {
            "row": self.row + 1,
            "file": self.path,
            "cause": self.cause,
            "step": None if self.step is None else self.step + 1,
            "replaced_by_row": None if self.replaced_by is None else self.replaced_by + 1,
            "bytes": stamp.size if stamp else None,
            "changed": stamp.mark if stamp else None,
        }


def check_limit(bad: Sequence[object], *, num_bad: int, num_rows: int, limit: float) -> None:
    """Raise DataError where more than a share `limit` of the rows is bad; `bad` are some of them and their causes."""
    if num_bad <= limit * num_rows:
        return
    head = f"{num_bad} of {num_rows} rows are bad, above dataset.bad_sample_limit = {limit:g}:"
    raise DataError(
        "\n  ".join([head, *listed(bad, total=num_bad)]),
        hint="mend or remove those files (`dsray data check` lists them all), or raise dataset.bad_sample_limit",
    )


def _stamp(entry: dict[str, Any]) -> Stamp | None:
    return None if entry["bytes"] is None else Stamp(entry["bytes"], entry["changed"])


class BadSampleList:
    """The list of a run."""

    def __init__(self, path: Path, *, limit: float) -> None:
        self._path = path
        self._limit = limit
        self._rows = self._read_back()
        self._causes: list[str] = []

    def _read_back(self) -> set[int]:
        """The rows of an earlier attempt; files that were mended since are taken off the list."""
        entries = list(read_jsonl(self._path))
        stamps = read_stamps([entry["file"] for entry in entries])
        bad = [entry for entry in entries if _stamp(entry) == stamps[entry["file"]]]
        if len(bad) < len(entries):
            write_whole(self._path, "".join(f"{json.dumps(entry)}\n" for entry in bad))
        return {entry["row"] - 1 for entry in bad}

    def add(self, found: Iterable[BadSample]) -> str | None:
        """Append the rows that are new; returns what to tell, if anything. Raises DataError above the limit."""
        new = []
        for bad in found:
            if bad.row not in self._rows:
                self._rows.add(bad.row)
                append_line(self._path, json.dumps(bad.as_dict()))
                new.append(bad)
        if not new:
            return None
        self._causes += [str(bad) for bad in new[: MOST_LISTED - len(self._causes)]]
        num_rows = new[0].num_rows
        check_limit(self._causes, num_bad=len(self._rows), num_rows=num_rows, limit=self._limit)
        more = f" and {len(new) - 1} more" if len(new) > 1 else ""
        return (
            f"bad sample replaced: {new[0]}{more}; {len(self._rows)} of {num_rows} rows so far "
            f"({len(self._rows) / num_rows:.2%}, limit {self._limit:.2%}), all in {self._path}"
        )
