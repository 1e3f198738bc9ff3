"""FLUX.1 (dev, schnell, Kontext): diffusers' transformer and VAE, CLIP and T5 as text encoders.

Files of the first release (flux1-dev.safetensors, ae.safetensors) and of diffusers' layout.

Kontext edits pictures: the transformer sees their latents behind those of the picture that it makes, at the same places of
another layer. Each has the size that the data set's rule gives it, its own proportions kept.

Shapes: b batch, h/w latent height and width (pixels / 8), n = 512 T5 tokens, d = 4096 their width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffsynth_ray.models import flux_configs as configs
from diffsynth_ray.models import image_vae, layouts, t5
from diffsynth_ray.models.edit_pictures import (
    EDIT_SHAPES,
    EDIT_TOKENS,
    pack_pictures,
    predict_by_shape,
    read_pictures,
    scaled_to_area,
)
from diffsynth_ray.models.family import BatchShape, EncodedBatch, real_tensor, real_values, register_family, stack_conditions
from diffsynth_ray.models.flux_names import NAMES
from diffsynth_ray.models.layer_names import LayerNames
from diffsynth_ray.models.layouts import KeyLayout
from diffsynth_ray.models.library_family import TINY_DIR, InferConfig, LibraryFamily, missing_tokenizer
from diffsynth_ray.models.packing import PATCH, pack_latents, unpack_latents
from diffsynth_ray.models.sampling import Frames, SampleRequest, build_pipeline, run_pipeline
from diffsynth_ray.models.weights import meta_parameters

CLIP_TOKENS = 77
T5_TOKENS = 512
DEFAULT_GUIDANCE = 1.0
"""What FLUX.1-dev is told in training; images are made at 3.5."""
_GIVEN_LAYER = 1
"""First coordinate of the given pictures' tokens; 0 for those of the picture that is made."""


