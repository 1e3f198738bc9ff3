"""How the teacher of a direct distillation drew each sample, from the metadata."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from diffsynth_ray.config.distillation import REQUIRED_COLUMNS
from diffsynth_ray.data.metadata import Metadata, Value
from diffsynth_ray.errors import DataError, listed

RAND_DEVICES = ("cpu", "cuda")
MAX_STEPS = 1000


@dataclass(frozen=True)
class TeacherRun:
    """One sample's start and number of steps."""

    seed: int
    num_inference_steps: int
    rand_device: str = "cpu"
    """Where its noise was drawn: the generators of CPU and GPU give other numbers."""


def read_teacher_run(values: Mapping[str, Value]) -> TeacherRun:
    """From a row's cells (text or numbers); raises DataError."""
    seed, steps = (_whole_number(name, values.get(name, "")) for name in REQUIRED_COLUMNS)
    device = str(values.get("rand_device", "") or "cpu")
    if not 1 <= steps <= MAX_STEPS:
        raise DataError(f"num_inference_steps: got {steps}, allowed are 1 to {MAX_STEPS}")
    if not 0 <= seed < 2**63:
        raise DataError(f"seed: got {seed}, allowed are 0 to 2^63 - 1")
    if device not in RAND_DEVICES:
        raise DataError(f"rand_device: got {device!r}, allowed are {', '.join(RAND_DEVICES)}")
    return TeacherRun(seed, steps, device)


def longest_run(metadata: Metadata) -> TeacherRun:
    """The row that costs most: every step of inference is computed through."""
    return max((read_teacher_run(row) for row in metadata.rows), key=lambda run: run.num_inference_steps)


def _whole_number(name: str, value: Value) -> int:
    text = str(value)
    with suppress(ValueError):
        return int(text)
    with suppress(ValueError):
        number = float(text)  # a spreadsheet's 4.0
        if number.is_integer():
            return int(number)
    raise DataError(f"{name}: got {value!r}, wanted a whole number")


def check_teacher_runs(metadata: Metadata) -> None:
    """Raise one DataError with every row that does not say how its picture was drawn."""
    if missing := [name for name in REQUIRED_COLUMNS if name not in metadata.columns]:
        raise DataError(
            f"direct distillation: the metadata have no column {', '.join(missing)}; they have {', '.join(metadata.columns)}"
        )
    problems = []
    for number, row in enumerate(metadata.rows, start=1):
        try:
            read_teacher_run(row)
        except DataError as error:
            problems.append(f"row {number}, {error.message}")
    if problems:
        raise DataError("\n  ".join(["direct distillation:", *listed(problems)]))
