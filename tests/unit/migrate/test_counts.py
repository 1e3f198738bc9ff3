"""The count of scripts read, planned and refused by reason (tests/bench/import_counts.py prints it as a table)."""

import importlib.util
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]
SCRIPTS = sorted((TESTS / "assets" / "scripts").glob("*.sh"))

REFUSED = {
    "bad_values": "number is needed",
    "flux2_template": "flux2 does not know template_inputs",
    "ltx2_audio": "family ltx2 is not built",
    "orphans": "a command that is not in this file",
    "two_pairs": "family minimax_h3 is not built",
    "z_image_imitation": "trajectory_imitation",
}
"""Scripts of which not every job is taken, with the reason."""


@pytest.fixture(scope="module")
def import_counts():
    spec = importlib.util.spec_from_file_location("import_counts", TESTS / "bench" / "import_counts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_refused_for_its_reason_only(import_counts, script):
    _, reasons = import_counts.reasons_of(script)
    if script.stem in REFUSED:
        assert any(REFUSED[script.stem] in reason for reason in reasons), reasons
    else:
        assert reasons == []


def test_the_readme_shows_this_table(import_counts):
    """Of the scripts of tests/assets/scripts, as it is printed."""
    head, *rows = import_counts.table(SCRIPTS).splitlines()
    lines = (TESTS.parent / "README.md").read_text().splitlines()
    if head in lines:
        place = lines.index(head) + 1
        assert lines[place : place + len(rows) + 1] == [*rows, ""]


def test_the_table_counts_every_script(import_counts):
    read, jobs, taken, reasons = import_counts.count(SCRIPTS)
    assert read == len(SCRIPTS) > 20
    assert jobs >= read - 4
    assert taken == read - len(REFUSED)
    text = import_counts.table(SCRIPTS)
    assert f"| read | {read} |" in text
    assert sum(number for reason, number in reasons.items() if "family ltx2" in reason) == 1
