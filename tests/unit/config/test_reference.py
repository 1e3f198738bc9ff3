from pathlib import Path

from diffsynth_ray.config import schema
from diffsynth_ray.config.reference import build_reference

PAGE = Path(__file__).parents[3] / "jobs" / "REFERENCE.md"


def test_the_page_is_up_to_date() -> None:
    message = "stale; run python -m diffsynth_ray.config.reference > jobs/REFERENCE.md"
    assert PAGE.read_text() == build_reference(), message


def test_every_key_has_a_row_with_a_meaning() -> None:
    rows = [line for line in build_reference().splitlines() if line.startswith("| `")]
    assert len(rows) == len(schema.keys())
    for row in rows:
        assert row.rstrip("| ").count(" | ") >= 4, row
        assert row.split(" | ")[-1].strip(" |"), row


def test_bounds_and_choices_are_shown() -> None:
    page = build_reference()
    assert "| `max_pixels` | whole number, >= 256, <= 268435456 | `1048576` | R |" in page
    assert '| `precision` | `"bf16"`, `"fp32"` | `"bf16"` | R |' in page
    assert "| `learning_rate` | number, > 0 | `0.0001` | R |" in page
