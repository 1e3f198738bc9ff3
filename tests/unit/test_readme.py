"""What the README says of commands, codes, files and keys is what there is."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from diffsynth_ray.cli.app import app
from diffsynth_ray.config.schema import Job
from diffsynth_ray.errors import ExitCode

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "jobs").glob("*.md"))]


def section(title: str) -> str:
    """Text under a heading, to the next heading."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_every_command_is_listed_and_nothing_else() -> None:
    row_heads = [line.split("|")[1] for line in section("Commands").splitlines() if line.startswith("| `")]
    listed = {word for head in row_heads for word in re.findall(r"`dsray ([a-z-]+)", head)}
    command = typer.main.get_command(app)
    assert listed | {"import-cache"} == set(command.commands)  # type: ignore[attr-defined]
    assert "`dsray import-cache`" in section("Commands")


def test_the_exit_codes_are_the_programs() -> None:
    rows = re.findall(r"^\| (\d+) \|", section("Commands"), flags=re.MULTILINE)
    assert [int(code) for code in rows] == sorted(ExitCode)


def test_the_modules_of_the_architecture_stand_where_it_puts_them() -> None:
    block = blocks(section("Architecture"), "")[0]
    folder = ROOT / "diffsynth_ray"
    seen = 0
    for line in block.splitlines()[1:]:
        if found := re.match(r"  ([a-z_]+)/ ", line):
            folder = ROOT / "diffsynth_ray" / found[1]
        elif re.match(r"  [a-z_]+\.py ", line):
            folder = ROOT / "diffsynth_ray"
        for name in re.findall(r"\b[a-z0-9_]+\.py\b", line):
            assert (folder / name).is_file(), f"{name} is not in {folder.name}"
            seen += 1
    assert seen > 60


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = set(re.findall(r"\b(?:tests|jobs|cluster|diffsynth_ray)/[\w/]+\.\w+", text))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_keys_that_are_shown_are_taken() -> None:
    shown = blocks(README, "toml")
    assert len(shown) >= 2
    for text in shown:
        for name, values in tomllib.loads(text).items():
            Job.model_fields[name].annotation.model_validate(values)  # type: ignore[union-attr]
    keys = re.findall(r"`\[?([a-z]+)\]?[. ]([a-z0-9_]+)( = [^`]*)?`", README)
    sections = {name: field.annotation for name, field in Job.model_fields.items() if hasattr(field.annotation, "model_fields")}
    unknown = [f"{name}.{key}" for name, key, _ in keys if name in sections and key not in sections[name].model_fields]
    assert unknown == []


def test_the_quickstart_plans_as_shown(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "diffsynth_ray.cli.app", "plan", str(ROOT / "jobs" / "quickstart.toml")]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "DSRAY_STATE_DIR": str(tmp_path)}
    plan = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    shown = blocks(section("Start"), "")[1].splitlines()
    for word in ("run", "samples", "batch", "steps", "validate", "files"):
        line = next(line for line in shown if line.startswith(f"{word} "))
        assert line in plan.splitlines()
