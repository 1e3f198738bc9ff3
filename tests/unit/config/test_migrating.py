from pathlib import Path

from diffsynth_ray.config.flags import KEY_OF_FLAG, WITHOUT_COUNTERPART
from diffsynth_ray.config.migrating import build_page

PAGE = Path(__file__).parents[3] / "jobs" / "MIGRATING.md"


def test_the_page_is_up_to_date() -> None:
    message = "stale; run python -m diffsynth_ray.config.migrating > jobs/MIGRATING.md"
    assert PAGE.read_text() == build_page(), message


def test_every_flag_has_a_row_with_its_key_or_reason() -> None:
    rows = {line.split("`")[1]: line for line in build_page().splitlines() if line.startswith("| `--")}
    for flag, key in KEY_OF_FLAG.items():
        assert f"{key.rpartition('.')[2]}" in rows[f"--{flag}"]
    for flag, reason in WITHOUT_COUNTERPART.items():
        assert reason in rows[f"--{flag}"]
    assert "[lora] rank" in rows["--lora_rank"]
    assert "[model] options = { zero_cond_t = ... }" in rows["--zero_cond_t"]
