"""Sample pictures between steps: files, the contact sheet, failures, and the same picture elsewhere."""

import json
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_trainer import build_job, build_trainer, micro, train

from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.config.validation import sample_size
from diffsynth_ray.data.samples import SampleRule
from diffsynth_ray.models.family import get_family
from diffsynth_ray.models.sampling import SampleRequest
from diffsynth_ray.run_dir import RunDir
from diffsynth_ray.train.export import export_weights
from diffsynth_ray.train.group import Group
from diffsynth_ray.train.pictures import Samples, build_sheet, thinned
from diffsynth_ray.train.sampler import Errand, run_errand
from diffsynth_ray.train.video import write_video

torch.set_num_threads(1)
PROMPTS = ["a cat", "a rocket"]


def request_for(prompt="a cat", **changes):
    values = {"height": 32, "width": 48, "num_frames": 1, "num_inference_steps": 2, "guidance_scale": 4.0, "seed": 0}
    return SampleRequest(prompt=prompt, **(values | changes))


def build_samples(tmp_path, trainer, **changes):
    said, shown = [], {}
    arguments = {
        "run_dir": RunDir(tmp_path),
        "rule": SampleRule(),
        "group": Group(1),
        "rank": 0,
        "world_size": 1,
        "enter": lambda what: None,
        "say": said.append,
        "show": lambda step, samples: shown.update({step: [f"{one.number + 1} {one.prompt}" for one in samples]}),
        "may_write": lambda: True,
    }
    return Samples(trainer.job, trainer, **(arguments | changes)), said, shown


def sampling_job(**keys):
    return build_job(validation={"prompts": PROMPTS, "size": [32, 48], "num_inference_steps": 2} | keys)


def test_files_and_sheet(tmp_path):
    trainer = build_trainer(sampling_job())
    samples, said, shown = build_samples(tmp_path, trainer)
    samples.make(0)
    train(trainer, [micro([0, 1])], steps=2)
    samples.make(2)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    assert files == {
        "samples/contact_sheet.png",
        *(f"samples/step-{step}/step-{step}-{number}.png" for step in (0, 2) for number in (0, 1)),
    }
    pictures = {step: np.array(Image.open(tmp_path / f"samples/step-{step}/step-{step}-0.png")) for step in (0, 2)}
    assert pictures[0].shape == (32, 48, 3)
    assert (pictures[0] != pictures[2]).any(), "the weights have changed"
    assert shown == {0: ["1 a cat", "2 a rocket"], 2: ["1 a cat", "2 a rocket"]}
    assert said[-1].startswith("2 samples of step 2 in ")
    before = (tmp_path / "samples/step-2/step-2-0.png").read_bytes()
    samples.make(2)
    assert (tmp_path / "samples/step-2/step-2-0.png").read_bytes() == before


def test_samples_change_nothing():
    plain, sampled = build_trainer(build_job()), build_trainer(build_job())
    state = torch.random.get_rng_state()
    sampled.family.sample(request_for())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert train(plain, [micro([0, 1])]) == train(sampled, [micro([0, 1])])


def test_a_failing_sample_is_told_and_the_others_are_made(tmp_path, monkeypatch):
    trainer = build_trainer(sampling_job())
    samples, said, shown = build_samples(tmp_path, trainer)
    original = type(trainer.family).sample

    def sample(self, request):
        if "rocket" in request.prompt:
            raise torch.OutOfMemoryError("no room\nfor a rocket")
        return original(self, request)

    monkeypatch.setattr(type(trainer.family), "sample", sample)
    samples.make(4)
    assert "sample 2 of step 4 ('a rocket') failed, training goes on: OutOfMemoryError: no room" in said[0]
    assert shown == {4: ["1 a cat"]}
    monkeypatch.setattr(type(trainer.family), "sample", lambda self, request: 1 / 0)
    samples.make(6)
    assert shown == {4: ["1 a cat"]}
    assert "ZeroDivisionError" in said[-1]


