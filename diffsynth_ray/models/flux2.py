"""FLUX.2 (klein 4B and 9B, their base models, dev): diffusers' transformer and VAE; Qwen3 (klein) or Mistral (dev) for text.

Transformers from files of the first release (flux2-dev.safetensors) and of diffusers' layout, everything else from the latter.
Latents are 2x2 pixels of the VAE's as one with 128 channels, normalised by the running statistics of its batch norm.

Pictures to edit, one or several: the transformer sees their latents behind those of the picture that it makes, each at a place
of its own on the axis of pictures. Each comes at about 1024 x 1024 pixels, its own proportions kept.

Shapes: b batch, h/w latent height and width (pixels / 16), d three times the text encoder's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models import flux2_configs as configs
from diffsynth_ray.models import image_vae, layouts, mistral, qwen3
from diffsynth_ray.models.edit_pictures import (
    EDIT_SHAPES,
    EDIT_TOKENS,
    as_picture,
    cropped,
    pack_pictures,
    predict_by_shape,
    read_pictures,
    token_shape,
)
from diffsynth_ray.models.family import BatchShape, EncodedBatch, real_tensor, real_values, register_family, stack_conditions
from diffsynth_ray.models.flux2_names import NAMES
from diffsynth_ray.models.layer_names import LayerNames
from diffsynth_ray.models.layouts import KeyLayout
from diffsynth_ray.models.library_family import InferConfig, LibraryFamily, missing_tokenizer
from diffsynth_ray.models.packing import PATCH, pack_latents, unpack_latents
from diffsynth_ray.models.sampling import Frames, SampleRequest, build_pipeline, run_pipeline
from diffsynth_ray.models.weights import meta_parameters

MAX_TOKENS = 512
"""Of the whole template; shorter texts are padded to it, and the transformer sees the padding."""
DEFAULT_GUIDANCE = 1.0
"""What FLUX.2-dev is told in training; images are made at 4."""
LATENT_CHANNELS = 128
_TOKEN_PIXELS = image_vae.VAE_FACTOR * PATCH
_FIRST_GIVEN, _GIVEN_STEP = 10, 10
"""Places of the given pictures on the axis of pictures: 10, 20, ...; 0 is that of the picture that is made."""


@register_family
class Flux2(LibraryFamily):
    """The `flux2` family. Option: `embedded_guidance` (dev)."""

    name = "flux2"
    component_names = ("dit", "text_encoder", "vae")
    scheduler_table = "flux2"
    text_components = ("text_encoder",)
    image_components = ("vae",)
    extra_components = ("vae",)
    extra_inputs = layouts.EXTRA_INPUTS["flux2"]
    predict_components = ("dit",)
    size_multiple = _TOKEN_PIXELS
    option_names = tuple(layouts.OPTIONS["flux2"])
    depth_keys: ClassVar[dict[str, dict[str, str]]] = {
        "dit": {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}
    }
    names: ClassVar[dict[str, LayerNames]] = NAMES
    infer_functions: ClassVar[dict[str, InferConfig]] = configs.INFER
    tokenizer_keys: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = {"tokenizer_path": ("text_encoder", ("tokenizer",))}
    tiny_tokenizers: ClassVar[dict[str, Path]] = {"tokenizer_path": qwen3.TINY_TOKENIZER}
    default_tokenizers: ClassVar[dict[str, str]] = layouts.DEFAULT_TOKENIZERS["flux2"]
    key_layouts: ClassVar[dict[str, KeyLayout]] = layouts.KEY_LAYOUTS["flux2"]
    config_names: ClassVar[dict[str, str | tuple[str, ...]]] = {
        "dit": "Flux2Transformer2DModel",
        "text_encoder": ("qwen3", *mistral.MODEL_TYPES),
        "vae": "AutoencoderKLFlux2",
    }
    default_lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "dit": (
            *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
            *("linear_in", "linear_out", "to_qkv_mlp_proj", "attn.to_out"),
        ),
        "text_encoder": ("q_proj", "k_proj", "v_proj", "o_proj"),
    }

    def __init__(
        self,
        components: dict[str, nn.Module],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        tokenizer_paths: Mapping[str, Path] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(components, dtype=dtype, device=device, tokenizer_paths=tokenizer_paths, options=options)
        if "text_encoder" in components:
            _check_tokenizer(self.tokenizers["tokenizer_path"], is_qwen3=self._has_qwen3)

    @property
    def _has_qwen3(self) -> bool:
        return self.component("text_encoder").config.model_type not in mistral.MODEL_TYPES

    @classmethod
    def tiny_configs(cls, extra_inputs: Sequence[str]) -> dict[str, dict[str, Any]]:
        """klein with 2 double and 2 single blocks of width 64."""
        cls.check_extra_inputs(extra_inputs)
        return configs.TINY

    @classmethod
    def build_component(cls, component: str, config: Mapping[str, Any]) -> nn.Module:
        """See `LibraryFamily.build_component`."""
        with meta_parameters():
            if component == "dit":
                from diffusers import Flux2Transformer2DModel

                return Flux2Transformer2DModel.from_config(dict(config))
            if component == "vae":
                from diffusers import AutoencoderKLFlux2

                return AutoencoderKLFlux2.from_config(dict(config))
            is_mistral = config.get("model_type") in mistral.MODEL_TYPES
            return mistral.build(config) if is_mistral else qwen3.build(config)

    @classmethod
    def load_tokenizer(cls, key: str, path: Path | None) -> Any:
        """Qwen's tokenizer or Mistral's, as the folder says."""
        if path is None or not (path / "tokenizer_config.json").is_file():
            raise missing_tokenizer(cls.name, key, path, "tokenizer_config.json and what belongs to it")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)

    @classmethod
    def memory_key(cls, component: str, key: str) -> str | None:
        """See `ModelFamily.memory_key`."""
        if component == "text_encoder":
            name = mistral.memory_key(key)
            return None if name is None else qwen3.memory_key(name)
        return super().memory_key(component, _without_prefix(component, key))

    @classmethod
    def memory_tensors(cls, component: str, key: str, tensor: Tensor) -> dict[str, Tensor]:
        """See `ModelFamily.memory_tensors`."""
        return super().memory_tensors(component, _without_prefix(component, key), tensor)

    @classmethod
    def checkpoint_tensors(cls, component: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `ModelFamily.checkpoint_tensors`."""
        if component != "text_encoder":
            return super().checkpoint_tensors(component, state)
        checkpoint_key = qwen3.checkpoint_key if configs.is_qwen3(state) else mistral.checkpoint_key
        return {checkpoint_key(name): tensor for name, tensor in state.items()}

    def encode_text(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt_embeds` [b, 512, d]: the states after a quarter, half and three quarters of the layers, side by side."""
        encoder = self.component("text_encoder")
        depth = encoder.config.num_hidden_layers
        embeds = []
        for prompt in prompts:  # one at a time: an embedding does not depend on what else is in the batch
            tokens = self._read_qwen3(prompt) if self._has_qwen3 else self._read_mistral(prompt)
            states = encoder(
                input_ids=tokens["input_ids"].to(self.device),
                attention_mask=tokens["attention_mask"].to(self.device),
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
            embeds.append(torch.cat([states[depth * quarter // 4] for quarter in (1, 2, 3)], dim=-1).to(self.dtype))
        return {"prompt_embeds": torch.cat(embeds)}

    def _read_qwen3(self, prompt: str) -> Any:
        return self.tokenizers["tokenizer_path"](
            qwen3.USER_TURN.format(prompt) + qwen3.NO_THOUGHTS,
            padding="max_length",
            max_length=MAX_TOKENS,
            truncation=True,
            return_tensors="pt",
        )

    def _read_mistral(self, prompt: str) -> Any:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        # With the system message of the first release, in which a line ends where DiffSynth-Studio's copy has a blank.
        return self.tokenizers["tokenizer_path"].apply_chat_template(
            format_input([prompt]),
            add_generation_prompt=False,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
        )

    def encode_image(self, pixels: Tensor) -> Tensor:
        """uint8 [b, 1, H, W, 3] -> [b, 128, H/16, W/16]."""
        vae = self.component("vae")
        mean, variance = (
            statistic.to(self.device, torch.float32).view(1, -1, 1, 1)
            for statistic in (vae.bn.running_mean, vae.bn.running_var)
        )
        std = torch.sqrt(variance + vae.config.batch_norm_eps)
        modes = image_vae.posterior_modes(vae, pixels, dtype=self.dtype, device=self.device, family=self.name)
        return torch.cat([((F.pixel_unshuffle(mode, PATCH) - mean) / std).to(self.dtype) for mode in modes])

    def encode_extra(self, extra: Mapping[str, Any], *, pixels: Tensor) -> dict[str, Tensor]:
        """`edit_image`: the tokens of a sample's pictures, one after the other, and their shapes."""
        self.check_extra_inputs(extra)
        encoded = []
        for pictures in read_pictures(extra, "edit_image"):
            sized = [np.array(_to_edit(as_picture(picture))) for picture in pictures]
            latents = [self.encode_image(torch.from_numpy(picture)[None, None]) for picture in sized]
            tokens, shapes = pack_pictures(latents, patch=1)
            encoded.append({EDIT_TOKENS: tokens, EDIT_SHAPES: shapes})
        return stack_conditions(encoded)

    def latents_shape(self, height: int, width: int, num_frames: int = 1) -> tuple[int, ...]:
        """(128, height / 16, width / 16)."""
        image_vae.check_size(height, width, num_frames, family=self.name)
        return (LATENT_CHANNELS, height // _TOKEN_PIXELS, width // _TOKEN_PIXELS)

    def blank_batch(self, shape: BatchShape, *, extra_inputs: Sequence[str] = ()) -> EncodedBatch:
        """See `ModelFamily.blank_batch`; the text has one length, and there is one picture to edit."""
        config = self.component("dit").config
        conditions = {"prompt_embeds": torch.zeros(shape.num_samples, MAX_TOKENS, config.joint_attention_dim, dtype=self.dtype)}
        if extra_inputs:
            rows, columns = token_shape(shape.height, shape.width)
            conditions[EDIT_TOKENS] = torch.zeros(shape.num_samples, rows * columns, config.in_channels, dtype=self.dtype)
            # Its values are read: under a fake mode too this one is real.
            conditions[EDIT_SHAPES] = real_tensor([[(1, rows, columns)]] * shape.num_samples)
        return EncodedBatch(self.blank_latents(shape), conditions)

    def predict(self, batch: EncodedBatch, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """[b, 128, h, w] -> the predicted velocity, noise - x_0, of the same shape."""
        return predict_by_shape(self._predict, batch, noisy_latents, timesteps)

    def _predict(self, batch: EncodedBatch, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        dit = self.component("dit")
        b, _, height, width = noisy_latents.shape
        tokens = pack_latents(noisy_latents.to(self.dtype), patch=1)
        num_tokens, device = tokens.shape[1], tokens.device
        ids = [_image_ids(height, width, place=0, device=device)]
        if EDIT_TOKENS in batch.conditions:
            tokens = torch.cat([tokens, batch.conditions[EDIT_TOKENS].to(tokens)], dim=1)
            shapes = real_values(batch.conditions[EDIT_SHAPES])[0]
            ids += [
                _image_ids(rows, columns, place=_FIRST_GIVEN + _GIVEN_STEP * number, device=device)
                for number, (_, rows, columns) in enumerate(shapes)
            ]
        text = batch.conditions["prompt_embeds"].to(self.dtype)
        text_ids = torch.zeros(text.shape[1], 4, device=device)
        text_ids[:, 3] = torch.arange(text.shape[1], device=device)
        guidance = None
        if dit.config.guidance_embeds:
            scale = float(self.options.get("embedded_guidance", DEFAULT_GUIDANCE))
            guidance = torch.full((b,), scale, device=device, dtype=torch.float32)
        output = dit(
            hidden_states=tokens,
            timestep=timesteps / 1000,
            guidance=guidance,
            encoder_hidden_states=text,
            txt_ids=text_ids,
            img_ids=torch.cat(ids),
            return_dict=False,
        )[0]
        return unpack_latents(output[:, :num_tokens], height=height, width=width, patch=1)

    def sample(self, request: SampleRequest) -> Frames:
        """See `ModelFamily.sample`. dev is told its guidance; klein is guided, which its distilled models do not need (1)."""
        from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Pipeline

        is_told = self.component("dit").config.guidance_embeds
        pipeline = build_pipeline(
            Flux2Pipeline if is_told else Flux2KleinPipeline,
            device=self.device,
            transformer=self.component("dit"),
            vae=self.component("vae"),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            text_encoder=None,
            tokenizer=None,
        )
        arguments = self.text_of_sample(request.prompt)
        if request.is_guided and not is_told:
            arguments["negative_prompt_embeds"] = self.text_of_sample(self.negative_prompt)["prompt_embeds"]
        pictures = [_to_edit(picture) for picture in request.inputs] or None
        return run_pipeline(pipeline, request, image=pictures, guidance_scale=request.guidance_scale, **arguments)

    def repeated_blocks(self, component: str) -> list[nn.Module]:
        """See `ModelFamily.repeated_blocks`; the VAE has none."""
        module = self.component(component)
        if component == "dit":
            return [*module.transformer_blocks, *module.single_transformer_blocks]
        return list(module.layers) if component == "text_encoder" else []


def _without_prefix(component: str, key: str) -> str:
    return key.removeprefix("model.diffusion_model.") if component == "dit" else key


def _check_tokenizer(tokenizer: Any, *, is_qwen3: bool) -> None:
    """ModelError where the tokenizer is that of the other models: dev's is the default, and klein cannot use it."""
    if is_qwen3 == ("<|im_start|>" in tokenizer.get_vocab()):
        return
    mine, repo = ("klein's Qwen3", "FLUX.2-klein-4B") if is_qwen3 else ("FLUX.2-dev's Mistral", "FLUX.2-dev")
    raise ModelError(
        f"flux2: the text encoder is {mine}, and the tokenizer in {tokenizer.name_or_path} is another's; "
        f'set [model] tokenizer_path = "black-forest-labs/{repo}:tokenizer/"'
    )


def _to_edit(picture: Image.Image) -> Image.Image:
    """A picture to edit at the size at which the VAE gets it."""
    rows, columns = token_shape(picture.height, picture.width)
    return cropped(picture, height=rows * _TOKEN_PIXELS, width=columns * _TOKEN_PIXELS)


def _image_ids(rows: int, columns: int, *, place: int, device: torch.device) -> Tensor:
    """[rows * columns, 4]: place on the axis of pictures, row and column of each image token, and nothing."""
    ids = torch.zeros(rows, columns, 4, device=device)
    ids[..., 0] = place
    ids[..., 1] = torch.arange(rows, device=device)[:, None]
    ids[..., 2] = torch.arange(columns, device=device)
    return ids.view(-1, 4)
