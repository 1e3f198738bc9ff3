"""Qwen-Image, text to image: diffusers' transformer and VAE, Qwen2.5-VL as the text encoder.

Shapes: b batch, h/w latent height and width (pixels / 8), n text tokens after the template, d = 3584 embedding width,
s = h/2 * w/2 image tokens of 2x2 latent pixels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models import qwen_image_configs as configs
from diffsynth_ray.models.family import (
    ComponentFiles,
    EncodedBatch,
    KeyLayout,
    ModelFamily,
    register_family,
    stack_conditions,
)
from diffsynth_ray.models.rotary import JointAttention, RealRope
from diffsynth_ray.models.weights import assign_weights, meta_parameters, randomize_weights

log = logging.getLogger(__name__)

PROMPT_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
TEMPLATE_TOKENS = 34
"""Tokens of the template before the prompt; their embeddings are dropped."""
MAX_PROMPT_TOKENS = 1024
VAE_FACTOR = 8
"""Pixels to a latent pixel, each way."""
PATCH = 2
"""Latent pixels to an image token, each way."""
LATENT_CHANNELS = 16
TINY_TOKENIZER = Path(__file__).parent / "tiny" / "qwen_image" / "tokenizer"


@register_family
class QwenImage(ModelFamily):
    """The `qwen_image` family."""

    name = "qwen_image"
    component_names = ("dit", "text_encoder", "vae")
    scheduler_table = "qwen_image"
    text_components = ("text_encoder",)
    image_components = ("vae",)
    predict_components = ("dit",)
    size_multiple = VAE_FACTOR * PATCH
    key_layouts: ClassVar[dict[str, KeyLayout]] = {
        "dit": KeyLayout(
            prefixes=(
                "transformer_blocks.",
                "time_text_embed.",
                "img_in.",
                "txt_in.",
                "txt_norm.",
                "norm_out.",
                "proj_out.",
            ),
            markers=(("img_in.weight", "txt_norm.weight", "transformer_blocks.0.img_mod.1.weight"),),
        ),
        "text_encoder": KeyLayout(
            prefixes=("model.", "visual.", "lm_head."),
            markers=(
                ("model.layers.0.self_attn.q_proj.bias", "visual.patch_embed.proj.weight"),
                ("model.language_model.layers.0.self_attn.q_proj.bias", "model.visual.patch_embed.proj.weight"),
            ),
        ),
        "vae": KeyLayout(
            prefixes=("encoder.", "decoder.", "quant_conv.", "post_quant_conv."),
            markers=(("encoder.mid_block.attentions.0.to_qkv.weight", "quant_conv.weight", "encoder.norm_out.gamma"),),
        ),
    }
    config_names: ClassVar[dict[str, str]] = {
        "dit": "QwenImageTransformer2DModel",
        "text_encoder": "qwen2_5_vl",
        "vae": "AutoencoderKLQwenImage",
    }
    default_lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "dit": (
            *("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"),
            *("img_mlp.net.2", "img_mod.1", "txt_mlp.net.2", "txt_mod.1"),
        ),
        "text_encoder": ("q_proj", "k_proj", "v_proj", "o_proj"),
    }

    def __init__(
        self,
        components: dict[str, nn.Module],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        tokenizer_path: Path | None = None,
    ) -> None:
        super().__init__(components, dtype=dtype, device=device)
        self._tokenizer = None
        if "text_encoder" in components:
            self._tokenizer = _load_tokenizer(tokenizer_path)

    @classmethod
    def load(
        cls,
        files: Mapping[str, ComponentFiles],
        *,
        components: Sequence[str] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        tokenizer_paths: Mapping[str, Path] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> QwenImage:
        """See `ModelFamily.load`. Option: `zero_cond_t`.

        The tokenizer defaults to a folder `tokenizer` beside the text encoder's folder, as in the released repository.
        """
        unknown = set(options or ()) - {"zero_cond_t"}
        if unknown:
            raise ModelError(f"qwen_image has no option {', '.join(sorted(unknown))}; it has zero_cond_t")
        modules: dict[str, nn.Module] = {}
        for component in files if components is None else components:
            if component not in files:
                raise ModelError(f"qwen_image needs its {component}, and [model] paths has none")
            source = files[component]
            log.info("loading %s from %s", component, ", ".join(path.name for path in source.paths))
            config = {**source.config, **(options or {})} if component == "dit" else source.config
            module = build_component(component, config)
            assign_weights(
                module,
                source,
                component=component,
                memory_key=lambda key, component=component: cls.memory_key(component, key),  # type: ignore[misc]
                dtype=dtype,
                device=device,
            )
            modules[component] = module
        tokenizer_path = (tokenizer_paths or {}).get("tokenizer_path")
        if tokenizer_path is None and "text_encoder" in modules:
            tokenizer_path = files["text_encoder"].paths[0].parent.parent / "tokenizer"
        return cls(modules, dtype=dtype, device=device, tokenizer_path=tokenizer_path)

    @classmethod
    def build_tiny(
        cls,
        seed: int,
        *,
        components: Sequence[str] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> QwenImage:
        """See `ModelFamily.build_tiny`: 2 blocks of width 64, 0.5 M parameters in all."""
        modules = {}
        for component in cls.component_names if components is None else components:
            module = build_component(component, configs.TINY[component])
            randomize_weights(module, seed=seed, component=component, dtype=dtype, device=device)
            modules[component] = module
        return cls(modules, dtype=dtype, device=device, tokenizer_path=TINY_TOKENIZER)

    @classmethod
    def infer_config(cls, component: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """See `ModelFamily.infer_config`."""
        try:
            return configs.INFER[component](shapes)
        except KeyError as error:
            raise ModelError(f"qwen_image {component}: tensor {error} is missing; is a shard missing?") from error

    def encode_text(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt_embeds` [b, n, d], the text encoder's last hidden state after the template's tokens.

        One prompt at a time: a prompt's embedding does not depend on what else is in the batch.
        """
        encoder = self.component("text_encoder")
        assert self._tokenizer is not None
        encoded = []
        for prompt in prompts:
            tokens = self._tokenizer(
                PROMPT_TEMPLATE.format(prompt),
                max_length=MAX_PROMPT_TOKENS + TEMPLATE_TOKENS,
                truncation=True,
                return_tensors="pt",
            )
            # The model under the (absent) language head: its last state is already normalised.
            output = encoder.model(
                input_ids=tokens.input_ids.to(self.device),
                attention_mask=tokens.attention_mask.to(self.device),
                use_cache=False,
            )
            encoded.append({"prompt_embeds": output.last_hidden_state[:, TEMPLATE_TOKENS:].to(self.dtype)})
        return stack_conditions(encoded)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """uint8 [b, 1, H, W, 3] -> [b, 16, H/8, W/8]: the posterior's mode, (x - mean) / std per channel."""
        vae = self.component("vae")
        if pixels.ndim != 5 or pixels.shape[1] != 1 or pixels.shape[-1] != 3:
            raise ModelError(f"qwen_image takes images, uint8 [b, 1, height, width, 3], got {list(pixels.shape)}")
        self.latents_shape(pixels.shape[2], pixels.shape[3])
        mean, std = (
            torch.tensor(values, device=self.device, dtype=torch.float32).view(1, -1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        # On the CPU one at a time: convolutions there may choose another algorithm for another batch size.
        size = 1 if self.device.type == "cpu" else pixels.shape[0]
        latents = []
        for chunk in pixels.to(self.device).split(size):
            scaled = chunk.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
            mode = vae.encode(scaled.to(self.dtype)).latent_dist.mode()[:, :, 0]
            latents.append(((mode.float() - mean) / std).to(self.dtype))
        return torch.cat(latents)

    def latents_shape(self, height: int, width: int, num_frames: int = 1) -> tuple[int, ...]:
        """(16, height / 8, width / 8)."""
        if num_frames != 1 or height % self.size_multiple or width % self.size_multiple or min(height, width) < 1:
            raise ModelError(
                f"qwen_image takes single images with sides that are multiples of {self.size_multiple}, "
                f"got {width}x{height} and {num_frames} frame(s)"
            )
        return (LATENT_CHANNELS, height // VAE_FACTOR, width // VAE_FACTOR)

    def predict(self, batch: EncodedBatch, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """[b, 16, h, w] -> the predicted velocity, noise - x_0, of the same shape."""
        dit = self.component("dit")
        _, _, height, width = noisy_latents.shape
        output = dit(
            hidden_states=pack_latents(noisy_latents.to(self.dtype)),
            encoder_hidden_states=batch.conditions["prompt_embeds"].to(self.dtype),
            encoder_hidden_states_mask=batch.conditions.get("prompt_embeds_mask"),
            timestep=timesteps / 1000,
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * noisy_latents.shape[0],
            return_dict=False,
        )[0]
        return unpack_latents(output, height=height, width=width)

    def repeated_blocks(self, component: str) -> list[nn.Module]:
        """See `ModelFamily.repeated_blocks`; the VAE has none."""
        module = self.component(component)
        if component == "dit":
            return list(module.transformer_blocks)
        if component == "text_encoder":
            return list(module.model.language_model.layers)
        return []

    @classmethod
    def checkpoint_key(cls, component: str, name: str) -> str:
        """The names in memory are the exported names, for all three components."""
        return name

    @classmethod
    def memory_key(cls, component: str, key: str) -> str | None:
        """The text encoder's `model.*` and `visual.*` are `model.language_model.*` and `model.visual.*` in memory.

        The language head is not loaded: only hidden states are used.
        """
        if component != "text_encoder":
            return key
        if key.startswith("lm_head."):
            return None
        if key.startswith("visual."):
            return f"model.{key}"
        if key.startswith("model.") and not key.startswith(("model.language_model.", "model.visual.")):
            return f"model.language_model.{key.removeprefix('model.')}"
        return key


def pack_latents(latents: Tensor) -> Tensor:
    """[b, c, h, w] -> tokens [b, h/2 * w/2, c * 4], channel first within a token."""
    b, c, h, w = latents.shape
    patches = latents.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // PATCH) * (w // PATCH), c * PATCH * PATCH)


def unpack_latents(tokens: Tensor, *, height: int, width: int) -> Tensor:
    """The inverse of `pack_latents` for latents of this height and width."""
    b, _, width_of_token = tokens.shape
    c = width_of_token // (PATCH * PATCH)
    patches = tokens.reshape(b, height // PATCH, width // PATCH, c, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, c, height, width)


def build_component(component: str, config: Mapping[str, Any]) -> nn.Module:
    """The component with its parameters on the meta device."""
    with meta_parameters():
        if component == "dit":
            from diffusers import QwenImageTransformer2DModel

            dit = QwenImageTransformer2DModel.from_config(dict(config))
            dit.pos_embed = RealRope(dit.pos_embed)
            for block in dit.transformer_blocks:
                block.attn.set_processor(JointAttention())
            return dit
        if component == "vae":
            from diffusers import AutoencoderKLQwenImage

            return AutoencoderKLQwenImage.from_config(dict(config))
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
        encoder.lm_head = nn.Identity()
        return encoder


def _load_tokenizer(path: Path | None) -> Any:
    if path is None or not (path / "tokenizer_config.json").is_file():
        raise ModelError(
            f"qwen_image: no tokenizer in {path}; set [model] tokenizer_path to the folder with tokenizer_config.json, "
            "vocab.json and merges.txt"
        )
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer.from_pretrained(str(path), local_files_only=True)
    if len(tokenizer(PROMPT_TEMPLATE.partition("{}")[0]).input_ids) != TEMPLATE_TOKENS:
        raise ModelError(
            f"{path}: not Qwen-Image's tokenizer: its prompt template is not {TEMPLATE_TOKENS} tokens long"
        )
    return tokenizer


def parameter_count(component: str, config: Mapping[str, Any]) -> int:
    """Parameters of a component with this configuration, without loading it."""
    return sum(math.prod(parameter.shape) for parameter in build_component(component, config).parameters())
