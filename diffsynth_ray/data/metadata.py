"""A dataset's metadata file to checked rows.

A row maps columns to values; a file column (one of `data_file_keys`) holds a path, a URL or a list of them. An empty
cell, null, NaN and a missing key are all the empty string: a prompt is never "nan". CSV cells stay text, JSON and
Parquet keep their types.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from diffsynth_ray.data.media import MEDIA_EXTENSIONS, STATIC_IMAGE_EXTENSIONS, media_extension
from diffsynth_ray.data.storage import (
    exists,
    is_folder,
    is_remote,
    is_url,
    join,
    list_files,
    local_or_remote,
    read_bytes,
    read_stamps,
)
from diffsynth_ray.data.tables import RawTable, read_table
from diffsynth_ray.errors import DataError, listed

Value = str | int | float | bool | list[Any] | dict[str, Any]
Row = dict[str, Value]

PROMPT_COLUMN = "prompt"
"""The caption's column; a cell may be empty, the column must be there."""
DEFAULT_DATA_FILE_KEYS = ("image", "video")
METADATA_NAMES = ("metadata.csv", "metadata.json", "metadata.jsonl", "metadata.parquet")

_NUM_CAPTION_THREADS = 16
_ROWS_PER_DIGEST = 10_000


@dataclass(frozen=True)
class Metadata:
    """The rows of a dataset, checked."""

    rows: list[Row]
    """Every row has every column."""
    columns: tuple[str, ...]
    file_columns: tuple[str, ...]
    """The columns among `columns` that hold media files."""
    base_path: str
    """Folder or s3:// prefix that the rows' paths are relative to; "" means the working directory."""
    digest: str
    """Hexadecimal, of columns and rows: equal for equal content in whatever format or place."""
    notes: tuple[str, ...] = ()
    """What the user should be told about how the data was understood."""

    def __len__(self) -> int:
        return len(self.rows)

    def files(self, row_index: int, column: str) -> list[str]:
        """Return the paths or URLs of a file cell, ready to open; empty where the cell is."""
        return [join(self.base_path, path) for path in _cell_files(self.rows[row_index][column])]


def media_column(metadata: Metadata, row: int) -> str:
    """The column whose file is trained on: the first of image and video, else of all file columns, that is not empty."""
    own = [column for column in metadata.file_columns if column in DEFAULT_DATA_FILE_KEYS] or metadata.file_columns
    return next((column for column in own if metadata.rows[row][column]), own[0])


def media_path(metadata: Metadata, row: int) -> str:
    """The file that is trained on; read_metadata has checked that there is one."""
    return metadata.files(row, media_column(metadata, row))[0]


def read_metadata(
    base_path: str | Path,
    metadata_path: str | Path | None,
    data_file_keys: Sequence[str] = DEFAULT_DATA_FILE_KEYS,
    *,
    required_columns: Sequence[str] = (),
    check_files: bool = True,
) -> Metadata:
    """Read and check a dataset's metadata; all problems come in one DataError.

    base_path: folder (local, file:// or s3://) that paths in the rows are relative to.
    metadata_path: .csv, .json (a list), .jsonl or .parquet, local, file:// or s3://; None takes the images and videos in
        base_path, with captions in .txt files of the same names.
    data_file_keys: the file columns. `image` and `video` may be absent as long as another one is there; others may not.
    required_columns: columns that must be there besides, such as prompt.
    check_files: whether to look for every file (not for http(s) URLs); some seconds for a million files.
    """
    base = local_or_remote(base_path)
    if base and not is_folder(base):
        raise DataError(f"dataset.base_path: {base_path} is not a directory; paths in the metadata are relative to it")
    notes: list[str] = []
    if metadata_path is None or str(metadata_path) == "":
        table = _read_folder(base, data_file_keys, notes)
    else:
        table = read_table(_find_metadata(local_or_remote(metadata_path), base))
    columns, rows = _fill(table)
    file_columns = tuple(key for key in data_file_keys if key in columns)
    _check_columns(table, columns, data_file_keys, required_columns)
    problems = _check_cells(table, rows, file_columns)
    if PROMPT_COLUMN in columns and not table.has_text_cells:
        problems += _check_prompts(table, rows)
    if check_files:
        problems += _check_files(table, rows, file_columns, base)
    if problems:
        raise DataError("\n  ".join([f"{table.name}: {len(problems)} problem(s) in {len(rows)} rows", *listed(problems)]))
    trained = [column for column in file_columns if column in DEFAULT_DATA_FILE_KEYS]
    if len(trained) > 1 and (num_both := sum(all(row[column] for column in trained) for row in rows)):
        notes.append(
            f"{num_both} rows have both {_quoted(trained)}: trains on '{trained[0]}', which is named first in "
            f"dataset.data_file_keys; leave it out there to train on '{trained[1]}'"
        )
    return Metadata(
        rows=rows,
        columns=columns,
        file_columns=file_columns,
        base_path=base,
        digest=_digest(columns, rows),
        notes=tuple(notes),
    )