@register_family
class Flux(LibraryFamily):
    """The `flux` family. Option: `embedded_guidance`."""

    name = "flux"
    component_names = ("dit", "text_encoder_1", "text_encoder_2", "vae")
    scheduler_table = "flux"
    draws_noise_in_float32 = True
    text_components = ("text_encoder_1", "text_encoder_2")
    image_components = ("vae",)
    extra_components = ("vae",)
    extra_inputs = layouts.EXTRA_INPUTS["flux"]
    predict_components = ("dit",)
    size_multiple = image_vae.VAE_FACTOR * PATCH
    option_names = tuple(layouts.OPTIONS["flux"])
    depth_keys: ClassVar[dict[str, dict[str, str]]] = {
        "dit": {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}
    }
    names: ClassVar[dict[str, LayerNames]] = NAMES
    infer_functions: ClassVar[dict[str, InferConfig]] = configs.INFER
    tokenizer_keys: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = {
        "tokenizer_1_path": ("text_encoder_1", ("tokenizer",)),
        "tokenizer_2_path": ("text_encoder_2", ("tokenizer_2",)),
    }
    tiny_tokenizers: ClassVar[dict[str, Path]] = {
        "tokenizer_1_path": TINY_DIR / "flux" / "tokenizer",
        "tokenizer_2_path": t5.TINY_TOKENIZER,
    }
    default_tokenizers: ClassVar[dict[str, str]] = layouts.DEFAULT_TOKENIZERS["flux"]
    key_layouts: ClassVar[dict[str, KeyLayout]] = layouts.KEY_LAYOUTS["flux"]
    config_names: ClassVar[dict[str, str | tuple[str, ...]]] = {
        "dit": "FluxTransformer2DModel",
        "text_encoder_1": "clip_text_model",
        "text_encoder_2": "t5",
        "vae": "AutoencoderKL",
    }
    default_lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "dit": (
            *("a_to_qkv", "b_to_qkv", "ff_a.0", "ff_a.2", "ff_b.0", "ff_b.2", "a_to_out", "b_to_out"),
            *("proj_out", "norm.linear", "norm1_a.linear", "norm1_b.linear", "to_qkv_mlp"),
        )
    }

    @classmethod
    def tiny_configs(cls, extra_inputs: Sequence[str]) -> dict[str, dict[str, Any]]:
        """2 double and 2 single blocks of width 64."""
        cls.check_extra_inputs(extra_inputs)
        return configs.TINY

    @classmethod
    def build_component(cls, component: str, config: Mapping[str, Any]) -> nn.Module:
        """See `LibraryFamily.build_component`."""
        with meta_parameters():
            if component == "dit":
                from diffusers import FluxTransformer2DModel

                return FluxTransformer2DModel.from_config(dict(config))
            if component == "vae":
                return image_vae.build(config)
            if component == "text_encoder_1":
                from transformers import CLIPTextConfig, CLIPTextModel

                return CLIPTextModel(CLIPTextConfig(**config))
            from transformers import T5Config, T5EncoderModel

            return t5.adapted(T5EncoderModel(T5Config(**config)))

    @classmethod
    def load_tokenizer(cls, key: str, path: Path | None) -> Any:
        """CLIP's tokenizer, or T5's exactly as its tokenizer.json says."""
        first = key == "tokenizer_1_path"
        needed = "vocab.json" if first else "tokenizer.json"
        if path is None or not (path / needed).is_file():
            raise missing_tokenizer(cls.name, key, path, f"FLUX.1's {'tokenizer' if first else 'tokenizer_2'} ({needed})")
        if not first:
            return t5.load_tokenizer(path)
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(str(path), local_files_only=True)

    @classmethod
    def memory_key(cls, component: str, key: str) -> str | None:
        """See `ModelFamily.memory_key`."""
        if component == "dit":
            key = key.removeprefix("model.diffusion_model.")
        elif component == "text_encoder_1":
            key = key.removeprefix("text_model.")
            if key.startswith("embeddings.position_ids"):
                return None
        elif component == "text_encoder_2" and key == t5.SECOND_NAME:
            return t5.EMBEDDING
        return super().memory_key(component, key)

    @classmethod
    def memory_tensors(cls, component: str, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """See `ModelFamily.memory_tensors`."""
        if component == "dit":
            key = key.removeprefix("model.diffusion_model.")
        tensors = super().memory_tensors(component, key, tensor)
        if component == "vae":
            return {name: image_vae.as_linear(name, value) for name, value in tensors.items()}
        return tensors

    @classmethod
    def checkpoint_tensors(cls, component: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `ModelFamily.checkpoint_tensors`."""
        tensors = super().checkpoint_tensors(component, state)
        if component == "vae":
            return {key: image_vae.as_convolution(key, tensor) for key, tensor in tensors.items()}
        return tensors

    def encode_text(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt_embeds` [b, 512, d] of T5, its padding included, and `pooled_prompt_embeds` [b, 768] of CLIP."""
        clip, t5 = self.component("text_encoder_1"), self.component("text_encoder_2")
        pooled, embeds = [], []
        for prompt in prompts:  # one at a time: an embedding does not depend on what else is in the batch
            pooled.append(clip(input_ids=self._tokens("tokenizer_1_path", prompt, CLIP_TOKENS)).pooler_output)
            embeds.append(t5(input_ids=self._tokens("tokenizer_2_path", prompt, T5_TOKENS)).last_hidden_state)
        return {
            "prompt_embeds": torch.cat(embeds).to(self.dtype),
            "pooled_prompt_embeds": torch.cat(pooled).to(self.dtype),
        }

    def _tokens(self, key: str, prompt: str, length: int) -> Tensor:
        tokens = self.tokenizers[key]([prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids: Tensor = tokens.input_ids.to(self.device)
        return ids

    def encode_image(self, pixels: Tensor) -> Tensor:
        """uint8 [b, 1, H, W, 3] -> [b, 16, H/8, W/8]."""
        vae = self.component("vae")
        return image_vae.encode(vae, pixels, dtype=self.dtype, device=self.device, family=self.name)

    def encode_extra(self, extra: Mapping[str, Any], *, pixels: Tensor) -> dict[str, Tensor]:
        """`kontext_images`: the tokens of a sample's pictures, one after the other, and their shapes."""
        self.check_extra_inputs(extra)
        encoded = []
        for pictures in read_pictures(extra, "kontext_images"):
            tokens, shapes = pack_pictures([self.encode_image(picture[None]) for picture in pictures])
            encoded.append({EDIT_TOKENS: tokens, EDIT_SHAPES: shapes})
        return stack_conditions(encoded)

    def latents_shape(self, height: int, width: int, num_frames: int = 1) -> tuple[int, ...]:
        """(16, height / 8, width / 8)."""
        return image_vae.latents_shape(height, width, num_frames, family=self.name)

    def blank_batch(self, shape: BatchShape, *, extra_inputs: Sequence[str] = ()) -> EncodedBatch:
        """See `ModelFamily.blank_batch`; the text has one length, a picture to edit the size of the sample."""
        config = self.component("dit").config
        conditions = {
            "prompt_embeds": torch.zeros(shape.num_samples, T5_TOKENS, config.joint_attention_dim, dtype=self.dtype),
            "pooled_prompt_embeds": torch.zeros(shape.num_samples, config.pooled_projection_dim, dtype=self.dtype),
        }
        latents = self.blank_latents(shape)
        if extra_inputs:
            conditions[EDIT_TOKENS] = pack_latents(torch.zeros_like(latents, dtype=self.dtype))
            rows, columns = (side // PATCH for side in latents.shape[2:])
            # Its values are read: under a fake mode too this one is real.
            conditions[EDIT_SHAPES] = real_tensor([[(1, rows, columns)]] * shape.num_samples)
        return EncodedBatch(latents, conditions)

    def predict(self, batch: EncodedBatch, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """[b, 16, h, w] -> the predicted velocity, noise - x_0, of the same shape."""
        return predict_by_shape(self._predict, batch, noisy_latents, timesteps)

    def _predict(self, batch: EncodedBatch, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        dit = self.component("dit")
        b, _, height, width = noisy_latents.shape
        tokens = pack_latents(noisy_latents.to(self.dtype))
        num_tokens = tokens.shape[1]
        ids = [_image_ids(height // PATCH, width // PATCH, layer=0, device=tokens.device)]
        if EDIT_TOKENS in batch.conditions:
            tokens = torch.cat([tokens, batch.conditions[EDIT_TOKENS].to(tokens)], dim=1)
            shapes = real_values(batch.conditions[EDIT_SHAPES])[0]
            ids += [_image_ids(rows, columns, layer=_GIVEN_LAYER, device=tokens.device) for _, rows, columns in shapes]
        text = batch.conditions["prompt_embeds"].to(self.dtype)
        guidance = None
        if dit.config.guidance_embeds:
            scale = float(self.options.get("embedded_guidance", DEFAULT_GUIDANCE))
            guidance = torch.full((b,), scale, device=noisy_latents.device, dtype=torch.float32)
        output = dit(
            hidden_states=tokens,
            timestep=timesteps / 1000,
            guidance=guidance,
            pooled_projections=batch.conditions["pooled_prompt_embeds"].to(self.dtype),
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=text.device),
            img_ids=torch.cat(ids),
            return_dict=False,
        )[0]
        return unpack_latents(output[:, :num_tokens], height=height, width=width)

    def sample(self, request: SampleRequest) -> Frames:
        """See `ModelFamily.sample`. The guidance is what FLUX.1-dev is told; there is no negative prompt.

        A picture to edit is given at about the area of the one that is made, as in training.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxPipeline

        pipeline = build_pipeline(
            FluxKontextPipeline if request.inputs else FluxPipeline,
            device=self.device,
            transformer=self.component("dit"),
            vae=self.component("vae"),
            scheduler=FlowMatchEulerDiscreteScheduler(**configs.SCHEDULER),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
        )
        text = self.text_of_sample(request.prompt)
        given: dict[str, Any] = {}
        if request.inputs:
            (picture,) = request.inputs
            area = request.height * request.width
            given = {
                "image": scaled_to_area(picture, area, multiple=self.size_multiple),
                "_auto_resize": False,
                "max_area": area,
            }
        return run_pipeline(
            pipeline,
            request,
            **given,
            prompt_embeds=text["prompt_embeds"],
            pooled_prompt_embeds=text["pooled_prompt_embeds"],
            guidance_scale=request.guidance_scale,
        )

    def repeated_blocks(self, component: str) -> list[nn.Module]:
        """See `ModelFamily.repeated_blocks`; the VAE has none."""
        module = self.component(component)
        if component == "dit":
            return [*module.transformer_blocks, *module.single_transformer_blocks]
        if component == "text_encoder_1":
            return list(module.encoder.layers)
        return list(module.encoder.block) if component == "text_encoder_2" else []


def _image_ids(rows: int, columns: int, *, layer: int, device: torch.device) -> Tensor:
    """[rows * columns, 3]: layer, row and column of each image token."""
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 0] = layer
    ids[..., 1] = torch.arange(rows, device=device)[:, None]
    ids[..., 2] = torch.arange(columns, device=device)
    return ids.view(-1, 3)
