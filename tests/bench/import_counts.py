"""How many launch scripts `dsray import` reads, how many of their jobs this version takes, and why not the others.

    python tests/bench/import_counts.py tests/assets/scripts          # those that we wrote
    python tests/bench/import_counts.py DiffSynth-Studio/examples     # a checkout of theirs

Run it in the folder in which the scripts are run: that is where accelerate's configurations are looked for. Prints
Markdown.
"""

import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

from diffsynth_ray.errors import DsrayError
from diffsynth_ray.migrate.acceptance import find_refusals
from diffsynth_ray.migrate.job_file import write_job_file
from diffsynth_ray.migrate.read import read_migration


def reasons_of(script: Path) -> tuple[int, list[str]]:
    """Number of jobs of a script, and what stands against them; without the details, so that they can be counted."""
    try:
        migration = read_migration(script, environment={})
    except DsrayError as error:
        problems = getattr(error, "problems", None)
        return 0, [str(each) for each in problems] if problems else [error.message.partition(": ")[2]]
    reasons = [problem.message for problem in migration.refused]
    for draft in migration.drafts:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "job.toml"
            path.write_text(write_job_file(draft, name=None, source=str(script), script_notes=migration.notes))
            reasons += [str(problem) for problem in find_refusals(path, draft)]
    return len(migration.drafts), reasons


def shortened(reason: str) -> str:
    """A reason without what differs from script to script, and without its cure."""
    reason = re.sub(r"^line \d+: ", "", reason)
    reason = re.sub(r"( in this file): put both commands.*", r"\1", reason)
    reason = re.sub(r"got .*?; (.*): not in this version.*", r"\1 is not built", reason)
    return re.sub(r"trains on '.*?',", "trains on a cache,", reason)[:150]


def count(scripts: list[Path]) -> tuple[int, int, int, Counter[str]]:
    """Scripts read, their jobs, scripts of which every job is taken, and reasons with the number of their scripts."""
    jobs = taken = 0
    reasons: Counter[str] = Counter()
    for script in scripts:
        number, against = reasons_of(script)
        jobs += number
        taken += not against
        reasons.update({shortened(reason) for reason in against})
    return len(scripts), jobs, taken, reasons


def table(scripts: list[Path]) -> str:
    """The counts in Markdown."""
    read, jobs, taken, reasons = count(scripts)
    lines = ["| launch scripts | |", "| --- | --- |", f"| read | {read} |", f"| jobs made of them | {jobs} |"]
    lines += [f"| planned: every job is accepted | {taken} |"]
    lines += [
        f"| refused: {reason} | {number} |" for reason, number in sorted(reasons.items(), key=lambda each: (-each[1], each[0]))
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sorted(Path(sys.argv[1]).glob("**/model_training/**/*.sh")) or sorted(Path(sys.argv[1]).rglob("*.sh"))))
