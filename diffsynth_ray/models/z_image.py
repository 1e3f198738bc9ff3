"""Z-Image (base and Turbo), text to image: diffusers' transformer and VAE, Qwen3-4B as the text encoder.

Shapes: b batch, h/w latent height and width (pixels / 8), n text tokens of the whole template, d = 2560 embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffsynth_ray.models import image_vae, layouts, qwen3
from diffsynth_ray.models import z_image_configs as configs
from diffsynth_ray.models.family import BatchShape, EncodedBatch, register_family, stack_conditions
from diffsynth_ray.models.layer_names import LayerNames
from diffsynth_ray.models.layouts import KeyLayout
from diffsynth_ray.models.library_family import InferConfig, LibraryFamily
from diffsynth_ray.models.packing import PATCH
from diffsynth_ray.models.sampling import Frames, SampleRequest, build_pipeline, run_pipeline
from diffsynth_ray.models.weights import meta_parameters

MAX_TOKENS = 512
"""Of the whole template."""


@register_family
class ZImage(LibraryFamily):
    """The `z_image` family."""

    name = "z_image"
    component_names = ("dit", "text_encoder", "vae")
    scheduler_table = "z_image"
    text_components = ("text_encoder",)
    image_components = ("vae",)
    text_tokens_vary = True
    predict_components = ("dit",)
    size_multiple = image_vae.VAE_FACTOR * PATCH
    depth_keys: ClassVar[dict[str, dict[str, str]]] = {
        "dit": {"layers": "n_layers", "noise_refiner": "n_refiner_layers", "context_refiner": "n_refiner_layers"}
    }
    names: ClassVar[dict[str, LayerNames]] = {"vae": image_vae.NAMES}
    infer_functions: ClassVar[dict[str, InferConfig]] = configs.INFER
    tokenizer_keys: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = {"tokenizer_path": ("text_encoder", ("tokenizer",))}
    tiny_tokenizers: ClassVar[dict[str, Path]] = {"tokenizer_path": qwen3.TINY_TOKENIZER}
    default_tokenizers: ClassVar[dict[str, str]] = layouts.DEFAULT_TOKENIZERS["z_image"]
    key_layouts: ClassVar[dict[str, KeyLayout]] = layouts.KEY_LAYOUTS["z_image"]
    config_names: ClassVar[dict[str, str | tuple[str, ...]]] = {
        "dit": "ZImageTransformer2DModel",
        "text_encoder": "qwen3",
        "vae": "AutoencoderKL",
    }
    default_lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "dit": ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"),
        "text_encoder": ("q_proj", "k_proj", "v_proj", "o_proj"),
    }

    @classmethod
    def tiny_configs(cls, extra_inputs: Sequence[str]) -> dict[str, dict[str, Any]]:
        """2 blocks of width 64."""
        cls.check_extra_inputs(extra_inputs)
        return configs.TINY

    @classmethod
    def build_component(cls, component: str, config: Mapping[str, Any]) -> nn.Module:
        """See `LibraryFamily.build_component`."""
        with meta_parameters():
            if component == "dit":
                from diffusers import ZImageTransformer2DModel

                return ZImageTransformer2DModel.from_config(dict(config))
            if component == "vae":
                return image_vae.build(config)
            return qwen3.build(config)

    @classmethod
    def load_tokenizer(cls, key: str, path: Path | None) -> Any:
        """Qwen's tokenizer."""
        return qwen3.load_tokenizer(cls.name, key, path)

    @classmethod
    def memory_key(cls, component: str, key: str) -> str | None:
        """See `ModelFamily.memory_key`."""
        if component == "text_encoder":
            return qwen3.memory_key(key)
        return super().memory_key(component, key)

    @classmethod
    def memory_tensors(cls, component: str, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """See `ModelFamily.memory_tensors`."""
        tensors = super().memory_tensors(component, key, tensor)
        if component == "vae":
            return {name: image_vae.as_linear(name, value) for name, value in tensors.items()}
        return tensors

    @classmethod
    def checkpoint_key(cls, component: str, name: str) -> str:
        """See `ModelFamily.checkpoint_key`: DiffSynth-Studio has the names of the released files."""
        return qwen3.checkpoint_key(name) if component == "text_encoder" else name

    @classmethod
    def checkpoint_tensors(cls, component: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `ModelFamily.checkpoint_tensors`."""
        return {cls.checkpoint_key(component, name): tensor for name, tensor in state.items()}

    def encode_text(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt_embeds` [b, n, d], the state before the last layer, without padding; one prompt at a time."""
        encoder = self.component("text_encoder")
        encoded = []
        for prompt in prompts:
            tokens = self.tokenizers["tokenizer_path"](
                qwen3.USER_TURN.format(prompt), max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
            )
            output = encoder(
                input_ids=tokens.input_ids.to(self.device),
                attention_mask=tokens.attention_mask.to(self.device),
                output_hidden_states=True,
                use_cache=False,
            )
            encoded.append({"prompt_embeds": output.hidden_states[-2].to(self.dtype)})
        return stack_conditions(encoded)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """uint8 [b, 1, H, W, 3] -> [b, 16, H/8, W/8]."""
        vae = self.component("vae")
        return image_vae.encode(vae, pixels, dtype=self.dtype, device=self.device, family=self.name)

    def latents_shape(self, height: int, width: int, num_frames: int = 1) -> tuple[int, ...]:
        """(16, height / 8, width / 8)."""
        return image_vae.latents_shape(height, width, num_frames, family=self.name)

    def blank_batch(self, shape: BatchShape, *, extra_inputs: Sequence[str] = ()) -> EncodedBatch:
        """See `ModelFamily.blank_batch`."""
        width_of_text = self.component("dit").config.cap_feat_dim
        conditions = {
            "prompt_embeds": torch.zeros(shape.num_samples, min(shape.text_tokens, MAX_TOKENS), width_of_text, dtype=self.dtype)
        }
        latents = self.blank_latents(shape)
        return EncodedBatch(latents, conditions)

    def predict(self, batch: EncodedBatch, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """[b, 16, h, w] -> the predicted velocity, noise - x_0, of the same shape.

        The transformer counts time from noise (0) to image (1) and predicts x_0 - noise.
        """
        dit = self.component("dit")
        text = batch.conditions["prompt_embeds"].to(self.dtype)
        mask = batch.conditions.get("prompt_embeds_mask")
        captions = list(text) if mask is None else [one[valid] for one, valid in zip(text, mask, strict=True)]
        output = dit(
            list(noisy_latents.to(self.dtype)[:, :, None]),
            (1000 - timesteps) / 1000,
            captions,
            return_dict=False,
        )[0]
        return -torch.stack(output)[:, :, 0]

    def sample(self, request: SampleRequest) -> Frames:
        """See `ModelFamily.sample`."""
        from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

        pipeline = build_pipeline(
            ZImagePipeline,
            device=self.device,
            transformer=self.component("dit"),
            vae=self.component("vae"),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder=None,
            tokenizer=None,
        )
        texts = [request.prompt, self.negative_prompt] if request.is_guided else [request.prompt]
        embeds = [list(self.text_of_sample(text)["prompt_embeds"]) for text in texts]
        negative = embeds[1] if request.is_guided else None
        # The pipeline guides from 0 on, and counts its scale from there.
        scale = request.guidance_scale if request.is_guided else 0.0
        return run_pipeline(pipeline, request, prompt_embeds=embeds[0], negative_prompt_embeds=negative, guidance_scale=scale)

    def repeated_blocks(self, component: str) -> list[nn.Module]:
        """See `ModelFamily.repeated_blocks`; the VAE has none."""
        module = self.component(component)
        if component == "dit":
            return [*module.noise_refiner, *module.context_refiner, *module.layers]
        return list(module.layers) if component == "text_encoder" else []
