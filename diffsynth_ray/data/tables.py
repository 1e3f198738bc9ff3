"""CSV, JSON, JSON Lines and Parquet files to lists of rows, with the place of each row for messages."""

import csv
import io
import json
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

from diffsynth_ray.data.storage import open_binary
from diffsynth_ray.errors import DataError, first_line, listed


@dataclass
class RawTable:
    """Rows as the file has them: values may be None or NaN, keys may be missing."""

    name: str
    """Of the file, for messages."""
    columns: list[str]
    """All keys, in order of appearance."""
    rows: list[dict[str, Any]]
    lines: "array[int]" = field(default_factory=lambda: array("q"))
    """[num_rows] line of each row in the file, from 1; empty where the format has no lines."""
    has_text_cells: bool = False
    """Whether all values are there and are text, so that a list is written as a JSON array in a cell."""
    column_hint: str = ""
    """What may be wrong where columns are missed."""

    def where(self, index: int) -> str:
        """Name the place of a row (index from 0) as file:line, or file and row (from 1)."""
        return f"{self.name}:{self.lines[index]}" if self.lines else f"{self.name}, row {index + 1}"


def read_table(path: str) -> RawTable:
    """Read a metadata file (local or s3://) by its extension."""
    readers = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    suffix = os.path.splitext(path)[1]
    reader = readers.get(suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown kind of metadata file '{suffix}'; known are {', '.join(readers)}")
    try:
        with open_binary(path) as file:
            if not file.peek(1):
                raise DataError(f"{path}: the file is empty")
            table = reader(path, file)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not table.rows:
        raise DataError(f"{path}: there are no rows; it needs one for every image or video")
    return table


@contextmanager
def _text(file: IO[bytes]) -> Iterator[io.TextIOWrapper]:
    # utf-8-sig drops the byte order mark of spreadsheets; newline="" leaves newlines in quotes to the csv module.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        yield text
    finally:
        text.detach()


def _read_csv(path: str, file: IO[bytes]) -> RawTable:
    table = RawTable(name=path, columns=[], rows=[], has_text_cells=True)
    problems: list[str] = []
    with _text(file) as text:
        reader = csv.reader(text, strict=True)
        line = 1
        try:
            columns = table.columns = next((row for row in reader if row), [])
            _check_header(path, columns)
            line = reader.line_num + 1
            for cells in reader:
                if len(cells) == len(columns):
                    table.rows.append(dict(zip(columns, cells)))  # noqa: B905 - the lengths were just compared
                    table.lines.append(line)
                elif cells:
                    is_long = len(cells) > len(columns)
                    cure = "put quotes around a text with commas" if is_long else "an empty cell has its comma too"
                    problems.append(f"{path}:{line}: {len(cells)} cells, the header has {len(columns)}; {cure}")
                line = reader.line_num + 1
        except csv.Error as error:
            # A quote that nobody closes takes all the rest of the file along: what matters is where that row begins.
            begin = f" in the row that begins at line {line}" if line < reader.line_num else ""
            problems.append(f"{path}:{reader.line_num}: {error}{begin}; inside quotes, a quote is written twice")
    _raise_problems(problems)
    if len(columns) == 1 and any(separator in columns[0] for separator in ";\t"):
        table.column_hint = "the header looks separated by semicolons or tabs; save the file with commas"
    return table


def _check_header(path: str, columns: list[str]) -> None:
    if not columns:
        raise DataError(f"{path}: the file is empty")
    repeated = sorted({column for column in columns if columns.count(column) > 1})
    if repeated:
        raise DataError(f"{path}:1: the header names {', '.join(map(repr, repeated))} twice; column names must differ")


def _read_json(path: str, file: IO[bytes]) -> RawTable:
    content = file.read().decode("utf-8-sig")
    try:
        entries = json.loads(content)
    except json.JSONDecodeError as error:
        hint = "; one object a line is JSON Lines, name it .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg} (column {error.colno}){hint}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise DataError(f"{path}: JSON that cannot be read: {error}") from error
    if not isinstance(entries, list):
        raise DataError(f"{path}: must be a list of objects, got {type(entries).__name__}: [{{...}}, {{...}}]")
    _raise_problems(
        [
            f"{path}, row {index + 1}: must be an object, got {json.dumps(entry)[:80]}"
            for index, entry in enumerate(entries)
            if not isinstance(entry, dict)
        ]
    )
    return RawTable(name=path, columns=_collect_columns(entries), rows=entries)


def _read_jsonl(path: str, file: IO[bytes]) -> RawTable:
    rows: list[dict[str, Any]] = []
    lines, problems = array("q"), []
    with _text(file) as lines_of_file:
        for line, text in enumerate(lines_of_file, start=1):
            if text.isspace():
                continue
            try:
                entry = json.loads(text)
            except json.JSONDecodeError as error:
                problems.append(f"{path}:{line}: not JSON: {error.msg} (column {error.colno}): {text.strip()[:80]}")
                continue
            except (ValueError, RecursionError) as error:
                problems.append(f"{path}:{line}: JSON that cannot be read ({error}): {text.strip()[:80]}")
                continue
            if isinstance(entry, dict):
                rows.append(entry)
                lines.append(line)
            else:
                problems.append(f"{path}:{line}: must be an object, got {text.strip()[:80]}")
    _raise_problems(problems)
    return RawTable(name=path, columns=_collect_columns(rows), rows=rows, lines=lines)


def _read_parquet(path: str, file: IO[bytes]) -> RawTable:
    # Imported late: most datasets have text metadata, and the import takes a third of a second.
    import pyarrow
    import pyarrow.parquet

    try:
        # A handle and not a path, so that no directory or URL is guessed from the name.
        table = pyarrow.parquet.read_table(file)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file: {first_line(error)}") from error
    return RawTable(name=path, columns=list(table.column_names), rows=table.to_pylist())


def _collect_columns(rows: list[dict[str, Any]]) -> list[str]:
    columns: dict[str, None] = {}
    for row in rows:
        if not row.keys() <= columns.keys():
            columns.update(dict.fromkeys(row))
    return list(columns)


def _raise_problems(problems: list[str]) -> None:
    if problems:
        raise DataError("\n  ".join(listed(problems)))
