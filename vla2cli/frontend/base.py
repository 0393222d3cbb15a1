"""What every front-end does: pictures and sound in, tokens for the language model out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Frontend(Protocol):
    """Towers and connectors of one checkpoint, however they are run."""

    def vision_features(self, pixel_values: Sequence[Tensor]) -> list[Tensor]:
        """Run the tower on the frames of several clips at once.

        Args:
            pixel_values: (T, 3, S, S) float32 each; an image has T = 1.

        Returns:
            (T, N, C) features each.
        """

    def visual_tokens(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Run the connector on the (T, N, C) features of several clips.

        Returns:
            (num_tokens, D) tokens each.
        """

    def listen(self, fbank: Tensor) -> tuple[Tensor, Tensor]:
        """Run the audio tower and its projector on a (1, R, 128) bfloat16 fbank.

        Returns:
            (1, num_tokens, C) features and (1, num_tokens, D) tokens.

        Raises:
            ValueError: the checkpoint has no ears.
        """
