"""`dsray data check`: every file of a dataset decoded, in parallel, and what was found.

As a Ray job: `python -m diffsynth_ray.launch.data_check --job job.json`; the last line of its log is the report.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import ray

from diffsynth_ray.config.resolve import ResolvedJob
from diffsynth_ray.data.batches import MicroBatch
from diffsynth_ray.data.samples import SampleIndex, build_sample_index
from diffsynth_ray.data.stream import load_index
from diffsynth_ray.errors import DataError, DsrayError, ExitCode
from diffsynth_ray.launch.driver import join_cluster, local_ray
from diffsynth_ray.launch.stages import sample_rule

REPORT_MARK = "dsray data check: "
"""Begins the log line that holds the report as JSON, or the error that ended the check."""

_ROWS_PER_TASK = 16
_PROGRESS_S = 2.0
_MOST_LISTED = 1000

Say = Callable[[str], None]


@dataclass(frozen=True)
class CheckReport:
    """What a check found."""

    num_rows: int
    num_bad: int
    bad_sample: str
    bad_sample_limit: float
    causes: dict[str, int]
    """Bad rows by cause, the most frequent first."""
    bad: list[dict[str, Any]]
    """Row (from 1), file and cause of each, at most a thousand."""
    buckets: list[dict[str, int]]
    """Height, width, frames and rows that can be used of each target size, the largest first."""
    seconds: float

    @property
    def exit_code(self) -> ExitCode:
        """Done where a run of the job would not be ended by these data."""
        allowed = self.bad_sample_limit * self.num_rows if self.bad_sample == "skip" else 0
        return ExitCode.DONE if self.num_bad <= allowed else ExitCode.USAGE

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self) | {"exit_code": int(self.exit_code)}

    def lines(self) -> list[str]:
        """For people."""
        speed = self.num_rows / max(self.seconds, 1e-3)
        lines = [f"{self.num_rows} rows decoded in {self.seconds:.1f} s ({speed:.1f} rows/s), {self.num_bad} bad"]
        lines += [f"  {count:>7} x {cause}" for cause, count in self.causes.items()]
        lines += [f"  row {one['row']}: {one['cause']}" for one in self.bad]
        if self.num_bad > len(self.bad):
            lines.append(f"  ... and {self.num_bad - len(self.bad)} more")
        lines.append("size (height x width x frames) and rows that can be used")
        lines += [f"  {b['height']:>5} x {b['width']} x {b['num_frames']}: {b['rows']}" for b in self.buckets]
        if self.num_bad:
            verdict = "go on without them" if self.exit_code == ExitCode.DONE else "be ended by them"
            setting = f'bad_sample = "{self.bad_sample}", bad_sample_limit = {self.bad_sample_limit:g}'
            lines.append(f"a run of this job would {verdict} ({setting})")
        return lines


def report_of(content: dict[str, Any]) -> CheckReport:
    """The report that `as_dict` gave."""
    return CheckReport(**{name: content[name] for name in CheckReport.__dataclass_fields__})


def check_data(resolved: ResolvedJob, say: Say) -> CheckReport:
    """Check on the Ray that this process is connected to; raises DataError for metadata that cannot be used at all."""
    started = time.monotonic()
    # Whatever is wrong with a file is a finding here, and no reason to stop looking at the others; rows that are held out are
    # looked at like all others.
    tolerant = resolved.with_keys(dataset={"bad_sample": "skip", "bad_sample_limit": 1.0}, validation={"holdout": None})
    index = build_sample_index(tolerant, say, rule=sample_rule(tolerant.job))
    problems = _decode_all(index, say)
    bad = [{"row": row + 1, "file": index.path(row), "cause": cause} for row, cause in sorted(problems.items())[:_MOST_LISTED]]
    causes = Counter(_kind(cause, index.path(row)) for row, cause in problems.items())
    return CheckReport(
        num_rows=len(index.metadata),
        num_bad=len(problems),
        bad_sample=resolved.job.dataset.bad_sample,
        bad_sample_limit=resolved.job.dataset.bad_sample_limit,
        causes=dict(causes.most_common()),
        bad=bad,
        buckets=_usable(index, problems),
        seconds=round(time.monotonic() - started, 2),
    )


def _usable(index: SampleIndex, problems: Collection[int]) -> list[dict[str, int]]:
    """Target sizes with their rows, without bad ones: those that cannot be opened have borrowed the size of another."""
    counted = [
        {
            "height": bucket.height,
            "width": bucket.width,
            "num_frames": bucket.num_frames,
            "rows": sum(row not in problems for row in bucket.rows.tolist()),
        }
        for bucket in sorted(index.order.buckets, key=lambda bucket: -bucket.tokens)
    ]
    return [bucket for bucket in counted if bucket["rows"]]


def _kind(cause: str, path: str) -> str:
    """The cause without what differs from file to file."""
    return re.sub(r"\d+", "N", cause.replace(path, "FILE")).removeprefix("FILE: ")


@ray.remote(num_cpus=1, max_retries=3, scheduling_strategy="SPREAD")
def _problems_of(reference: list[ray.ObjectRef], micro_batches: list[MicroBatch]) -> dict[int, str]:
    # The reference is in a list, so that Ray does not read the whole index back for every task.
    index = load_index(reference[0])
    found = {}
    for micro in micro_batches:
        cause = index.problem(micro)
        if cause is not None:
            found[micro.rows[0]] = cause
    return found


def _decode_all(index: SampleIndex, say: Say) -> dict[int, str]:
    """Cause by row. As many tasks are under way as there are CPUs, and as many wait: memory does not grow with the rows."""
    reference = [ray.put(index)]
    most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    tasks = _tasks(index)
    running: dict[ray.ObjectRef, list[MicroBatch]] = {}
    problems: dict[int, str] = {}
    num_done, told, num_rows = 0, time.monotonic(), len(index.metadata)
    say(f"decoding {num_rows} rows")
    while True:
        while len(running) < most and (waiting := next(tasks, None)):
            running[_problems_of.remote(reference, waiting)] = waiting
        if not running:
            return problems
        done, _ = ray.wait(list(running), timeout=_PROGRESS_S)
        for task in done:
            micro_batches = running.pop(task)
            try:
                problems |= ray.get(task)
            except ray.exceptions.WorkerCrashedError:
                # One of them ends the process that decodes it: each alone shows which.
                if len(micro_batches) > 1:
                    tasks = chain(tasks, ([micro] for micro in micro_batches))
                    continue
                row = micro_batches[0].rows[0]
                problems[row] = f"{index.path(row)}: decoding it crashes the process"
            num_done += len(micro_batches)
        if time.monotonic() - told > _PROGRESS_S:
            told = time.monotonic()
            say(f"decoded {num_done} of {num_rows} rows, {len(problems)} bad")


def _tasks(index: SampleIndex) -> Iterator[list[MicroBatch]]:
    for number, bucket in enumerate(index.order.buckets):
        for first in range(0, len(bucket.rows), _ROWS_PER_TASK):
            rows = bucket.rows[first : first + _ROWS_PER_TASK].tolist()
            yield [MicroBatch(number, bucket.height, bucket.width, bucket.num_frames, (row,), (0,)) for row in rows]


def check_locally(resolved: ResolvedJob, *, say: Say) -> CheckReport:
    """Check on a Ray of this process."""
    with local_ray(say):
        return check_data(resolved, say)


def main(arguments: list[str]) -> int:
    """Entry point of the Ray job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=Path, required=True)
    resolved = ResolvedJob.model_validate_json(parser.parse_args(arguments).job.read_text())
    join_cluster()
    try:
        report = check_data(resolved, _say_stdout)
    except DsrayError as error:
        _say_stdout(REPORT_MARK + json.dumps({"error": error.message, "hint": error.hint}))
        return error.exit_code
    _say_stdout(REPORT_MARK + json.dumps(report.as_dict()))
    return ExitCode.DONE


def parse_report(line: str) -> CheckReport | None:
    """The report of a log line, None for another line. Raises DataError where the check ended with an error."""
    if not line.startswith(REPORT_MARK):
        return None
    content = json.loads(line.removeprefix(REPORT_MARK))
    if "error" in content:
        raise DataError(content["error"], hint=content["hint"])
    return report_of(content)


def _say_stdout(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
