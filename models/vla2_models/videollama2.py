"""VideoLLaMA 2: a vision tower, a connector and a language model, joined by the splice.

    pixel_values -> tower -> vision_features -> connector -> visual tokens ─┐
    input_ids with placeholders -> embeddings ────────────────────────────── splice -> inputs_embeds

The tower and the language model are transformers' own; what stands here is how they are joined.

Source: upstream VideoLLaMA2@c0bb03a, model/encoder.py and model/videollama2_arch.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from .config import CheckpointConfig, LanguageConfig, TowerConfig
from .connectors import build_connector

LanguageModel = MistralForCausalLM | MixtralForCausalLM | Qwen2ForCausalLM
Tower = CLIPVisionModel | SiglipVisionModel

# ids that stand for media in `input_ids`; upstream constants.py, `MODAL_INDEX_MAP`
PLACEHOLDER_IDS = {"<image>": -200, "<video>": -201, "<audio>": -202}

# config class -> the network that transformers has for it
LANGUAGE_MODELS: Mapping[type[LanguageConfig], Callable[[Any], LanguageModel]] = {
    MistralConfig: MistralForCausalLM,
    MixtralConfig: MixtralForCausalLM,
    Qwen2Config: Qwen2ForCausalLM,
}
TOWERS: Mapping[type[TowerConfig], Callable[[Any], Tower]] = {
    CLIPVisionConfig: CLIPVisionModel,
    SiglipVisionConfig: SiglipVisionModel,
}


class VideoLLaMA2(nn.Module):
    """The three networks of one checkpoint.

    Args:
        config: what the checkpoint's config.json and its tower's say.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = TOWERS[type(config.vision)](config.vision)
        self.mm_projector = build_connector(
            config.connector, config.mm_hidden_size, config.language.hidden_size
        )
        self.language_model = LANGUAGE_MODELS[type(config.language)](config.language)

    @property
    def device(self) -> torch.device:
        """Where inputs belong; the language model may be spread over more devices than this one."""
        return next(self.mm_projector.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What tower and connector are held in; a quantised language model computes in it."""
        return next(self.mm_projector.parameters()).dtype

    def encode_frames(self, pixel_values: Tensor) -> Tensor:
        """Run the tower up to the selected layer.

        Args:
            pixel_values: (F, 3, S, S) normalised frames.

        Returns:
            (F, N, C) patch features, without CLIP's class token.
        """
        tower = self.vision_tower
        hidden_states = tower.embeddings(pixel_values)
        if isinstance(tower, CLIPVisionModel):
            hidden_states = tower.pre_layrnorm(hidden_states)
        # hidden_states[k] is what enters block k, so blocks from k on never matter
        for block in tower.encoder.layers[: self.config.num_tower_blocks]:
            hidden_states = block(hidden_states, attention_mask=None)
        has_class_token = isinstance(tower, CLIPVisionModel)
        features: Tensor = hidden_states[:, 1:] if has_class_token else hidden_states
        return features

    def repeat_image(self, features: Tensor) -> Tensor:
        """Let the (1, N, C) features of an image stand for all the frames of a video.

        The reference runs the tower on as many copies of the image; the values are the same.
        """
        return features.expand(self.config.num_frames, -1, -1)

    def project(self, features: Tensor) -> Tensor:
        """Run the connector on (B, T, N, C) features.

        Returns:
            (B, num_tokens, D) visual tokens.
        """
        tokens: Tensor = self.mm_projector(features)
        return tokens

    def splice(self, input_ids: Sequence[int], visual_tokens: Sequence[Tensor]) -> Tensor:
        """Put the visual tokens where the placeholders stand.

        Args:
            input_ids: token ids of one prompt, negative where media belong.
            visual_tokens: one (num_tokens, D) tensor for each placeholder, in their order.

        Returns:
            (L, D) inputs_embeds; nothing is put around the visual tokens, nothing is cut.
        """
        ids = torch.tensor(input_ids, dtype=torch.long, device=self.device)
        places = (ids < 0).nonzero().flatten().tolist()
        if len(places) != len(visual_tokens):
            raise ValueError(
                f"the prompt has {len(places)} placeholders for {len(visual_tokens)} media"
            )
        embed = self.language_model.get_input_embeddings()
        parts: list[Tensor] = []
        start = 0
        for place, tokens in zip(places, visual_tokens, strict=True):
            parts += [embed(ids[start:place]), tokens.to(self.device, self.dtype)]
            start = place + 1
        parts.append(embed(ids[start:]))
        return torch.cat(parts)