def test_prompts_are_dealt_to_the_workers(tmp_path):
    trainer = build_trainer(sampling_job())
    for rank in (1, 0):
        build_samples(tmp_path, trainer, rank=rank, world_size=2)[0].make(0)
    assert len(list((tmp_path / "samples/step-0").glob("*.png"))) == 2


def test_an_older_attempt_writes_nothing(tmp_path):
    samples, said, _ = build_samples(tmp_path, build_trainer(sampling_job()), may_write=lambda: False)
    samples.make(0)
    assert not list(tmp_path.rglob("*.png"))
    assert "a newer attempt" in said[0]


class SpareHere:
    """Room beside the training, in this process: the errand is run when it is let go."""

    def __init__(self):
        self.is_free, self.is_done, self.errand, self.given_up, self.raises = True, False, None, 0, None
        self.has_begun = True

    def has_room(self):
        return self.is_free

    def start(self, errand):
        if isinstance(self.raises, Exception):
            raise self.raises
        self.errand = errand

    def result(self):
        if not self.is_done:
            return None
        return self.raises or list(run_errand(self.errand))

    def give_up(self):
        self.given_up += 1


def resolved_job(tmp_path, photos, **sections):
    path = tmp_path / "job.toml"
    prompts = ", ".join(f'"{prompt}"' for prompt in PROMPTS)
    base = {
        "dataset": f'base_path = "{photos}"',
        "model": 'family = "qwen_image"\ntiny = true',
        "lora": 'base_model = "dit"\nrank = 4',
        "training": 'precision = "fp32"\nlearning_rate = 1e-2',
        "validation": f"prompts = [{prompts}]\nsize = [32, 48]\nnum_inference_steps = 2",
        "output": f'path = "{tmp_path}/out"',
    }
    path.write_text("\n".join(f"[{name}]\n{keys}" for name, keys in (base | sections).items()))
    return resolve(load_job(str(path)), Resources(cpus=4, gpus=0))


def samples_with_room(resolved, **changes):
    """(trainer, samples, the room, what was said, what was shown) of a run in its folder."""
    run_dir = RunDir(resolved.output_path)
    attempt = run_dir.begin_attempt(resolved, "test")
    writer = run_dir.claim_writer(attempt.token)
    trainer, spare = build_trainer(resolved.job), SpareHere()

    def errand(step, path):
        return Errand(step, resolved.model_dump_json(), SampleRule(), path, attempt.token, writer, torch.get_num_threads())

    arguments = {"run_dir": run_dir, "spare": spare, "errand": errand} | changes
    samples, said, shown = build_samples(resolved.output_path, trainer, **arguments)
    return trainer, samples, spare, said, shown


TRAINED = {
    "a LoRA": {},
    "in bf16": {"training": 'precision = "bf16"\nlearning_rate = 1e-2'},
    "in full": {"lora": "rank = 4", "training": 'precision = "fp32"\ntrainable_models = ["dit", "text_encoder"]'},
}


@pytest.mark.parametrize("what", TRAINED)
def test_another_process_makes_the_same_pictures_while_the_training_goes_on(tmp_path, photos, what):
    resolved = resolved_job(tmp_path, photos, **TRAINED[what])
    trainer, samples, spare, said, shown = samples_with_room(resolved)
    train(trainer, [micro([0, 1])], steps=2)
    spare.is_free = False
    samples.make(2)
    folder = resolved.output_path / "samples/step-2"
    expected = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert len(expected) == 2
    shutil.rmtree(folder)

    spare.is_free = True
    samples.make(2)
    assert not folder.exists()
    assert said[-1] == "samples of step 2 are made on spare resources of the cluster, training goes on"
    train(trainer, [micro([0, 1])], steps=2)
    samples.take_late()
    assert not folder.exists()
    spare.is_done = True
    samples.take_late()
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == expected
    assert said[-1].startswith("2 samples of step 2 in ")
    assert shown == {2: ["1 a cat", "2 a rocket"]}
    assert (folder.parent / "contact_sheet.png").exists()
    assert {path.name for path in folder.parent.iterdir()} == {"contact_sheet.png", "step-2"}, "no weights are left"


