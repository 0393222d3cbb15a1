"""VideoLLaMA 2: a vision tower, a connector and a language model, joined by the splice.

    pixel_values -> tower -> vision_features -> connector -> visual tokens ─┐
    input_ids with placeholders -> embeddings ────────────────────────────── splice -> inputs_embeds

The tower and the language model are transformers' own; what stands here is how they are joined.

Source: upstream VideoLLaMA2@c0bb03a, model/encoder.py and model/videollama2_arch.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, MistralForCausalLM

from .config import CheckpointConfig
from .stc import STCConnector

# ids that stand for media in `input_ids`; upstream constants.py, `MODAL_INDEX_MAP`
PLACEHOLDER_IDS = {"<image>": -200, "<video>": -201, "<audio>": -202}

# attribute of `VideoLLaMA2` -> how the public checkpoints begin its tensors' names
PUBLIC_PREFIXES = {
    "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "mm_projector.": "model.mm_projector.",
    "language_model.": "",
}


def public_name(name: str) -> str:
    """Turn a parameter's name in `VideoLLaMA2` into its name in the public checkpoints."""
    for prefix, public_prefix in PUBLIC_PREFIXES.items():
        if name.startswith(prefix):
            return public_prefix + name.removeprefix(prefix)
    raise ValueError(f"'{name}' belongs to no part of VideoLLaMA2")


class VideoLLaMA2(nn.Module):
    """The three networks of one checkpoint.

    Args:
        config: what the checkpoint's config.json and its tower's say.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = CLIPVisionModel(config.vision)
        self.mm_projector = STCConnector(config.mm_hidden_size, config.language.hidden_size)
        self.language_model = MistralForCausalLM(config.language)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.language_model.lm_head.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are held in."""
        dtype: torch.dtype = self.language_model.lm_head.weight.dtype
        return dtype

    def encode_frames(self, pixel_values: Tensor) -> Tensor:
        """Run the tower up to the selected layer.

        Args:
            pixel_values: (F, 3, S, S) normalised frames.

        Returns:
            (F, N, C) patch features, without the class token.
        """
        tower = self.vision_tower
        hidden_states = tower.pre_layrnorm(tower.embeddings(pixel_values))
        # hidden_states[k] is what enters block k, so blocks from k on never matter
        for block in tower.encoder.layers[: self.config.num_tower_blocks]:
            hidden_states = block(hidden_states, attention_mask=None)
        features: Tensor = hidden_states[:, 1:]
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
