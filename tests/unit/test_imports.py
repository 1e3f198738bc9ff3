"""What the processes of a run import beyond the libraries that they cannot do without.

Each file is milliseconds on slow storage, in every process and before the first step. Libraries are imported first, so that
what they pull in by themselves, which differs from machine to machine, does not count.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COUNT = """
import json, sys
{libraries}
before = set(sys.modules)
{ours}
print(json.dumps(sorted(set(sys.modules) - before)))
"""
LIBRARIES = """
import ray.train.torch, ray.data, ray.util.metrics, peft, transformers
from diffusers import {classes}
from torch.utils.tensorboard import SummaryWriter
"""
TRAINING = """
import diffsynth_ray.launch.spare, diffsynth_ray.launch.stages, diffsynth_ray.train.worker
import torch
from tiny_trainer import build_job, build_trainer, micro, train
from diffsynth_ray.config.schema import LoggingSection
from diffsynth_ray.run_dir import RunDir
from diffsynth_ray.train.figures import FigureWriter
train(build_trainer(build_job()), [micro([0])], steps=1)
figures = FigureWriter(RunDir(Path(sys.argv[1])), LoggingSection(), start_step=0, say=print)
figures.write(1, {"loss": 1.0})
figures.close()
"""
ENCODING = """
import diffsynth_ray.train.encode, torch
from diffsynth_ray.models.family import get_family
family = get_family("qwen_image").build_tiny(0, components=["text_encoder", "vae"])
family.encode_text(["a cat"])
family.encode_image(torch.zeros(1, 1, 32, 32, 3, dtype=torch.uint8))
"""
MODELS = "AutoencoderKLQwenImage, QwenImageTransformer2DModel"


def added(libraries, ours, *arguments):
    """Modules that our part imports after the libraries."""
    program = COUNT.format(libraries=libraries, ours=f"from pathlib import Path\n{ours}")
    path = f"{ROOT}:{ROOT / 'tests' / 'support'}"
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": path}, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("libraries", "ours", "most_own", "most_others"),
    [
        pytest.param(
            "import ray", "import diffsynth_ray.launch.board, diffsynth_ray.launch.queue", 10, 5, id="queue and board"
        ),
        pytest.param("import ray", "import diffsynth_ray.launch.driver", 55, 200, id="driver"),
        pytest.param("import ray.data", "import diffsynth_ray.data.stream", 30, 80, id="decoding task"),
        pytest.param(LIBRARIES.format(classes=MODELS), TRAINING, 110, 60, id="training worker"),
        pytest.param(LIBRARIES.format(classes=MODELS), ENCODING, 80, 60, id="encoder"),
    ],
)
def test_processes_import_little_beside_the_libraries_that_they_need(tmp_path, libraries, ours, most_own, most_others):
    found = added(libraries, ours, str(tmp_path))
    own = [name for name in found if name.startswith("diffsynth_ray")]
    others = [name for name in found if not name.startswith("diffsynth_ray")]
    print(len(own), len(others), others)
    assert 0 < len(own) <= most_own, own
    assert len(others) <= most_others, others
    packages = {name.partition(".")[0] for name in others} | {name for name in others if name.count(".") == 1}
    heavy = {"tensorflow", "torchvision", "sklearn", "scipy", "matplotlib", "datasets", "deepspeed", "cv2", "wandb", "rich"}
    assert not packages & (heavy | {"diffusers.pipelines", "ray.tune", "ray.rllib", "torch._inductor", "torch.onnx"})


def test_tensorboard_does_without_tensorflow(tmp_path):
    """Where it is installed it takes seconds, and memory of the GPU."""
    (tmp_path / "tensorflow.py").write_text("raise AssertionError('TensorFlow was imported')\n")
    program = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from diffsynth_ray.config.schema import LoggingSection
from diffsynth_ray.run_dir import RunDir
from diffsynth_ray.train.figures import FigureWriter
figures = FigureWriter(RunDir(Path(sys.argv[1])), LoggingSection(), start_step=0, say=print)
figures.write(1, {"loss": 1.0})
figures.close()
"""
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "tensorboard").iterdir())