def test_one_errand_at_a_time_and_the_last_samples_are_made_by_the_workers(tmp_path, photos):
    trainer, samples, spare, said, shown = samples_with_room(resolved_job(tmp_path, photos))

    def make(step, **options):
        trainer.step = step
        samples.make(step, **options)

    make(0)
    make(1)
    assert list(shown) == [1]
    spare.is_done = True
    make(2)
    assert sorted(shown) == [0, 1]
    assert sum("on spare resources" in line for line in said) == 2
    make(3, is_last=True)
    assert sorted(shown) == [0, 1, 2, 3], "what was finished elsewhere is shown first"
    with Image.open(tmp_path / "out/samples/contact_sheet.png") as sheet:
        assert sheet.width == 150 + 4 * (192 + 6), "a column a step, whichever came last"


def test_late_samples_are_waited_for(tmp_path, photos, monkeypatch):
    _, samples, spare, said, shown = samples_with_room(resolved_job(tmp_path, photos))
    samples.finish(timeout_s=200)
    assert said == []
    samples.make(0)
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: setattr(spare, "is_done", True))
    monkeypatch.setattr("diffsynth_ray.train.pictures.time", clock)
    samples.finish(timeout_s=200)
    assert said[1] == "waiting for the samples of step 0, which are still being made"
    assert list(shown) == [0]


@pytest.mark.parametrize("has_begun", [True, False])
def test_an_errand_that_hangs_or_never_begins_is_given_up(tmp_path, photos, monkeypatch, has_begun):
    _, samples, spare, said, _ = samples_with_room(resolved_job(tmp_path, photos))
    monkeypatch.setattr("diffsynth_ray.train.pictures._WAIT_S", 0.01)
    monkeypatch.setattr("diffsynth_ray.train.pictures._BEGIN_S", 0.05)
    spare.has_begun = has_begun
    samples.make(0)
    samples.finish(timeout_s=0.2 if has_begun else 1e9)
    why = "not made 0.2 s" if has_begun else "not even begun, for want of room, 0.05 s"
    assert said[-1] == f"warning: samples of step 0 given up: {why} after the training's end"
    assert spare.given_up == 1
    assert list((tmp_path / "out/samples").iterdir()) == []


def test_an_errand_that_fails_is_told(tmp_path, photos):
    _, samples, spare, said, shown = samples_with_room(resolved_job(tmp_path, photos))
    samples.make(0)
    spare.raises, spare.is_done = "WorkerCrashedError: killed", True
    samples.take_late()
    assert sum("of step 0" in line and "failed, training goes on: WorkerCrashedError: killed" in line for line in said) == 2
    assert shown == {}
    spare.is_done = False
    samples.make(1)
    made_before = tmp_path / "out/samples/step-1/step-1-1.png"
    made_before.parent.mkdir()
    Image.new("RGB", (48, 32)).save(made_before)
    spare.is_done = True
    samples.take_late()
    assert shown == {1: ["2 a rocket"]}, "what was made before it ended"
    spare.raises = RuntimeError("no room any more")
    samples.make(2)
    assert any("could not be sent to spare resources: no room any more" in line for line in said)
    assert sorted(shown) == [1, 2], "the workers make them"
    assert not list((tmp_path / "out/samples").glob(".weights*"))


@pytest.mark.parametrize("offload", ["true", "false"])
def test_many_trained_weights_and_offloaded_ones_stay_where_they_are(tmp_path, photos, monkeypatch, offload):
    if offload == "false":
        monkeypatch.setattr("diffsynth_ray.train.pictures._MOST_WEIGHT_BYTES", 1000)
    resolved = resolved_job(tmp_path, photos, offload=f"cpu_offload = {offload}")
    _, samples, spare, _, shown = samples_with_room(resolved)
    samples.make(0)
    assert (spare.errand, list(shown)) == (None, [0])


