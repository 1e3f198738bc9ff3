"""Train the small VAE of the tiny Qwen-Image, so that the quickstart ends with pictures and not with noise.

    nice -n 10 python tests/bench/train_tiny_vae.py --minutes 40 --out diffsynth_ray/models/tiny/qwen_image/vae

`AutoencoderKLQwenImage` with base_dim 8, trained on crops of the five photographs of jobs/data/photos, on one CPU thread:
first on crops of 32x32 pixels, for many updates, then on pictures of 64x64. The latents get noise of a tenth of their spread
before they are decoded, so that latents near each other decode to pictures near each other; only the posterior's mode is used
by the project, and its variance is not trained. Writes config.json, with mean and standard deviation of the latents of the
photographs, and bf16 weights. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

PHOTOS = Path(__file__).parents[2] / "jobs" / "data" / "photos"
SIDE, CROP, BATCH = 64, 32, 8
CROP_SHARE = 0.55
"""Of the time, spent on crops."""
PEAK_LR, LATENT_NOISE = 1e-3, 0.05
WARMUP_STEPS = 100


def convolve_one_frame(layer: QwenImageCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """The layer's result for x [b, c, 1, h, w], three times as fast: before the first frame there are zeros only, so that the
    last slice of the kernel alone counts."""
    padding = (layer._padding[2], layer._padding[0])
    return F.conv2d(x[:, :, 0], layer.weight[:, :, -1], layer.bias, layer.stride[1:], padding)[:, :, None]


def read_squares() -> list[Image.Image]:
    """The photographs' centre squares."""
    squares = []
    for path in sorted(PHOTOS.glob("*.jpg")):
        photo = Image.open(path).convert("RGB")
        side = min(photo.size)
        left, top = (photo.width - side) // 2, (photo.height - side) // 2
        squares.append(photo.crop((left, top, left + side, top + side)))
    return squares


def to_tensor(picture: Image.Image) -> Tensor:
    """[3, h, w] in -1..1."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def draw_batch(squares: list[Image.Image], side: int, rng: np.random.Generator) -> Tensor:
    """[BATCH, 3, 1, side, side]: random parts of the photographs, some mirrored, brighter or darker; every fourth as it is."""
    pictures = []
    for number in range(BATCH):
        square = squares[rng.integers(len(squares))]
        scale = 1.0 if number % 4 == 0 else rng.uniform(0.5, 1.0)
        shown = int(square.width * scale)
        left, top = (int(rng.integers(square.width - shown + 1)) for _ in range(2))
        resized = square.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (left, top, left + shown, top + shown))
        x, y = (int(rng.integers(SIDE - side + 1)) for _ in range(2))
        picture = to_tensor(resized.crop((x, y, x + side, y + side)))
        if number % 4:
            picture = picture.flip(-1) if rng.random() < 0.5 else picture
            picture = (picture * rng.uniform(0.8, 1.15) + rng.uniform(-0.1, 0.1)).clamp(-1, 1)
        pictures.append(picture)
    return torch.stack(pictures)[:, :, None]


def train(vae: AutoencoderKLQwenImage, squares: list[Image.Image], *, seconds: float) -> tuple[int, float]:
    """(updates, last error) after `seconds`."""
    rng = np.random.default_rng(0)
    QwenImageCausalConv3d.forward = convolve_one_frame
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=1e-4)
    started, step, error = time.monotonic(), 0, math.inf
    while (done := (time.monotonic() - started) / seconds) < 1:
        pixels = draw_batch(squares, CROP if done < CROP_SHARE else SIDE, rng)
        lr = PEAK_LR * min(1, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = lr
        latents = vae.encode(pixels).latent_dist.mode()
        spread = latents.detach().std(dim=(0, 2, 3, 4), keepdim=True)
        difference = vae.decode(latents + LATENT_NOISE * spread * torch.randn_like(latents)).sample - pixels
        loss = difference.square().mean() + 0.2 * difference.abs().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            error = float(difference.detach().square().mean())
            print(f"{done:5.1%} step {step} error {error:.4f} lr {lr:.1e}", flush=True)
    return step, error


@torch.no_grad()
def write(vae: AutoencoderKLQwenImage, squares: list[Image.Image], out: Path) -> dict[str, float]:
    """Weights and configuration; returns the error of the photographs through the rounded weights."""
    state = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in vae.state_dict().items()}
    vae.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    pixels = torch.stack([to_tensor(square.resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for square in squares])[:, :, None]
    latents = vae.encode(pixels).latent_dist.mode()
    error = (vae.decode(latents).sample.clamp(-1, 1) - pixels).square().mean()
    channels = latents.transpose(0, 1).flatten(1)
    config = {"_class_name": "AutoencoderKLQwenImage", "base_dim": 8, "z_dim": 16}
    config |= {"latents_mean": channels.mean(1).tolist(), "latents_std": channels.std(1).tolist()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(state, out / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return {"mse": float(error), "psnr_db": -10 * math.log10(float(error) / 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    squares = read_squares()
    original = QwenImageCausalConv3d.forward
    vae = AutoencoderKLQwenImage(base_dim=8, z_dim=16)
    steps, _ = train(vae, squares, seconds=arguments.minutes * 60)
    QwenImageCausalConv3d.forward = original
    figures = write(vae, squares, arguments.out)
    print(json.dumps({"steps": steps, "minutes": arguments.minutes, "device": "cpu, 1 thread", **figures}))


if __name__ == "__main__":
    main()
