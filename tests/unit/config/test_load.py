from pathlib import Path

import pytest

from diffsynth_ray.config.load import find_job_file, load_job, recipe_names, recipes_dir
from diffsynth_ray.config.schema import lookup
from diffsynth_ray.errors import ExitCode, JobFileError

GOOD = """
[dataset]
base_path = "photos"
[model]
family = "qwen_image"
tiny = true
[lora]
base_model = "dit"
"""


def write(folder: Path, text: str, name: str = "my_job.toml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


LACKING = {"dataset.base_path", "training.trainable_models", "model.paths"}
"""What a text lacks that is no whole job."""


def problems_of(folder: Path, text: str, *overrides: str) -> dict[str, str]:
    with pytest.raises(JobFileError) as caught:
        load_job(write(folder, text), list(overrides))
    assert caught.value.exit_code == ExitCode.USAGE
    return {problem.key: problem.message for problem in caught.value.problems}


def test_a_job_gets_its_files_name_and_the_defaults(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, GOOD))
    assert job.name == "my_job"
    assert (job.training.learning_rate, job.lora.rank, job.dataset.max_pixels) == (1e-4, 32, 1048576)
    assert job.dataset.data_file_keys == ["image", "video"]


def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "bom.toml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_job(str(path)).name == "bom"


@pytest.mark.parametrize(
    ("text", "key", "suggestion"),
    [
        ("[training]\nlearning_rat = 1e-4\n", "training.learning_rat", "training.learning_rate"),
        ("[dataset]\nlora_rank = 8\n", "dataset.lora_rank", "lora.rank"),
        ("[training]\nmax_pixels = 512\n", "training.max_pixels", "dataset.max_pixels"),
        ("learning_rate = 1e-4\n", "learning_rate", "training.learning_rate"),
        ("[trainig]\nnum_epochs = 2\n", "trainig", "[training]"),
    ],
)
def test_an_unknown_key_comes_with_a_suggestion(tmp_path: Path, text: str, key: str, suggestion: str) -> None:
    message = problems_of(tmp_path, text)[key]
    assert "unknown key" in message
    assert f"did you mean {suggestion}?" in message


def test_an_unknown_key_without_a_neighbour_lists_the_section(tmp_path: Path) -> None:
    message = problems_of(tmp_path, "[lora]\nxyzzy = 1\n")["lora.xyzzy"]
    assert "[lora] has base_model, target_modules, rank" in message


def test_a_wrong_type_says_what_was_got(tmp_path: Path) -> None:
    message = problems_of(tmp_path, '[dataset]\nbatch_size = "many"\n')["dataset.batch_size"]
    assert message.startswith('got "many"; ')
    assert "integer" in message


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[training]\nlearning_rate = 0\n", "training.learning_rate"),
        ("[dataset]\nrepeat = 0\n", "dataset.repeat"),
        ("[dataset]\nheight = 8\n", "dataset.height"),
        ("[lora]\nrank = 1.5\n", "lora.rank"),
        ('[training]\nprecision = "fp16"\n', "training.precision"),
        ('[output]\nformats = ["onnx"]\n', "output.formats"),
        ('name = "has spaces"\n', "name"),
        ('dataset = "photos"\n', "dataset"),
        ("seed = -1\n", "seed"),
        ("[dataset]\nwidth = 1000000000000000\nheight = 64\n", "dataset.width"),
        ("[dataset]\nrepeat = 9223372036854775808\n", "dataset.repeat"),
        ("[training]\nwarmup_steps = 10000000000000000000000000\n", "training.warmup_steps"),
        ("[distributed]\nnum_workers = [1, 10000000000000000000000000]\n", "distributed.num_workers"),
        ("[distributed]\npriority = -10000000000000000000000000\n", "distributed.priority"),
        ("[training]\noptimizer_args = {betas = [0.9, {x = 10000000000000000000000000}]}\n", "training.optimizer_args"),
        ("[offload]\ncpu_offload = true\nvram_budget_gib = 1e308\n", "offload.vram_budget_gib"),
        ("[distributed]\ntimeout_s = 1e300\n", "distributed.timeout_s"),
    ],
)
def test_a_value_out_of_bounds_names_its_key(tmp_path: Path, text: str, key: str) -> None:
    assert set(problems_of(tmp_path, text)) - LACKING == {key}


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    text = '[dataset]\nrepeat = -1\nbatchsize = 2\n[lora]\nrank = "big"\n[nonsense]\nx = 1\n'
    assert set(problems_of(tmp_path, text)) == {"dataset.repeat", "dataset.batchsize", "lora.rank", "nonsense", *LACKING}


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("[lora]\nrnk = 1\n", {"lora.rnk", *LACKING}),
        # What only follows from a problem that is told is none of its own.
        ('[dataset]\nbase_pth = "x"\n', {"dataset.base_pth", *LACKING} - {"dataset.base_path"}),
        ('[trainig]\ntrainable_models = ["dit"]\n', {"trainig", *LACKING} - {"training.trainable_models"}),
        ("[lora]\nbase_model = 1\n", {"lora.base_model", *LACKING} - {"training.trainable_models"}),
        ("[dataset]\nheight = 64\nwidth = 1\n", {"dataset.width", *LACKING}),
        ('dataset = "photos"\n', {"dataset", *LACKING} - {"dataset.base_path"}),
        ("[split]\nenabled = 1\n[dataset]\nheight = 64\n", {"split.enabled", "dataset.height", *LACKING}),
    ],
)
def test_broken_rules_come_with_wrong_values(tmp_path: Path, text: str, keys: set[str]) -> None:
    assert set(problems_of(tmp_path, text)) == keys