def test_an_errand_of_workers_that_were_replaced_writes_nothing(tmp_path, photos):
    resolved = resolved_job(tmp_path, photos)
    _, samples, spare, said, shown = samples_with_room(resolved)
    samples.make(0)
    run_dir = RunDir(resolved.output_path)
    token = json.loads(run_dir.attempt_path.read_text())["token"]
    run_dir.claim_writer(token)
    spare.is_done = True
    samples.take_late()
    assert sum("a newer attempt writes now" in line for line in said) == 2
    assert shown == {}


def test_what_a_lost_worker_had_sent_is_told(tmp_path, photos):
    _, samples, *_ = samples_with_room(resolved_job(tmp_path, photos))
    samples.make(0)
    _, samples, _, said, _ = samples_with_room(resolved_job(tmp_path, photos))
    samples.start()
    assert said == ["warning: the samples of step 0 were not finished when their worker was lost"]
    assert list((tmp_path / "out/samples").iterdir()) == []


def test_the_sheet_has_a_row_a_prompt_and_a_column_a_step():
    red, blue = Image.new("RGB", (64, 32), "red"), Image.new("RGB", (64, 32), "blue")
    sheet = build_sheet(["one", "a long prompt that does not fit into one line"], {0: {0: red, 1: red}, 10: {0: blue}})
    tile = 192 + 6
    assert sheet.size == (150 + 2 * tile, 20 + 2 * (96 + 6))
    assert sheet.getpixel((150 + 50, 60)) == (255, 0, 0)
    assert sheet.getpixel((150 + tile + 50, 60)) == (0, 0, 255)
    assert sheet.getpixel((150 + tile + 50, 160)) == (255, 255, 255), "missing"
    assert thinned(list(range(100)))[0] == 0
    assert thinned(list(range(100)))[-1] == 99
    assert len(thinned(list(range(100)))) == 12


def test_a_clip_is_a_video(tmp_path):
    frames = np.zeros((5, 32, 64, 3), dtype=np.uint8)
    frames[:, :, :, 0] = 200
    write_video(tmp_path / "clip.mp4", frames, fps=16)
    from diffsynth_ray.data.media import decode, read_info

    info = read_info(str(tmp_path / "clip.mp4"))
    assert (info.width, info.height, info.num_frames) == (64, 32, 5)
    back = decode(str(tmp_path / "clip.mp4"), height=32, width=64, num_frames=5, frame_rate=None)
    assert abs(back.astype(int) - frames).max() < 8
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen_image", "wan", "z_image"])
def test_every_family_makes_the_same_picture_again(name):
    family = get_family(name).build_tiny(0, dtype=torch.float32)
    asked = request_for(num_frames=5 if name == "wan" else 1)
    first = family.sample(asked)
    assert first.shape == (asked.num_frames, 32, 48, 3)
    assert first.std() > 1
    assert (first == family.sample(asked)).all()
    assert (first != family.sample(request_for(num_frames=asked.num_frames, seed=1))).any()
    assert (first != family.sample(request_for("coffee", num_frames=asked.num_frames))).any()


@pytest.mark.parametrize("name", ["qwen_image", "flux", "flux2", "z_image", "wan"])
def test_eight_bit_weights_make_pictures_too(name):
    from diffsynth_ray.memory.fp8 import convert_to_fp8

    family = get_family(name).build_tiny(0, dtype=torch.bfloat16)
    convert_to_fp8(family.repeated_blocks("dit"))
    assert family.sample(request_for(num_inference_steps=1)).shape == (1, 32, 48, 3)