def _find_metadata(path: str, base: str) -> str:
    if exists(path):
        return path
    if is_remote(path):
        raise DataError(f"dataset.metadata_path: no such file {path}")
    hint = f"it is relative to the working directory, {Path.cwd()}"
    directory = Path(path).parent
    names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
    near = get_close_matches(Path(path).name, names, n=1)
    if exists(join(base, path)):
        hint = f"did you mean {join(base, path)}?"
    elif Path(path).is_dir():
        hint = "it is a directory; name a .csv, .json, .jsonl or .parquet file"
    elif near:
        hint = f"did you mean {directory / near[0]}?"
    raise DataError(f"dataset.metadata_path: no such file {path}; {hint}")


def _fill(table: RawTable) -> tuple[tuple[str, ...], list[Row]]:
    """Give every row every column, and empty values their one form."""
    columns = tuple(table.columns)
    if table.has_text_cells:
        return columns, table.rows
    for row in table.rows:
        values = row.values()
        if len(row) == len(columns) and None not in values and not any(value != value for value in values):
            continue
        for column in columns:
            value = row.get(column)
            # NaN is the one value that differs from itself.
            row[column] = "" if value is None or value != value else value
    return columns, table.rows


def _check_columns(
    table: RawTable, columns: Sequence[str], data_file_keys: Sequence[str], required_columns: Sequence[str]
) -> None:
    problems = []
    if not any(key in columns for key in data_file_keys):
        problems.append(f"no file column: none of {_quoted(data_file_keys)} (dataset.data_file_keys) is a column")
    missing = [key for key in data_file_keys if key not in columns and key not in DEFAULT_DATA_FILE_KEYS]
    for column in dict.fromkeys([*missing, *(column for column in required_columns if column not in columns)]):
        near = get_close_matches(column.lower(), [name.lower() for name in columns], n=1)
        hint = next((f"; did you mean '{name}'?" for name in columns if near and name.lower() == near[0]), "")
        problems.append(f"no column '{column}'{hint}")
    if not problems:
        return
    if table.column_hint:
        problems.append(table.column_hint)
    raise DataError(f"{table.name}: " + "\n  ".join([*problems, f"columns present: {_quoted(columns)}"]))


def _check_cells(table: RawTable, rows: Sequence[Row], file_columns: Sequence[str]) -> list[str]:
    """Return what is wrong with the file cells' text; decodes the JSON arrays of CSV cells in place."""
    problems = []
    main_columns = [column for column in file_columns if column in DEFAULT_DATA_FILE_KEYS] or list(file_columns)
    for index, row in enumerate(rows):
        num_files = 0
        for column in file_columns:
            value = row[column]
            num_files += bool(value) and column in main_columns
            # The quick way for what nearly every cell is: this loop runs a million times.
            if isinstance(value, str) and value.rpartition(".")[2] in MEDIA_EXTENSIONS:
                continue
            if isinstance(value, str) and table.has_text_cells and value[:1] == "[" and value[-1:] == "]":
                try:
                    row[column] = value = json.loads(value)
                except (ValueError, RecursionError) as error:
                    reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                    problem = f"is not a JSON array of files ({reason}): {value[:80]}"
                    problems.append(f"{table.where(index)}: '{column}' {problem}")
                    continue
            problems += (f"{table.where(index)}: '{column}' {problem}" for problem in _file_problems(value))
        if not num_files:
            names = _quoted(main_columns)
            problems.append(f"{table.where(index)}: no file, {names} is empty; fill in or remove the row")
    return problems


def _check_prompts(table: RawTable, rows: Sequence[Row]) -> Iterator[str]:
    """Yield what is no caption: a list of them would be trained on with its brackets and quotes."""
    for index, row in enumerate(rows):
        value = row[PROMPT_COLUMN]
        if isinstance(value, str):
            if not value.isascii() and _has_half_characters(value):
                yield f"{table.where(index)}: '{PROMPT_COLUMN}' has half a character (a lone surrogate): {ascii(value)[:80]}"
        elif isinstance(value, bool) or not isinstance(value, int | float):
            yield f"{table.where(index)}: '{PROMPT_COLUMN}' must be text, got {json.dumps(value, default=str)[:80]}"


