import pytest

from diffsynth_ray.config.schema import Job
from diffsynth_ray.schedule import Schedule, build_schedule, export_file_names, trained_components


def build(samples: int, batch: int, *, epochs: int = 1, max_steps: int | None = None, save: int | None = None) -> Schedule:
    return Schedule(samples, batch, num_epochs=epochs, max_steps=max_steps, save_steps=save)


@pytest.mark.parametrize(
    ("samples", "batch", "epochs", "max_steps", "per_epoch", "steps"),
    [
        (80, 2, 1, None, 40, 40),
        (81, 2, 1, None, 41, 41),
        (5, 8, 3, None, 1, 3),
        (10, 4, 2, None, 3, 6),  # the short last step of an epoch is a step
        (10, 4, 2, 5, 3, 5),
        (10, 4, 2, 100, 3, 100),  # max_steps wins, also when it is more
        (1, 1, 1, None, 1, 1),
    ],
)
def test_number_of_steps(samples: int, batch: int, epochs: int, max_steps: int | None, per_epoch: int, steps: int) -> None:
    schedule = build(samples, batch, epochs=epochs, max_steps=max_steps)
    assert (schedule.steps_per_epoch, schedule.num_steps) == (per_epoch, steps)


@pytest.mark.parametrize(
    ("schedule", "stems"),
    [
        (build(10, 1, save=4), ["step-4", "step-8", "step-10"]),
        (build(8, 1, save=4), ["step-4", "step-8"]),
        (build(3, 1, save=100), ["step-3"]),
        (build(4, 2, epochs=3), ["epoch-0", "epoch-1", "epoch-2"]),
        (build(4, 2, epochs=3, max_steps=5), ["epoch-0", "epoch-1", "epoch-2"]),  # the last one is cut short
        (build(4, 2, max_steps=1), ["epoch-0"]),
        (build(4, 2, epochs=2, save=1), ["step-1", "step-2", "step-3", "step-4"]),
    ],
)
def test_exports(schedule: Schedule, stems: list[str]) -> None:
    assert list(schedule.export_stems()) == stems


@pytest.mark.parametrize("save", [None, 1, 3, 7])
@pytest.mark.parametrize("max_steps", [None, 1, 7, 50])
def test_the_list_of_exports_is_what_the_training_loop_writes(save: int | None, max_steps: int | None) -> None:
    schedule = build(10, 3, epochs=5, max_steps=max_steps, save=save)
    walked = [schedule.export_stem(step) for step in range(1, schedule.num_steps + 1)]
    assert list(schedule.export_stems()) == [stem for stem in walked if stem is not None]
    assert walked[-1] is not None  # a run never ends without an export


def test_no_walk_through_every_step() -> None:
    assert len(list(build(10**9, 1, epochs=10**6).export_stems())) == 10**6


def job(*, lora: str | None = None, full: list[str] | None = None) -> Job:
    return Job.model_validate(
        {
            "name": "job",
            "lora": {"base_model": lora},
            "training": {"trainable_models": full or [], "num_epochs": 3, "max_steps": 9},
            "output": {"save_steps": 2},
        }
    )


def test_a_schedule_is_made_of_the_jobs_keys() -> None:
    assert build_schedule(job(lora="dit"), num_samples=10, global_batch_size=4) == Schedule(10, 4, 3, 9, 2)


@pytest.mark.parametrize(
    ("lora", "full", "names"),
    [
        ("dit", [], {"dit": "step-2.safetensors"}),
        (None, ["dit"], {"dit": "step-2.safetensors"}),
        ("text_encoder", ["dit"], {"text_encoder": "step-2.safetensors", "dit": "step-2.dit.safetensors"}),
        (None, ["vae", "dit"], {"dit": "step-2.safetensors", "vae": "step-2.vae.safetensors"}),
        (
            None,
            ["vae", "text_encoder"],
            {"vae": "step-2.safetensors", "text_encoder": "step-2.text_encoder.safetensors"},
        ),
    ],
)
def test_export_names(lora: str | None, full: list[str], names: dict[str, str]) -> None:
    """The LoRA's, else dit's, else the first component's export has the plain name."""
    assert export_file_names(job(lora=lora, full=full), "step-2") == names
    assert trained_components(job(lora=lora, full=full)) == list(names)


def test_a_run_that_ends_early_names_its_last_export() -> None:
    assert Schedule(40, 4, 3, None, 8).last_stem(13) == "step-13"
    assert Schedule(40, 4, 3, None, None).last_stem(13) == "epoch-1"
