"""The count of scripts read, planned and refused by reason (tests/bench/import_counts.py prints it as a table)."""

import importlib.util
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]
SCRIPTS = sorted((TESTS / "assets" / "scripts").glob("*.sh"))

# Scripts that no version takes, with their reason; all others wait for a later version at most.
NEVER = {
    "bad_values": "number is needed",
    "flux2_template": "family flux2 is not built",
    "ltx2_audio": "family ltx2 is not built",
    "orphans": "a command that is not in this file",
    "two_pairs": "family minimax_h3 is not built",
    "z_image_imitation": "trajectory_imitation",
}
LATER = (
    "not in this version", "family wan is not built", "family flux is not built", "family z_image is not built",
    "model.paths: required", "model.extra_inputs: family", "model.options: family",
)  # fmt: skip


@pytest.fixture(scope="module")
def import_counts():
    spec = importlib.util.spec_from_file_location("import_counts", TESTS / "bench" / "import_counts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_refused_for_its_reason_only(import_counts, script):
    _, reasons = import_counts.reasons_of(script)
    if script.stem in NEVER:
        assert any(NEVER[script.stem] in reason for reason in reasons), reasons
    else:
        assert [reason for reason in reasons if not any(later in reason for later in LATER)] == []


def test_the_table_counts_every_script(import_counts):
    read, jobs, taken, reasons = import_counts.count(SCRIPTS)
    assert read == len(SCRIPTS) > 20
    assert jobs >= read - 4
    assert taken <= read - len(NEVER)
    text = import_counts.table(SCRIPTS)
    assert f"| read | {read} |" in text
    assert sum(number for reason, number in reasons.items() if "family ltx2" in reason) == 1
