"""VideoLLaMA 2: a vision tower, a connector and a language model, joined by the splice.

    pixel_values -> tower -> vision_features -> connector -> visual tokens ─┐
    input_ids with placeholders -> embeddings ────────────────────────────── splice -> inputs_embeds
    fbank -> audio tower -> features -> audio projector -> audio tokens ────┘

The tower and the language model are transformers' own, the audio tower is BEATs, which a checkpoint
may lack; what stands here is how they are joined.

Source: upstream VideoLLaMA2@c0bb03a, model/encoder.py and model/videollama2_arch.py; for the ears
its branch audio_visual at 8cedfbd.
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

from .beats import BEATs, build_audio_projector
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
    """The networks of one checkpoint: three, or five where it has ears.

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
        self.audio_tower: BEATs | None = None
        self.mm_projector_a: nn.Module | None = None
        if config.audio is not None:
            design = config.audio.design
            self.audio_tower = BEATs(design)
            self.mm_projector_a = build_audio_projector(
                config.audio.projector_type, design.hidden_size, config.language.hidden_size
            )
        self.language_model = LANGUAGE_MODELS[type(config.language)](config.language)

    @property
    def device(self) -> torch.device:
        """Where inputs belong; the language model may be spread over more devices than this one."""
        return next(self.vision_tower.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What tower and connector are held in; a quantised language model computes in it."""
        return next(self.vision_tower.parameters()).dtype

    @property
    def front(self) -> list[nn.Module]:
        """All but the language model: what stays whole, together on `device`."""
        return [part for part in self.children() if part is not self.language_model]

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

    def repeat_image(self, features: Tensor, num_frames: int | None = None) -> Tensor:
        """Let the (1, N, C) features of an image stand for all the frames of a video.

        The reference runs the tower on as many copies of the image; the values are the same.

        Args:
            features: of the image.
            num_frames: of a video; None: the checkpoint's.
        """
        return features.expand(num_frames or self.config.num_frames, -1, -1)

    def project(self, features: Tensor) -> Tensor:
        """Run the connector on (B, T, N, C) features.

        Returns:
            (B, num_tokens, D) visual tokens.
        """
        tokens: Tensor = self.mm_projector(features)
        return tokens

    def encode_sound(self, fbank: Tensor) -> Tensor:
        """Run the audio tower.

        Args:
            fbank: (B, T, 128) log-mel energies, not normalised.

        Returns:
            (B, N, C) features.

        Raises:
            ValueError: the checkpoint has no ears.
        """
        if self.audio_tower is None:
            raise ValueError("the checkpoint has no audio tower")
        features: Tensor = self.audio_tower(fbank.to(self.device))
        return features

    def project_sound(self, features: Tensor) -> Tensor:
        """Run the audio projector on (B, N, C) features.

        Returns:
            (B, N, D) audio tokens.

        Raises:
            ValueError: the checkpoint has no ears.
        """
        if self.mm_projector_a is None:
            raise ValueError("the checkpoint has no audio projector")
        tokens: Tensor = self.mm_projector_a(features)
        return tokens

    def splice(self, input_ids: Sequence[int], media_tokens: Sequence[Tensor]) -> Tensor:
        """Put the tokens of media where the placeholders stand.

        Args:
            input_ids: token ids of one prompt, negative where media belong.
            media_tokens: one (num_tokens, D) tensor for each placeholder, in their order; of a
                video with its sound the visual tokens, then the audio tokens.

        Returns:
            (L, D) inputs_embeds; nothing is put around the tokens, nothing is cut.
        """
        ids = torch.tensor(input_ids, dtype=torch.long, device=self.device)
        places = (ids < 0).nonzero().flatten().tolist()
        if len(places) != len(media_tokens):
            raise ValueError(
                f"the prompt has {len(places)} placeholders for {len(media_tokens)} media"
            )
        embed = self.language_model.get_input_embeddings()
        parts: list[Tensor] = []
        start = 0
        for place, tokens in zip(places, media_tokens, strict=True):
            parts += [embed(ids[start:place]), tokens.to(self.device, self.dtype)]
            start = place + 1
        parts.append(embed(ids[start:]))
        return torch.cat(parts)