@pytest.mark.filterwarnings("error:invalid value encountered in cast")
@pytest.mark.parametrize("name", ["flux", "flux2", "qwen_image", "wan", "z_image"])
def test_a_picture_in_one_step_is_no_nan(name):
    """As after a direct distillation to one step."""
    made = get_family(name).build_tiny(0, dtype=torch.float32).sample(request_for(num_inference_steps=1))
    assert made.std() > 0


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen_image", "wan", "z_image"])
def test_weights_in_another_place_than_where_they_are_computed_with(name, monkeypatch):
    """As under layer offload, where the components' parameters are on the host between their calls."""
    from diffusers import ModelMixin

    family = get_family(name).build_tiny(0, dtype=torch.float32)
    expected = family.sample(request_for(num_inference_steps=2))
    monkeypatch.setattr(ModelMixin, "device", property(lambda self: torch.device("meta")))
    assert (family.sample(request_for(num_inference_steps=2)) == expected).all()
    assert not any(hasattr(module, "_hf_hook") for module in family.components.values())


def test_clips_from_a_first_frame():
    family = get_family("wan").build_tiny(0, dtype=torch.float32, extra_inputs=["input_image"])
    made = [family.sample(request_for(num_frames=5, inputs=(Image.new("RGB", (48, 32), color),))) for color in ("red", "blue")]
    assert made[0].shape == (5, 32, 48, 3)
    assert (made[0] != made[1]).any()


def test_plain_diffusers_makes_the_same_picture_from_the_exported_lora(tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from diffsynth_ray.models import qwen_image_configs as configs

    job = build_job(output={"formats": ["diffusers"]}, training={"learning_rate": 0.05})
    trainer = build_trainer(job)
    base = get_family("qwen_image").build_tiny(0, dtype=torch.float32)
    train(trainer, [micro([0, 1])], steps=4)
    ours = trainer.family.sample(request_for())
    export_weights(trainer.family, job, masters=trainer.strategy.full_masters(), output_dir=tmp_path, stem="lora")

    transformer = QwenImageTransformer2DModel(**configs.TINY["dit"])
    transformer.load_state_dict(base.component("dit").state_dict())
    text_encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**configs.TINY["text_encoder"]))
    text_encoder.load_state_dict(base.component("text_encoder").state_dict(), strict=False)
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**configs.SCHEDULER),
        vae=base.component("vae"),
        text_encoder=text_encoder.eval(),
        tokenizer=base.tokenizers["tokenizer_path"],
        transformer=transformer.eval(),
    )
    arguments = {"negative_prompt": " ", "height": 32, "width": 48, "num_inference_steps": 2, "true_cfg_scale": 4.0}
    pictures = []
    for with_lora in (False, True):
        if with_lora:
            pipeline.load_lora_weights(str(tmp_path / "diffusers" / "lora.safetensors"))
        picture = pipeline("a cat", generator=torch.Generator().manual_seed(0), **arguments).images[0]
        pictures.append(np.array(picture).astype(int))
    assert abs(pictures[1] - ours[0]).max() <= 1, "rounding"
    assert abs(pictures[0] - ours[0]).max() > 10, "the LoRA is what makes the difference"


def test_the_size_of_samples():
    assert sample_size(build_job(dataset={"max_pixels": 4096}), multiple=16) == (64, 64)
    assert sample_size(build_job(dataset={"height": 100, "width": 50}), multiple=16) == (96, 48)
    assert sample_size(build_job(validation={"size": [32, 48]}), multiple=16) == (32, 48)


@pytest.mark.parametrize("offload", [{"cpu_offload": True}, {"cpu_offload": True, "optimize_on_cpu": True}])
def test_offloaded_weights_make_the_same_picture_and_loss(offload):
    plain, offloaded = build_trainer(build_job()), build_trainer(build_job(offload=offload))
    losses = []
    for trainer in (plain, offloaded):
        losses.append(train(trainer, [micro([0, 1])], steps=1))
        batch = trainer.encode(micro([2]).batch)
        losses[-1].append(trainer.evaluate(batch, torch.ones_like(batch.latents), torch.tensor([500])).item())
        trainer.residency.begin()
        losses[-1].append(trainer.family.sample(request_for()).tolist())
        losses[-1] += train(trainer, [micro([0, 1])], steps=2)
    assert losses[0] == losses[1]