def _has_half_characters(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _file_problems(value: Value) -> Iterator[str]:
    if not isinstance(value, str | list) or not all(isinstance(path, str) and path for path in _cell_files(value)):
        yield f"must be a path or a list of paths, got {json.dumps(value, default=str)[:80]}"
        return
    for path in _cell_files(value):
        if not _has_media_extension(path):
            yield f"has an unknown extension: {path}; known are {', '.join(sorted(MEDIA_EXTENSIONS))}"


def _has_media_extension(path: str) -> bool:
    # Most paths are like x.png; only the others need the careful look.
    return path.rpartition(".")[2] in MEDIA_EXTENSIONS or media_extension(path) in MEDIA_EXTENSIONS


def _check_files(table: RawTable, rows: Sequence[Row], file_columns: Sequence[str], base: str) -> list[str]:
    """Return the files that do not exist, each at its first row."""
    first_use: dict[str, tuple[int, str]] = {}
    for index, row in enumerate(rows):
        for column in file_columns:
            for path in _cell_files(row[column]):
                # Other cells have been complained about already.
                if isinstance(path, str) and _has_media_extension(path) and not is_url(path):
                    first_use.setdefault(path, (index, column))
    stamps = read_stamps([join(base, path) for path in first_use])
    missing = [path for path in first_use if stamps[join(base, path)] is None]
    problems = []
    for path in missing:
        index, column = first_use[path]
        problems.append(f"{table.where(index)}: '{column}' no such file: {join(base, path)}")
    if len(missing) == len(first_use) > 0:
        place = f"dataset.base_path ({base or 'not set'})"
        problems.insert(0, f"none of the {len(first_use)} files exists; is {place} the right directory?")
    return problems


def _read_folder(base: str, data_file_keys: Sequence[str], notes: list[str]) -> RawTable:
    """List the images and videos of a directory and its subdirectories, with same-named .txt files as prompts."""
    if not base:
        raise DataError("dataset.metadata_path and dataset.base_path are both unset; set one of them")
    names = list_files(base)
    captions = {name for name in names if name.endswith(".txt")}
    rows: list[dict[str, Any]] = []
    for name in names:
        extension = media_extension(name)
        column = "image" if extension in STATIC_IMAGE_EXTENSIONS else "video"
        if extension in MEDIA_EXTENSIONS and column in data_file_keys:
            caption = os.path.splitext(name)[0] + ".txt"
            rows.append({column: name, "prompt": join(base, caption) if caption in captions else ""})
    num_captions = _read_captions(rows)
    metadata = next((name for name in METADATA_NAMES if name in names), None)
    if metadata and not num_captions:
        place = join(base, metadata)
        raise DataError(f"dataset.metadata_path is not set, but {base} has a {metadata}; set it to {place}")
    if not rows:
        raise DataError(
            f"dataset.base_path: {base} has no images or videos ({', '.join(sorted(MEDIA_EXTENSIONS))}), "
            "and dataset.metadata_path is not set; set it to the dataset's .csv, .json, .jsonl or .parquet file"
        )
    notes.append(
        f"dataset.metadata_path is not set: trains on the {len(rows)} images and videos found in {base}, "
        f"{num_captions} with a caption (a .txt file of the same name), {len(rows) - num_captions} with an empty prompt"
    )
    columns = [column for column in (*DEFAULT_DATA_FILE_KEYS, "prompt") if any(column in row for row in rows)]
    return RawTable(name=base, columns=columns, rows=rows)


def _read_captions(rows: list[dict[str, Any]]) -> int:
    """Put the captions in place of their files' paths; returns how many there are."""
    captioned = [row for row in rows if row["prompt"]]

    def read(path: str) -> str | DataError:
        try:
            return read_bytes(path).decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            return DataError(f"{path}: not UTF-8 at byte {error.start}; save the caption as UTF-8")
        except OSError as error:
            return DataError(f"{path}: cannot be read: {error}")

    with ThreadPoolExecutor(_NUM_CAPTION_THREADS) as pool:
        for row, caption in zip(captioned, pool.map(read, [row["prompt"] for row in captioned]), strict=True):
            if isinstance(caption, DataError):
                raise caption
            row["prompt"] = caption
    return len(captioned)


def _cell_files(value: Value) -> list[Any]:
    if isinstance(value, list):
        return value
    return [value] if value != "" else []


def _digest(columns: Sequence[str], rows: Sequence[Row]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(sorted(columns)).encode())
    for first in range(0, len(rows), _ROWS_PER_DIGEST):
        # Sorted keys: CSV and JSON may name the same columns in another order.
        digest.update(json.dumps(rows[first : first + _ROWS_PER_DIGEST], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
