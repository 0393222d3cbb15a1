"""How much a stage has to do: floating-point operations, or bytes where reading them is the limit.

A multiplication and the addition that follows are two operations. What is counted is what the
result needs: no product with a zero that only pads, no attention to what a token cannot see.
Networks in front of the language model are counted by torch's own counter, run on shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig

from vla2_models.config import CheckpointConfig, LanguageConfig
from vla2_models.stc import ConnectorDesign, grid_side
from vla2_models.videollama2 import VideoLLaMA2


@dataclass(frozen=True)
class Work:
    """What one run of a stage needs; a stage without a known limit has neither."""

    gflop: float | None = None  # 10**9 operations
    gb: float | None = None  # 10**9 bytes that have to be read

    @property
    def limit(self) -> str | None:
        """What bounds it: `product`, the rate of a large GEMM, or `copy`, that of memory."""
        if self.gb is not None:
            return "copy"
        return None if self.gflop is None else "product"


def tower_flops(model: VideoLLaMA2, num_frames: int) -> int:
    """Count the vision tower; `model` is on the meta device here and below."""
    frame = torch.empty(1, *frame_shape(model.config), device="meta")
    return num_frames * count_flops(lambda: model.encode_frames(frame))


def frame_shape(config: CheckpointConfig) -> tuple[int, int, int]:
    """Return channels, height and width of what the tower is given."""
    size = config.vision.image_size
    assert isinstance(size, int), f"image_size is {size!r}, it was checked to be a number"
    return 3, size, size


def connector_flops(model: VideoLLaMA2, num_frames: int) -> int:
    """Count the connector, without the products of its Conv3d with padding zeros."""
    config = model.config
    shape = (1, num_frames, config.num_patches, config.mm_hidden_size)
    all_flops = count_flops(lambda: model.project(torch.empty(shape, device="meta")))
    if not config.connector.is_convolution:
        return all_flops
    [convolution] = [m for m in model.mm_projector.modules() if isinstance(m, nn.Conv3d)]
    covered, real = count_positions(config.connector, num_frames, config.num_patches)
    # kernel and stride are equal: each position meets one matrix of the kernel, once
    width = convolution.in_channels * convolution.out_channels
    return all_flops - 2 * (covered - real) * width


def count_positions(design: ConnectorDesign, num_frames: int, num_patches: int) -> tuple[int, int]:
    """Count the positions of (time, height, width) that a convolution's windows cover.

    Returns:
        All of them, and those that hold a feature and no padding zero.
    """
    assert design.kernel is not None, "a mean over time has no windows"
    side = grid_side(num_patches)
    sizes = (num_frames, side, side)
    covered = [
        (size + 2 * design.padding) // step * step for size, step in zip(sizes, design.kernel)
    ]
    real = [min(size, reach - design.padding) for size, reach in zip(sizes, covered)]
    return prod(covered), prod(real)


def sound_flops(model: VideoLLaMA2) -> int:
    """Count the audio tower and its projector on what a checkpoint hears at once."""
    assert model.config.audio is not None, "the checkpoint has no ears"
    fbank = torch.empty(1, model.config.audio.window.num_frames, 128, device="meta")
    return count_flops(lambda: model.project_sound(model.encode_sound(fbank)))


def count_flops(run: Callable[[], object]) -> int:
    """Count what a function computes on the meta device, where it takes no time."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        run()
    return int(counter.get_total_flops())


def prefill_flops(config: LanguageConfig, num_tokens: int) -> int:
    """Count the language model on a prompt, with the logits of its last position alone.

    A mixture of experts is counted with those that a token is sent to. Counted by hand: which
    experts run depends on values, and shapes alone have none.
    """
    pairs = num_tokens * (num_tokens + 1) // 2  # a token sees itself and those before it
    attention = 4 * pairs * config.num_attention_heads * _head_dim(config)
    layer = 2 * num_tokens * _layer_weights(config) + attention
    return config.num_hidden_layers * layer + 2 * _head_weights(config)


def token_bytes(config: LanguageConfig, num_tokens: int, itemsize: int) -> int:
    """Count the bytes read to add one token: weights used, and the keys and values so far."""
    cached = 2 * num_tokens * _kv_heads(config) * _head_dim(config)
    layer = _layer_weights(config) + cached
    return itemsize * (config.num_hidden_layers * layer + _head_weights(config))


def _layer_weights(config: LanguageConfig) -> int:
    """Count the weights of a layer's products that one token meets."""
    hidden, head_dim = config.hidden_size, _head_dim(config)
    attention = 2 * hidden * head_dim * (config.num_attention_heads + _kv_heads(config))
    mlp = 3 * hidden * config.intermediate_size
    if isinstance(config, MixtralConfig):
        router = hidden * config.num_local_experts
        return attention + router + config.num_experts_per_tok * mlp
    return attention + mlp


def _head_weights(config: LanguageConfig) -> int:
    return config.vocab_size * config.hidden_size


def _head_dim(config: LanguageConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _kv_heads(config: LanguageConfig) -> int:
    return config.num_key_value_heads or config.num_attention_heads