def test_broken_rules_come_with_wrong_overrides(tmp_path: Path) -> None:
    text = GOOD + "[offload]\noptimize_on_cpu = true\n"
    assert set(problems_of(tmp_path, text, "lora")) == {"--set lora", "offload.optimize_on_cpu"}


def test_a_key_in_place_of_a_section(tmp_path: Path) -> None:
    assert problems_of(tmp_path, "dataset = 1\n")["dataset"] == "got 1; it is a section: [dataset], and its keys below"


@pytest.mark.parametrize(
    "text", [f"x = {'[' * 5000}{']' * 5000}", f"seed{'.a' * 5000} = 1", f"model.options.x{'.a' * 5000} = 1"]
)
def test_a_file_that_is_nested_too_deep_is_no_bug_of_dsray(tmp_path: Path, text: str) -> None:
    message = problems_of(tmp_path, text)[""]
    assert "nested more than 50 deep" in message or "not valid TOML: maximum recursion depth" in message


def test_an_override_that_is_nested_too_deep_is_no_bug_of_dsray(tmp_path: Path) -> None:
    assert "lora.rank" in problems_of(tmp_path, GOOD, f"lora.rank={'[' * 5000}")


def test_an_override_of_two_keys_drops_none(tmp_path: Path) -> None:
    (message,) = problems_of(tmp_path, GOOD, "lora.rank=4\nalpha=8").values()
    assert message == "sets alpha too; give each key a --set of its own"


def test_a_union_makes_one_problem(tmp_path: Path) -> None:
    with pytest.raises(JobFileError) as caught:
        load_job(write(tmp_path, GOOD + "[distributed]\nnum_workers = [1, 2, 3]\n"), ["model.paths=[1]"])
    assert sorted(problem.key for problem in caught.value.problems) == ["distributed.num_workers", "model.paths"]


def test_the_message_lists_the_file_and_every_problem(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match=r"my_job.toml: 2 problems\n  dataset.repeat: .*\n  lora.rank: ") as caught:
        load_job(write(tmp_path, GOOD + "rank = 0\n"), ["dataset.repeat=0"])
    assert "0" in caught.value.message


def test_text_that_is_no_toml(tmp_path: Path) -> None:
    assert "not valid TOML" in problems_of(tmp_path, "[dataset\n")[""]


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("training.learning_rate=2e-5", "training.learning_rate", 2e-5),
        ("dataset.base_path=other/photos", "dataset.base_path", "other/photos"),
        ('lora.target_modules=["to_q", "to_k"]', "lora.target_modules", ["to_q", "to_k"]),
        ("name=other", "name", "other"),
        ("gradient.checkpointing=false", "gradient.checkpointing", False),
        ("output.path=/a=b", "output.path", "/a=b"),
        ("training.optimizer_args.eps=1e-6", "training.optimizer_args", {"eps": 1e-6}),
    ],
)
def test_set_overrides_a_key(tmp_path: Path, override: str, key: str, value: object) -> None:
    assert lookup(load_job(write(tmp_path, GOOD), [override]), key) == value


def test_the_last_override_wins(tmp_path: Path) -> None:
    assert load_job(write(tmp_path, GOOD), ["lora.rank=4", "lora.rank=8"]).lora.rank == 8


def test_numbers_of_thousands_of_digits_are_no_bug_of_dsray(tmp_path: Path) -> None:
    digits = "1" * 5000
    assert "not valid TOML: Exceeds the limit" in problems_of(tmp_path, f"seed = {digits}\n")[""]
    assert problems_of(tmp_path, GOOD, f"seed={digits}")["seed"].endswith("...; input should be a valid integer")


@pytest.mark.parametrize("override", ["lora.rank", "=3", "lora.=3", "lora.base_model.x=1"])
def test_an_override_that_is_none(tmp_path: Path, override: str) -> None:
    assert f"--set {override}" in problems_of(tmp_path, GOOD, override)


def test_problems_of_overrides_and_file_come_together(tmp_path: Path) -> None:
    assert set(problems_of(tmp_path, GOOD + "rank = 0\n", "lora")) == {"lora.rank", "--set lora"}


def test_a_recipe_is_found_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_job_file("quickstart") == recipes_dir() / "quickstart.toml"
    job = load_job("quickstart")
    assert job.dataset.base_path is not None
    assert Path(job.dataset.base_path, "metadata.csv").is_file()
    assert Path(str(job.validation.holdout)).is_file()
    assert "quickstart" in recipe_names()


def test_a_users_file_goes_before_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, GOOD, "quickstart.toml")
    assert load_job("quickstart.toml").dataset.base_path == "photos"


def test_a_missing_file_suggests_a_recipe() -> None:
    with pytest.raises(JobFileError, match=r"no such file.*did you mean the recipe quickstart\?"):
        load_job("quikstart")


@pytest.mark.parametrize("name", ["my job", "训练", "-x", "a" * 64])
def test_a_files_name_that_cannot_be_the_jobs_is_told_as_such(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.toml"
    path.write_text('[dataset]\nrepeat = "训"\n')
    with pytest.raises(JobFileError) as caught:
        load_job(str(path))
    assert f"name: the file's name {name!r} cannot be the job's; set name = ..." in caught.value.message
    assert 'dataset.repeat: got "训"' in caught.value.message
    path.write_text('name = "other"')
    assert load_job(str(path)).name == "other"


def test_a_key_that_is_like_no_other_lists_those_of_its_section(tmp_path: Path) -> None:
    with pytest.raises(JobFileError) as caught:
        load_job(write(tmp_path, GOOD + "[training]\nfoo = 1\nlerning_rate = 1\n"))
    assert "training.foo: unknown key; [training] has learning_rate, num_epochs" in caught.value.message
    assert "training.lerning_rate: unknown key; did you mean training.learning_rate?" in caught.value.message
