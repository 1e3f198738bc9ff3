"""Sizes of media files from their headers, read once and kept in an index file.

The index lies beside the metadata (`metadata.csv.sizes`; `dsray.sizes` in a folder without metadata), or in the run's output
where that place is remote or not writable. An entry holds for one content: path, bytes and time of change (or the server's
ETag). The file is one line with a digest of the rest, then an Arrow table; a file that does not fit its digest counts as
absent. It is written whole, so that jobs that read the same data at once cannot harm each other: at worst one reads again
what another has read.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from diffsynth_ray.data.media import MediaInfo, read_info
from diffsynth_ray.data.storage import Stamp, is_remote, local_or_remote, read_stamps
from diffsynth_ray.errors import DataError
from diffsynth_ray.run_dir import write_whole

Entries = dict[str, tuple[Stamp, MediaInfo]]

_MAGIC = b"dsray sizes 1 "
_PROGRESS_S = 2.0
_FILES_PER_TASK = 32


def index_places(base_path: str, metadata_path: str | None, output_path: Path) -> list[Path]:
    """Where the index may be, the preferred place first."""
    beside = f"{local_or_remote(metadata_path)}.sizes" if metadata_path else f"{base_path}/dsray.sizes"
    fallback = output_path / "dsray.sizes"
    return [fallback] if is_remote(beside) else [Path(beside), fallback]


def read_media_infos(
    paths: Sequence[str], *, places: Sequence[Path], say: Callable[[str], None]
) -> dict[str, MediaInfo | DataError]:
    """What the header of every file says, or why it cannot be read; from the index where the file has not changed."""
    stamps = read_stamps(list(dict.fromkeys(paths)))
    known: Entries = {}
    for place in reversed(places):
        known |= _load(place, say)
    fresh: dict[str, MediaInfo | DataError] = {}
    unread = []
    for path, stamp in stamps.items():
        entry = known.get(path)
        if entry is not None and stamp is not None and stamp.mark and entry[0] == stamp:
            fresh[path] = entry[1]
        else:
            unread.append(path)
    if not unread:
        return fresh
    if len(unread) < len(stamps):
        say(f"the sizes of {len(fresh)} files are known from an earlier run")
    fresh |= _read_headers(unread, say)
    entries = known | {
        path: (stamp, info)
        for path in unread
        if (stamp := stamps[path]) is not None and isinstance(info := fresh[path], MediaInfo)
    }
    _save(entries, places, say)
    return fresh


def _read_headers(paths: Sequence[str], say: Callable[[str], None]) -> dict[str, MediaInfo | DataError]:
    def read(first: int) -> list[MediaInfo | DataError]:
        return [_info_or_error(path) for path in paths[first : first + _FILES_PER_TASK]]

    infos: list[MediaInfo | DataError] = []
    told = time.monotonic()
    say(f"reading the sizes of {len(paths)} files")
    with ThreadPoolExecutor(max_workers=min(32, 4 * (os.cpu_count() or 1))) as pool:
        for part in pool.map(read, range(0, len(paths), _FILES_PER_TASK)):
            infos += part
            if time.monotonic() - told > _PROGRESS_S:
                told = time.monotonic()
                say(f"reading sizes: {len(infos)} of {len(paths)} files")
    return dict(zip(paths, infos, strict=True))


def _info_or_error(path: str) -> MediaInfo | DataError:
    try:
        return read_info(path)
    except DataError as error:
        return error


def _load(place: Path, say: Callable[[str], None]) -> Entries:
    """The entries of an index file; nothing where there is none or where it is damaged."""
    import pyarrow as pa

    try:
        header, _, payload = place.read_bytes().partition(b"\n")
    except OSError:
        return {}
    try:
        if header != _MAGIC + hashlib.blake2b(payload, digest_size=16).hexdigest().encode():
            raise ValueError("it does not fit its digest")
        columns = pa.ipc.open_stream(payload).read_all().to_pydict()
        return {
            path: (Stamp(size, mark), MediaInfo(width, height, num_frames, fps))
            for path, size, mark, width, height, num_frames, fps in zip(
                *(columns[name] for name in ("path", "size", "mark", "width", "height", "num_frames", "fps")), strict=True
            )
        }
    except (ValueError, KeyError, pa.ArrowException) as error:
        say(f"{place} is damaged and not used ({error}); the files are read again")
        return {}


def _save(entries: Mapping[str, tuple[Stamp, MediaInfo]], places: Sequence[Path], say: Callable[[str], None]) -> None:
    """Write the index at the first place that takes it."""
    import pyarrow as pa

    stamps, infos = [entry[0] for entry in entries.values()], [entry[1] for entry in entries.values()]
    table = pa.table(
        {
            "path": pa.array(list(entries), type=pa.string()),
            "size": pa.array([stamp.size for stamp in stamps], type=pa.int64()),
            "mark": pa.array([stamp.mark for stamp in stamps], type=pa.string()),
            "width": pa.array([info.width for info in infos], type=pa.int64()),
            "height": pa.array([info.height for info in infos], type=pa.int64()),
            "num_frames": pa.array([info.num_frames for info in infos], type=pa.int64()),
            "fps": pa.array([info.fps for info in infos], type=pa.float64()),
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    payload = sink.getvalue().to_pybytes()
    content = _MAGIC + hashlib.blake2b(payload, digest_size=16).hexdigest().encode() + b"\n" + payload
    problems = []
    for place in places:
        try:
            if place is places[-1]:  # the run's output, which a first run or `dsray data check` does not find there yet
                place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(place, content)
        except OSError as error:
            problems.append(f"{place.parent} ({error.strerror or error})")
            continue
        if problems:
            say(f"the sizes are kept in {place}: {problems[0]} cannot be written")
        return
    say(f"the sizes are not kept for the next run: {', '.join(problems)} cannot be written")
