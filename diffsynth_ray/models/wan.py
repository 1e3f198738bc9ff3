"""Wan 2.1 and 2.2: text to video, image to video, TI2V-5B, VACE.

diffusers' transformer and VAE, transformers' umt5 and CLIP. Files of the first release and of diffusers' layout.

Shapes: b batch, F frames in pixels, f = (F - 1) / 4 + 1 latent frames, h/w latent height and width (pixels / 8, in TI2V-5B
/ 16), c latent channels (16, in TI2V-5B 48), n text tokens, d = 4096 width of a text embedding.
"""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models import layouts, t5
from diffsynth_ray.models import wan_configs as configs
from diffsynth_ray.models.family import (
    FIRST_FRAME,
    REFERENCE,
    BatchShape,
    EncodedBatch,
    padded,
    register_family,
    stack_conditions,
)
from diffsynth_ray.models.layer_names import LayerNames, tensors_from_memory
from diffsynth_ray.models.layouts import KeyLayout
from diffsynth_ray.models.library_family import InferConfig, LibraryFamily, extra_clip, extra_image, missing_tokenizer
from diffsynth_ray.models.sampling import Frames, SampleRequest, build_pipeline, run_pipeline
from diffsynth_ray.models.wan_names import NAMES, VAE_22
from diffsynth_ray.models.wan_vace import MASK_PIXELS, JoinedTransformer, Vace, controlled, fold_mask, join_control
from diffsynth_ray.models.weights import meta_parameters

