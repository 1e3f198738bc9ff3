"""Qwen-Image, text to image, and Qwen-Image-Edit: diffusers' transformer and VAE, Qwen2.5-VL as the text encoder.

Shapes: b batch, h/w latent height and width (pixels / 8), n text tokens after the template, d = 3584 embedding width,
s = h/2 * w/2 image tokens of 2x2 latent pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models import layouts
from diffsynth_ray.models import qwen_image_configs as configs
from diffsynth_ray.models import qwen_image_edit as edit
from diffsynth_ray.models.edit_pictures import (
    EDIT_SHAPES,
    EDIT_TOKENS,
    as_picture,
    pack_pictures,
    predict_by_shape,
    read_pictures,
    token_shape,
)
from diffsynth_ray.models.family import (
    BatchShape,
    EncodedBatch,
    real_tensor,
    real_values,
    register_family,
    stack_conditions,
)
from diffsynth_ray.models.layer_names import LayerNames
from diffsynth_ray.models.layouts import KeyLayout
from diffsynth_ray.models.library_family import TINY_DIR, InferConfig, LibraryFamily, missing_tokenizer
from diffsynth_ray.models.packing import PATCH, pack_latents, unpack_latents
from diffsynth_ray.models.rotary import JointAttention, RealRope
from diffsynth_ray.models.sampling import Frames, SampleRequest, build_pipeline, run_pipeline
from diffsynth_ray.models.weights import meta_parameters

PROMPT_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
TEMPLATE_TOKENS = 34
"""Tokens of the template before the prompt; their embeddings are dropped."""
MAX_PROMPT_TOKENS = 1024
VAE_FACTOR = 8
"""Pixels to a latent pixel, each way."""
LATENT_CHANNELS = 16


@register_family
class QwenImage(LibraryFamily):
    """The `qwen_image` family. Options: `zero_cond_t` (2511), `edit_prompt` (see `qwen_image_edit.PROMPT_STYLES`), and with
    tiny = true `trained_vae`: the small VAE of tests/bench/train_tiny_vae.py, so that pictures can be seen."""

    name = "qwen_image"
    component_names = ("dit", "text_encoder", "vae")
    scheduler_table = "qwen_image"
    text_components = ("text_encoder",)
    image_components = ("vae",)
    extra_components = ("vae",)
    text_tokens_vary = True
    negative_prompt = " "  # as in the released model's own examples
    predict_components = ("dit",)
    size_multiple = VAE_FACTOR * PATCH
    key_layouts: ClassVar[dict[str, KeyLayout]] = layouts.KEY_LAYOUTS["qwen_image"]
    default_tokenizers: ClassVar[dict[str, str]] = layouts.DEFAULT_TOKENIZERS["qwen_image"]
    extra_inputs = layouts.EXTRA_INPUTS["qwen_image"]
    text_reads_extra = True
    option_names = tuple(layouts.OPTIONS["qwen_image"])
    depth_keys: ClassVar[dict[str, dict[str, str]]] = {"dit": {"transformer_blocks": "num_layers"}}
    names: ClassVar[dict[str, LayerNames]] = {}
    infer_functions: ClassVar[dict[str, InferConfig]] = configs.INFER
    tokenizer_keys: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = {
        "tokenizer_path": ("text_encoder", ("tokenizer",)),
        "processor_path": ("text_encoder", ("processor",)),
    }
    tiny_tokenizers: ClassVar[dict[str, Path]] = {"tokenizer_path": TINY_DIR / "qwen_image" / "tokenizer"}
    tiny_weights: ClassVar[dict[str, Path]] = {"vae": TINY_DIR / "qwen_image" / "vae"}
    config_names: ClassVar[dict[str, str | tuple[str, ...]]] = {
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

    @classmethod
    def tiny_configs(cls, extra_inputs: Sequence[str]) -> dict[str, dict[str, Any]]:
        """2 blocks of width 64, 0.5 M parameters in all."""
        return configs.TINY

    @classmethod
    def component_config(cls, component: str, config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """See `LibraryFamily.component_config`."""
        given = {"zero_cond_t": options["zero_cond_t"]} if component == "dit" and "zero_cond_t" in options else {}
        return {**config, **given}

    @classmethod
    def build_component(cls, component: str, config: Mapping[str, Any]) -> nn.Module:
        """See `LibraryFamily.build_component`."""
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

    @classmethod
    def load_tokenizer(cls, key: str, path: Path | None) -> Any:
        """Qwen2.5-VL's tokenizer, or with `processor_path` the settings of its image processor."""
        if key == "processor_path":
            return edit.build_image_processor(path)
        if path is None or not (path / "tokenizer_config.json").is_file():
            raise missing_tokenizer(cls.name, key, path, "tokenizer_config.json, vocab.json and merges.txt")
        from transformers import Qwen2Tokenizer

        tokenizer = Qwen2Tokenizer.from_pretrained(str(path), local_files_only=True)
        if len(tokenizer(PROMPT_TEMPLATE.partition("{}")[0]).input_ids) != TEMPLATE_TOKENS:
            raise ModelError(f"{path}: not Qwen-Image's tokenizer: its prompt template is not {TEMPLATE_TOKENS} tokens long")
        return tokenizer

    def encode_text(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt_embeds` [b, n, d], the text encoder's last hidden state after the template's tokens.

        One prompt at a time: a prompt's embedding does not depend on what else is in the batch.
        """
        encoder = self.component("text_encoder")
        encoded = []
        for prompt in prompts:
            tokens = self.tokenizers["tokenizer_path"](
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

    def encode_conditions(self, prompts: Sequence[str], *, pixels: Tensor, extra: Mapping[str, Any]) -> dict[str, Tensor]:
        """With `edit_image`: the prompts read with the pictures, and the pictures' latents as tokens."""
        if not extra:
            return self.encode_text(prompts)
        if set(extra) != {"edit_image"}:
            raise ModelError(f"[model] extra_inputs: qwen_image takes edit_image, got {', '.join(extra)}")
        encoded = []
        for prompt, given in zip(prompts, read_pictures(extra, "edit_image"), strict=True):
            pictures = edit.for_the_vae([as_picture(pixels) for pixels in given])
            encoded.append({**self._read_prompt(prompt, pictures), **self._edit_tokens(pictures)})
        return stack_conditions(encoded)

    def _read_prompt(self, prompt: str, pictures: Sequence[Image]) -> dict[str, Tensor]:
        """`prompt_embeds` [1, n, d] of a prompt that is read with pictures."""
        inputs = edit.encoder_inputs(
            prompt,
            pictures,
            tokenizer=self.tokenizers["tokenizer_path"],
            processor=self.tokenizers["processor_path"],
            style=str(self.options.get("edit_prompt", edit.PROMPT_STYLES[0])),
        )
        moved = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        moved["pixel_values"] = moved["pixel_values"].to(self.dtype)
        output = self.component("text_encoder").model(**moved, use_cache=False)
        return {"prompt_embeds": output.last_hidden_state[:, edit.TEMPLATE_TOKENS :].to(self.dtype)}

    def _edit_tokens(self, pictures: Sequence[Image]) -> dict[str, Tensor]:
        """The pictures' latents, one after the other, and their shapes in tokens."""
        tokens, shapes = pack_pictures(
            [self.encode_image(torch.from_numpy(np.array(picture))[None, None]) for picture in pictures]
        )
        return {EDIT_TOKENS: tokens, EDIT_SHAPES: shapes}

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

    def blank_batch(self, shape: BatchShape, *, extra_inputs: Sequence[str] = ()) -> EncodedBatch:
        """See `ModelFamily.blank_batch`; one picture to edit, as large as the VAE gets it."""
        config = self.component("dit").config
        text = torch.zeros(
            shape.num_samples, min(shape.text_tokens, MAX_PROMPT_TOKENS), config.joint_attention_dim, dtype=self.dtype
        )
        conditions = {"prompt_embeds": text}
        if extra_inputs:
            rows, columns = token_shape(shape.height, shape.width)
            conditions[EDIT_TOKENS] = torch.zeros(shape.num_samples, rows * columns, config.in_channels, dtype=self.dtype)
            # Its values are read: under a fake mode too this one is real.
            conditions[EDIT_SHAPES] = real_tensor([[(1, rows, columns)]] * shape.num_samples)
        latents = self.blank_latents(shape)
        return EncodedBatch(latents, conditions)

    def predict(self, batch: EncodedBatch, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """[b, 16, h, w] -> the predicted velocity, noise - x_0, of the same shape."""
        return predict_by_shape(self._predict, batch, noisy_latents, timesteps)

    def _predict(self, batch: EncodedBatch, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        _, _, height, width = noisy_latents.shape
        tokens = pack_latents(noisy_latents.to(self.dtype))
        num_tokens, shapes = tokens.shape[1], [(1, height // PATCH, width // PATCH)]
        if EDIT_TOKENS in batch.conditions:
            tokens = torch.cat([tokens, batch.conditions[EDIT_TOKENS].to(tokens)], dim=1)
            shapes += [tuple(shape) for shape in real_values(batch.conditions[EDIT_SHAPES])[0]]
        output = self.component("dit")(
            hidden_states=tokens,
            encoder_hidden_states=batch.conditions["prompt_embeds"].to(self.dtype),
            encoder_hidden_states_mask=batch.conditions.get("prompt_embeds_mask"),
            timestep=timesteps / 1000,
            img_shapes=[shapes] * noisy_latents.shape[0],
            return_dict=False,
        )[0]
        return unpack_latents(output[:, :num_tokens], height=height, width=width)

    def sample(self, request: SampleRequest) -> Frames:
        """See `ModelFamily.sample`; with pictures to edit by the Edit pipeline."""
        from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline, QwenImagePipeline

        pictures = edit.for_the_vae(request.inputs)
        texts = [request.prompt, self.negative_prompt] if request.is_guided else [request.prompt]
        embeds = [
            (self._read_prompt(text, pictures) if pictures else self.text_of_sample(text))["prompt_embeds"] for text in texts
        ]
        masks = [torch.ones(one.shape[:2], dtype=torch.long, device=one.device) for one in embeds]
        parts = {"text_encoder": None, "tokenizer": None} | ({"processor": None} if pictures else {})
        # The only sigma of one step is 1, and cannot be stretched to the last one too: that would be NaN.
        one_step = {"shift_terminal": None} if request.num_inference_steps == 1 else {}
        pipeline = build_pipeline(
            QwenImageEditPlusPipeline if pictures else QwenImagePipeline,
            device=self.device,
            transformer=self.component("dit"),
            vae=self.component("vae"),
            scheduler=FlowMatchEulerDiscreteScheduler(**(configs.SCHEDULER | one_step)),
            **parts,
        )
        arguments: dict[str, Any] = {"prompt_embeds": embeds[0], "prompt_embeds_mask": masks[0]}
        if request.is_guided:
            arguments |= {"negative_prompt_embeds": embeds[1], "negative_prompt_embeds_mask": masks[1]}
        if pictures:
            arguments["image"] = list(request.inputs)
        return run_pipeline(pipeline, request, true_cfg_scale=request.guidance_scale, **arguments)

    def repeated_blocks(self, component: str) -> list[nn.Module]:
        """See `ModelFamily.repeated_blocks`; the VAE has none."""
        module = self.component(component)
        if component == "dit":
            return list(module.transformer_blocks)
        if component == "text_encoder":
            return list(module.model.language_model.layers)
        return []

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