TEXT_TOKENS = 512
"""The DiT always attends to this many text tokens; those after the prompt are zeros."""
CLIP_TOKENS = 257
"""Of a picture."""
FRAMES_PER_LATENT = 4
PATCH = 2
"""Latent pixels to a token, each way."""
VACE_CLIP, VACE_MASK, VACE_REFERENCE = "vace_video", "vace_video_mask", "vace_reference_image"
VACE_CONTROL = "vace_control"
"""Condition [b, 96, f, h, w]: what VACE's blocks read."""
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@register_family
class Wan(LibraryFamily):
    """The `wan` family. An A14B model's two experts are two jobs, each with its own DiT and timestep boundary."""

    name = "wan"
    component_names = ("dit", "vace", "text_encoder", "vae", "image_encoder")
    scheduler_table = "wan"
    draws_noise_in_float32 = True
    text_components = ("text_encoder",)
    image_components = ("vae",)
    extra_components = ("vae", "image_encoder")
    optional_components = ("vace", "image_encoder")
    predict_components = ("dit", "vace")
    size_multiple = 16
    clip_step = FRAMES_PER_LATENT
    extra_inputs = layouts.EXTRA_INPUTS["wan"]
    clip_inputs = (VACE_CLIP, VACE_MASK)
    reference_inputs = (VACE_REFERENCE,)
    padded_text_tokens = TEXT_TOKENS
    depth_keys: ClassVar[dict[str, dict[str, str]]] = {
        "dit": {"blocks": "num_layers"},
        "vace": {"vace_blocks": "num_vace_blocks"},
    }
    names: ClassVar[dict[str, LayerNames]] = NAMES
    infer_functions: ClassVar[dict[str, InferConfig]] = configs.INFER
    tokenizer_keys: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = {
        "tokenizer_path": ("text_encoder", ("google/umt5-xxl", "tokenizer"))
    }
    tiny_tokenizers: ClassVar[dict[str, Path]] = {"tokenizer_path": t5.TINY_TOKENIZER}
    default_tokenizers: ClassVar[dict[str, str]] = layouts.DEFAULT_TOKENIZERS["wan"]
    key_layouts: ClassVar[dict[str, KeyLayout]] = layouts.KEY_LAYOUTS["wan"]
    config_names: ClassVar[dict[str, str | tuple[str, ...]]] = {
        "dit": "WanTransformer3DModel",
        "vace": "WanVACETransformer3DModel",
        "text_encoder": "umt5",
        "vae": "AutoencoderKLWan",
        "image_encoder": "clip_vision_model",
    }
    default_lora_targets: ClassVar[dict[str, tuple[str, ...]]] = dict.fromkeys(
        ("dit", "vace"), ("q", "k", "v", "o", "ffn.0", "ffn.2")
    )

    @classmethod
    def tiny_configs(cls, extra_inputs: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Text to video, or with an extra input VACE, or image to video with CLIP: 2 to 4 blocks of width 64."""
        shared = {"text_encoder": configs.TINY_TEXT_ENCODER, "vae": configs.TINY_VAE}
        if not extra_inputs:
            return {"dit": configs.TINY_DIT, **shared}
        if _is_vace(extra_inputs):
            return {"dit": configs.TINY_VACE_DIT, "vace": configs.TINY_VACE, **shared}
        return {"dit": configs.TINY_IMAGE_DIT, **shared, "image_encoder": configs.TINY_IMAGE_ENCODER}

    @classmethod
    def build_component(cls, component: str, config: Mapping[str, Any]) -> nn.Module:
        """See `LibraryFamily.build_component`."""
        with meta_parameters():
            if component == "dit":
                from diffusers import WanTransformer3DModel

                return WanTransformer3DModel.from_config(dict(config))
            if component == "vace":
                return Vace(**cls.component_config("vace", config, {}))
            if component == "vae":
                from diffusers import AutoencoderKLWan

                return AutoencoderKLWan.from_config(dict(config))
            if component == "image_encoder":
                from transformers import CLIPVisionConfig, CLIPVisionModel

                return CLIPVisionModel(CLIPVisionConfig(**config))
            from transformers import UMT5Config, UMT5EncoderModel

            return t5.adapted(UMT5EncoderModel(UMT5Config(**config)))

    @classmethod
    def component_config(cls, component: str, config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """See `LibraryFamily.component_config`. VACE's own part from diffusers' configuration of the whole, too."""
        if component != "vace":
            return super().component_config(component, config, options)
        names = inspect.signature(Vace).parameters
        counted = {"num_vace_blocks": len(config["vace_layers"])} if config.get("vace_layers") else {}
        return {name: value for name, value in {**counted, **config}.items() if name in names}

    @classmethod
    def shallow_config(cls, component: str, config: Mapping[str, Any], depth: int) -> dict[str, Any]:
        """See `LibraryFamily.shallow_config`. VACE's places are those of the whole DiT."""
        return super().shallow_config(component, config, depth) | ({"vace_layers": None} if component == "vace" else {})

    @classmethod
    def load_tokenizer(cls, key: str, path: Path | None) -> Any:
        """umt5's tokenizer, exactly as its tokenizer.json says."""
        if path is None or not (path / "tokenizer.json").is_file():
            raise missing_tokenizer(cls.name, key, path, "umt5-xxl's tokenizer.json (google/umt5-xxl)")
        return t5.load_tokenizer(path)

    @classmethod
    def memory_key(cls, component: str, key: str) -> str | None:
        """See `ModelFamily.memory_key`. Of CLIP's file only the images' half is loaded."""
        if component in ("dit", "vace"):
            key = key.removeprefix("model.diffusion_model.")
        elif component == "text_encoder" and key == t5.SECOND_NAME:
            return t5.EMBEDDING
        elif component == "vae":
            key = key.removeprefix("model.")
        elif component == "image_encoder":
            key = key.removeprefix("model.").removeprefix("vision_model.")
            if key.startswith(("textual.", "log_scale", "visual.head", "embeddings.position_ids")):
                return None
        return super().memory_key(component, key)

    @classmethod
    def memory_tensors(cls, component: str, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """See `ModelFamily.memory_tensors`. The first release's CLIP has its embeddings with axes of size 1."""
        whole = "model.diffusion_model."
        prefix = {"dit": whole, "vace": whole, "vae": "model.", "image_encoder": "model."}.get(component, "")
        tensors = super().memory_tensors(component, key.removeprefix(prefix), tensor)
        if component == "image_encoder" and key.endswith(("visual.cls_embedding", "visual.pos_embedding")):
            return {
                name: value.reshape(value.shape[-1:] if "cls" in key else value.shape[1:]) for name, value in tensors.items()
            }
        return tensors

    @classmethod
    def checkpoint_tensors(cls, component: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `ModelFamily.checkpoint_tensors`. DiffSynth-Studio has VAE and CLIP inside of a `model`."""
        if component == "vae" and any(name.startswith("encoder.down_blocks.0.resnets.") for name in state):
            tensors = tensors_from_memory(VAE_22, state)
        else:
            tensors = super().checkpoint_tensors(component, state)
        if component in ("vae", "image_encoder"):
            return {f"model.{key}": tensor for key, tensor in tensors.items()}
        return tensors

    def encode_text(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt_embeds` [b, n, d], umt5's last hidden state without padding; one prompt at a time."""
        encoder = self.component("text_encoder")
        encoded = []
        for prompt in prompts:
            tokens = self.tokenizers["tokenizer_path"](
                clean_prompt(prompt), max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
            )
            output = encoder(input_ids=tokens.input_ids.to(self.device), attention_mask=tokens.attention_mask.to(self.device))
            encoded.append({"prompt_embeds": output.last_hidden_state.to(self.dtype)})
        return stack_conditions(encoded)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """uint8 [b, F, H, W, 3] -> [b, c, f, h, w]: the posterior's mode, (x - mean) / std per channel."""
        if pixels.ndim != 5 or pixels.shape[-1] != 3:
            raise ModelError(f"wan takes clips, uint8 [b, frames, height, width, 3], got {list(pixels.shape)}")
        self.latents_shape(pixels.shape[2], pixels.shape[3], pixels.shape[1])
        return self._encode_video(_as_floats(pixels.to(self.device)))

    def _encode_video(self, video: Tensor) -> Tensor:
        """[b, 3, F, H, W] in -1..1 -> normalised latents, a clip at a time: memory, and the same numbers in any batch."""
        vae = self.component("vae")
        mean, std = (
            torch.tensor(values, device=self.device, dtype=torch.float32).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        modes = [vae.encode(clip.to(self.dtype)).latent_dist.mode() for clip in video.split(1)]
        return ((torch.cat(modes).float() - mean) / std).to(self.dtype)

    def latents_shape(self, height: int, width: int, num_frames: int = 1) -> tuple[int, ...]:
        """(c, (num_frames - 1) / 4 + 1, height / 8, width / 8), or / 16 in TI2V-5B."""
        channels, factor = (48, 16) if self._is_ti2v() else (16, 8)
        multiple = factor * PATCH
        if height % multiple or width % multiple or min(height, width) < 1:
            raise ModelError(
                f"this Wan takes sides that are multiples of {multiple}, got {width}x{height}; set dataset.height and "
                "dataset.width"
            )
        if num_frames < 1 or num_frames % FRAMES_PER_LATENT != 1:
            raise ModelError(f"wan takes 4n + 1 frames (1, 5, ..., 81), got {num_frames}; set dataset.num_frames")
        return (channels, (num_frames - 1) // FRAMES_PER_LATENT + 1, height // factor, width // factor)

    def _is_ti2v(self) -> bool:
        if "dit" in self.components:
            return bool(self.component("dit").config.out_channels == 48)
        return bool(self.component("vae").config.z_dim == 48)

    def encode_extra(self, extra: Mapping[str, Any], *, pixels: Tensor) -> dict[str, Tensor]:
        """The first and, where given, the last frame, or VACE's clip, mask and picture.

        `image_latents` [b, 4 + c, f, h, w] and, with CLIP, `image_embeds` [b, images, 257, 1280]; in TI2V-5B the first
        latent frame; for VACE its control and, with a picture, that one's latents as a REFERENCE.
        """
        if _is_vace(list(extra)):
            return self._encode_control(extra, pixels=pixels)
        if "input_image" not in extra:
            raise ModelError('[model] extra_inputs: "end_image" needs "input_image" beside it')
        height, width = pixels.shape[2:4]
        first, *others = (
            extra_image(extra, name, height=height, width=width).to(self.device) for name in self.extra_inputs if name in extra
        )
        last = others[0] if others else None
        if self._is_ti2v():
            if last is not None:
                raise ModelError('[model] extra_inputs: TI2V-5B takes "input_image" only')
            return {FIRST_FRAME: self._encode_video(_as_floats(first))}
        conditions = {"image_latents": self._image_latents(first, last, num_frames=pixels.shape[1])}
        if "image_encoder" in self.components:
            embeds = [self._image_embeds(image) for image in (first, last) if image is not None]
            conditions["image_embeds"] = torch.stack(embeds, dim=1)
        return conditions

    def _encode_control(self, extra: Mapping[str, Any], *, pixels: Tensor) -> dict[str, Tensor]:
        """Without a clip a grey one; without a mask all of it is made anew."""
        if others := [name for name in extra if not _is_vace([name])]:
            raise ModelError(
                f"[model] extra_inputs: VACE takes no {', '.join(others)}; give it the clip's frames as {VACE_CLIP}"
            )
        given = {
            name: _as_floats(extra_clip(extra, name, like=pixels).to(self.device)) for name in self.clip_inputs if name in extra
        }
        clip = given.get(VACE_CLIP, torch.zeros(1, device=self.device))
        mask = (given[VACE_MASK] + 1) / 2 if VACE_MASK in given else torch.ones(1, device=self.device)
        shape = (len(pixels), 3, *pixels.shape[1:4])
        inactive, reactive = (self._encode_video(part.expand(shape)) for part in (clip * (1 - mask), clip * mask))
        reference = None
        if VACE_REFERENCE in extra:
            picture = extra_image(extra, VACE_REFERENCE, height=shape[3], width=shape[4])
            reference = self._encode_video(_as_floats(picture.to(self.device)))
        control = join_control(inactive, reactive, fold_mask(mask.expand(shape)[:, 0]), reference)
        return {VACE_CONTROL: control} | ({} if reference is None else {REFERENCE: reference})

    def _image_latents(self, first: Tensor, last: Tensor | None, *, num_frames: int) -> Tensor:
        """[b, 4 + 16, f, h, w]: which frames are given (1), 4 to a latent frame, and the clip with the others grey."""
        video = _as_floats(first).new_zeros(first.shape[0], 3, num_frames, *first.shape[2:4])
        video[:, :, :1] = _as_floats(first)
        given = video.new_zeros(first.shape[0], num_frames)
        given[:, 0] = 1
        if last is not None:
            video[:, :, -1:] = _as_floats(last)
            given[:, -1] = 1
        latents = self._encode_video(video)
        # The first latent frame stands for one frame, the others for four.
        given = torch.cat([given[:, :1].expand(-1, FRAMES_PER_LATENT), given[:, 1:]], dim=1)
        mask = given.view(given.shape[0], -1, FRAMES_PER_LATENT).transpose(1, 2)[..., None, None]
        return torch.cat([mask.expand(-1, -1, -1, *latents.shape[3:]).to(latents), latents], dim=1)

    def _image_embeds(self, image: Tensor) -> Tensor:
        """CLIP's state before the last block [b, 257, 1280] of an image [b, 1, H, W, 3], squeezed to a square."""
        encoder = self.component("image_encoder")
        size = encoder.config.image_size
        pixels = _as_floats(image)[:, :, 0]
        square = nn.functional.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=False) * 0.5 + 0.5
        mean, std = (square.new_tensor(values).view(1, 3, 1, 1) for values in (_CLIP_MEAN, _CLIP_STD))
        output = encoder(pixel_values=((square - mean) / std).to(self.dtype), output_hidden_states=True)
        return output.hidden_states[-2].to(self.dtype)

    def blank_batch(self, shape: BatchShape, *, extra_inputs: Sequence[str] = ()) -> EncodedBatch:
        """See `ModelFamily.blank_batch`."""
        config = self.component("dit").config
        latents = self.blank_latents(shape)
        text = torch.zeros(shape.num_samples, min(shape.text_tokens, TEXT_TOKENS), config.text_dim, dtype=self.dtype)
        conditions = {"prompt_embeds": text}
        if _is_vace(extra_inputs):
            frame = latents[:, :, :1]
            reference = frame if VACE_REFERENCE in extra_inputs else None
            mask = latents.new_zeros(len(latents), MASK_PIXELS**2, *latents.shape[2:])
            conditions[VACE_CONTROL] = join_control(latents, latents, mask, reference)
            if reference is not None:
                conditions[REFERENCE] = reference
        elif extra_inputs and self._is_ti2v():
            conditions[FIRST_FRAME] = torch.zeros_like(latents[:, :, :1])
        elif extra_inputs:
            added = config.in_channels - config.out_channels
            conditions["image_latents"] = latents.new_zeros(shape.num_samples, added, *latents.shape[2:])
        if config.image_dim is not None:
            conditions["image_embeds"] = latents.new_zeros(shape.num_samples, len(extra_inputs), CLIP_TOKENS, config.image_dim)
        return EncodedBatch(latents, conditions)

    def predict(self, batch: EncodedBatch, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """[b, c, f, h, w] -> the predicted velocity, noise - x_0, of the same shape."""
        dit = self.component("dit")
        hidden, conditions = noisy_latents.to(self.dtype), batch.conditions
        if "image_latents" in conditions:
            hidden = torch.cat([hidden, conditions["image_latents"].to(hidden)], dim=1)
        self._check_inputs(dit, hidden.shape[1], conditions)
        if FIRST_FRAME in conditions:
            # A time a token: the given frame is at 0, without noise.
            _, _, num_frames, height, width = hidden.shape
            frames = timesteps[:, None].repeat(1, num_frames)
            frames[:, 0] = 0
            timesteps = frames.repeat_interleave(height * width // PATCH**2, dim=1)
        text = conditions["prompt_embeds"].to(self.dtype)
        text = padded(text, TEXT_TOKENS)
        with self._control(dit, conditions):
            output: Tensor = dit(
                hidden_states=hidden,
                timestep=timesteps,
                encoder_hidden_states=text,
                encoder_hidden_states_image=self._image_tokens(dit, conditions),
                return_dict=False,
            )[0]
        return output

    def _control(self, dit: Any, conditions: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """VACE's blocks run beside the DiT's inside."""
        if VACE_CONTROL in conditions:
            return controlled(dit, self.component("vace"), conditions[VACE_CONTROL].to(self.dtype))
        if "vace" in self.components:
            wanted = ", ".join(name for name in self.extra_inputs if _is_vace([name]))
            raise ModelError(
                f"this Wan is VACE, and got none of {wanted}; name the columns that there are in [model] extra_inputs"
            )
        return nullcontext()

    def _check_inputs(self, dit: Any, channels: int, conditions: Mapping[str, Tensor]) -> None:
        if channels != dit.config.in_channels:
            wants, has = ("", "not ") if dit.config.in_channels == 36 else ("no ", "")
            raise ModelError(
                f"this Wan DiT takes {wants}input_image ({dit.config.in_channels} input channels), and it was {has}given: "
                "see [model] extra_inputs"
            )
        if dit.config.image_dim is not None and "image_embeds" not in conditions:
            raise ModelError("this Wan DiT attends to CLIP's image tokens; add the image encoder's file to [model] paths")

    def _image_tokens(self, dit: Any, conditions: Mapping[str, Tensor]) -> Tensor | None:
        """CLIP's tokens as the DiT takes them: of the first image, or of both where it has positions for both."""
        if dit.config.image_dim is None:
            return None
        embeds = conditions["image_embeds"].to(self.dtype)
        if dit.config.pos_embed_seq_len is None:
            return embeds[:, 0]
        if embeds.shape[1] * embeds.shape[2] != dit.config.pos_embed_seq_len:
            raise ModelError('this Wan DiT takes a first and a last frame: extra_inputs = ["input_image", "end_image"]')
        # diffusers takes the images of a pair one after the other along the batch.
        return embeds.flatten(0, 1)

    def sample(self, request: SampleRequest) -> Frames:
        """See `ModelFamily.sample`; by the image-to-video pipeline where there is a first frame, by VACE's with a reference."""
        from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline, WanVACEPipeline

        transformer: Any = self.component("dit")
        is_vace = "vace" in self.components
        parts: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
        if is_vace:
            transformer = JoinedTransformer(transformer, self.component("vace"))
        else:
            parts["expand_timesteps"] = self._is_ti2v()
        texts = [request.prompt, self.negative_prompt] if request.is_guided else [request.prompt]
        embeds = [padded(self.text_of_sample(text)["prompt_embeds"], TEXT_TOKENS) for text in texts]
        arguments: dict[str, Any] = {"prompt_embeds": embeds[0], "num_frames": request.num_frames}
        if request.is_guided:
            arguments["negative_prompt_embeds"] = embeds[1]
        if is_vace:
            arguments["reference_images"] = list(request.inputs)
        else:
            arguments |= dict(zip(("image", "last_image"), request.inputs, strict=False))
        without = WanImageToVideoPipeline if request.inputs else WanPipeline
        pipeline = build_pipeline(
            WanVACEPipeline if is_vace else without,
            device=self.device,
            transformer=transformer,
            vae=self.component("vae"),
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
            **parts,
        )
        if request.inputs and "image_encoder" in self.components:
            frames = [torch.from_numpy(np.array(picture))[None, None].to(self.device) for picture in request.inputs]
            seen = torch.cat([self._image_embeds(frame) for frame in frames])
            # It takes pictures or their embeddings, and needs both.
            pipeline.encode_image = lambda *pictures: seen
        return run_pipeline(pipeline, request, guidance_scale=request.guidance_scale, **arguments)

    def repeated_blocks(self, component: str) -> list[nn.Module]:
        """See `ModelFamily.repeated_blocks`; the VAE has none."""
        module = self.component(component)
        if component == "dit":
            return list(module.blocks)
        if component == "vace":
            return list(module.vace_blocks)
        if component == "text_encoder":
            return list(module.encoder.block)
        return list(module.encoder.layers) if component == "image_encoder" else []


def _is_vace(extra_inputs: Sequence[str]) -> bool:
    return any(name in (VACE_CLIP, VACE_MASK, VACE_REFERENCE) for name in extra_inputs)


def _as_floats(pixels: Tensor) -> Tensor:
    """uint8 [b, F, H, W, 3] -> float32 [b, 3, F, H, W] in -1..1."""
    return pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def clean_prompt(text: str) -> str:
    """As Wan was trained: mended encodings (also full-width letters and curly quotes), no entities, single spaces."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()
