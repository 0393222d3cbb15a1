"""BEATs, the audio encoder: log-mel filter banks -> audio tokens; and the projector behind it.

    patches      16 x 16 squares of the filter bank, one token each: time after time, low mels first
    positions    a convolution over the row of tokens, added to them
    layers       post-norm transformer with DeepNorm; attention with a gated relative position bias

The tokens form one row for the encoder: two patches of neighbouring mels are 1 apart, two of
neighbouring times 8. There is no padding mask; silence is attended like sound.

Source: BEATs, arXiv:2212.09058, section 3; the gated bias is WavLM's, arXiv:2110.13900;
DeepNorm is arXiv:2203.00555. Upstream VideoLLaMA2@8cedfbd (branch audio_visual), model/beats.
Weights are keyed by upstream's names.
"""

from __future__ import annotations

import math
import re

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from .beats_design import GATE_WIDTH, MAX_DISTANCE, NUM_MEL_BINS, BEATsDesign
from .stc import build_readout

MEL_MEAN, MEL_STD = 15.41663, 6.55582  # of the filter banks that BEATs was trained on

# `mlp2x_gelu` and the like; what has a hundred layers is a slip
_MLP = re.compile(r"mlp([1-9]\d?)x_gelu", re.ASCII)


def find_buckets(relative: Tensor, num_buckets: int) -> Tensor:
    """Sort relative positions into buckets: near ones alone, far ones in logarithmic steps.

    Args:
        relative: int64, position of the key minus that of the query.
        num_buckets: the upper half of them is for keys after the query.

    Returns:
        int64 of the same shape, in [0, num_buckets).

    Source: T5, arXiv:1910.10683, section 2.1; in float32, which decides at the edges of buckets.
    """
    per_direction = num_buckets // 2
    num_exact = per_direction // 2
    distance = relative.abs()
    far = torch.log(distance.float() / num_exact) / math.log(MAX_DISTANCE / num_exact)
    # a distance of 0 gives minus infinity, which is no integer; it is one of the near ones
    far = num_exact + (far.clamp(min=0) * (per_direction - num_exact)).long()
    bucket = torch.where(distance < num_exact, distance, far.clamp(max=per_direction - 1))
    return bucket + per_direction * (relative > 0)


def position_bias(table: Tensor, num_tokens: int) -> Tensor:
    """Look up the bias of every pair of tokens, before a layer's gate.

    Args:
        table: (num_buckets, num_heads).
        num_tokens: N.

    Returns:
        (num_heads, N, N): head, query, key.
    """
    # on the CPU, since another device's logarithm may round to the next bucket
    relative = torch.arange(1 - num_tokens, num_tokens, device="cpu")
    buckets = find_buckets(relative, len(table)).to(table.device)
    row = table[buckets].T  # (H, 2N - 1), by relative position
    # each query sees a stretch of N of that row; the first query the last stretch, from 0 up
    return row.unfold(1, num_tokens, 1).flip(1)  # (H, N, N)


class PositionalConv(nn.Module):
    """A grouped convolution over the row of tokens, with one norm for each of its taps."""

    def __init__(self, hidden_size: int, num_taps: int, num_groups: int) -> None:
        super().__init__()
        self.num_groups = num_groups
        group_size = hidden_size // num_groups
        std = (4 / (num_taps * hidden_size)) ** 0.5
        self.weight_g = nn.Parameter(torch.ones(1, 1, num_taps))
        self.weight_v = nn.Parameter(torch.randn(hidden_size, group_size, num_taps) * std)
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Turn (B, N, D) tokens into what is added to them."""
        num_tokens, num_taps = x.shape[1], self.weight_g.shape[-1]
        v = self.weight_v.float()
        # upstream's epsilon, inside the root; Microsoft's BEATs has none
        rnorm = torch.rsqrt(v.square().sum((0, 1), keepdim=True) + 1e-6)
        weight = (self.weight_g.float() * v * rnorm).to(x.dtype)
        x = x.transpose(1, 2)
        if x.is_cuda and not torch.is_grad_enabled():
            y = self.multiply(x, weight)
        else:
            y = functional.conv1d(
                x, weight, self.bias, padding=num_taps // 2, groups=self.num_groups
            )
        # an even number of taps leaves one position too many, at the end
        return functional.gelu(y[..., :num_tokens]).transpose(1, 2)

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve (B, D, N) by one matrix product for each group.

        cuDNN has no fast kernel for so many taps: half a minute of sound took 12.7 ms of an H200 in
        bfloat16, and this product 0.45. It holds each token once for every tap, 0.3 GB here, which
        training would have to keep.
        """
        num_taps = weight.shape[2]
        padded = functional.pad(x, (num_taps // 2, num_taps // 2))
        windows = rearrange(
            padded.unfold(2, num_taps, 1), "b (g c) n t -> b g n (c t)", g=self.num_groups
        )
        taps = rearrange(weight, "(g d) c t -> g (c t) d", g=self.num_groups)
        return rearrange(windows @ taps, "b g n d -> b (g d) n") + self.bias[:, None]


class GatedAttention(nn.Module):
    """Self-attention whose position bias each query scales by a gate of its own."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.grep_linear = nn.Linear(hidden_size // num_heads, GATE_WIDTH)
        self.grep_a = nn.Parameter(torch.ones(1, num_heads, 1, 1))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Attend over all tokens.

        Args:
            x: (B, N, D).
            bias: (num_heads, N, N), from `position_bias`.

        Returns:
            (B, N, D).
        """
        q, k, v = (
            rearrange(projection(x), "b n (h d) -> b h n d", h=self.num_heads)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out: Tensor = self.out_proj(self.attend(q, k, v, bias, self.gate(q)))
        return out

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
        """Attend with the gated bias: (B, num_heads, N, head_dim) to (B, N, D)."""
        # upstream divides the scores by 32 and multiplies again, to stay in the range of float16;
        # this function keeps them in float32, so that there is nothing to do
        x = functional.scaled_dot_product_attention(q, k, v, attn_mask=gate * bias)
        return rearrange(x, "b h n d -> b n (h d)")

    def gate(self, q: Tensor) -> Tensor:
        """Tell by how much each query scales its bias, from the query before it is scaled itself.

        Args:
            q: (B, num_heads, N, head_dim).

        Returns:
            (B, num_heads, N, 1), between 1 and 2 where `grep_a` is 1, with which training began.
        """
        gates = rearrange(self.grep_linear(q), "b h n (two four) -> two b h n 1 four", two=2)
        update, reset = gates.sum(-1).sigmoid()
        scale: Tensor = update * (reset * self.grep_a - 1) + 2
        return scale


class EncoderLayer(nn.Module):
    """Attention and a feed-forward part, each normalised after its sum with the input."""

    def __init__(self, design: BEATsDesign) -> None:
        super().__init__()
        hidden_size, intermediate_size = design.hidden_size, design.intermediate_size
        # DeepNorm, of an encoder alone: the deeper it is, the more of the input is kept
        self.alpha = (2 * design.num_layers) ** 0.25
        self.self_attn = GatedAttention(hidden_size, design.num_heads)
        self.self_attn_layer_norm = nn.LayerNorm(hidden_size)
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)
        self.final_layer_norm = nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Turn (B, N, D) into (B, N, D); the bias as in `GatedAttention`."""
        x = self.self_attn_layer_norm(self.alpha * x + self.self_attn(x, bias))
        y = self.fc2(functional.gelu(self.fc1(x)))
        out: Tensor = self.final_layer_norm(self.alpha * x + y)
        return out


class Encoder(nn.Module):
    """The transformer on a row of tokens; no norm follows its last layer."""

    def __init__(self, design: BEATsDesign) -> None:
        super().__init__()
        conv = PositionalConv(design.hidden_size, design.conv_pos, design.conv_pos_groups)
        self.pos_conv = nn.Sequential(conv)
        self.layer_norm = nn.LayerNorm(design.hidden_size)
        self.layers = nn.ModuleList(EncoderLayer(design) for _ in range(design.num_layers))
        # a part of the first layer, though every layer uses it: that is its name in checkpoints
        table = nn.Embedding(design.num_buckets, design.num_heads)
        self.get_submodule("layers.0.self_attn").add_module("relative_attention_bias", table)

    @property
    def bias_table(self) -> Tensor:
        """The (num_buckets, num_heads) biases that all layers share."""
        return self.get_parameter("layers.0.self_attn.relative_attention_bias.weight")

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Turn (B, N, D) tokens into (B, N, D); a bias that is given is what `position_bias` is."""
        x = self.layer_norm(x + self.pos_conv(x))
        if bias is None:  # once: 107 MB in float32 for half a minute
            bias = position_bias(self.bias_table, x.shape[1])
        for layer in self.layers:
            x = layer(x, bias)
        return x


class BEATs(nn.Module):
    """Encode filter banks; the weights are random until a checkpoint's are loaded."""

    def __init__(self, design: BEATsDesign) -> None:
        super().__init__()
        self.design = design
        embed_dim, hidden_size = design.embed_dim, design.hidden_size
        size = design.patch_size
        self.patch_embedding = nn.Conv2d(1, embed_dim, size, stride=size, bias=False)
        self.layer_norm = nn.LayerNorm(embed_dim)
        self.post_extract_proj: nn.Module = nn.Identity()
        if embed_dim != hidden_size:
            self.post_extract_proj = nn.Linear(embed_dim, hidden_size)
        self.encoder = Encoder(design)
        if design.num_classes is not None:
            self.predictor = nn.Linear(hidden_size, design.num_classes)

    def forward(self, fbank: Tensor) -> Tensor:
        """Encode filter banks of equal length.

        Args:
            fbank: (B, T, 128) log-mel energies of sound in the range of int16, any float dtype.

        Returns:
            (B, `design.count_tokens(T)`, hidden_size) in the weights' dtype: time after time, of
            each the patches from low to high mels.

        Raises:
            ValueError: the shape is another, or T is less than one patch.
        """
        tokens: Tensor = self.encoder(self.embed(fbank))
        return tokens

    def embed(self, fbank: Tensor) -> Tensor:
        """Make the tokens that the encoder is given; sizes and errors as in `forward`."""
        if (
            fbank.ndim != 3
            or fbank.shape[2] != NUM_MEL_BINS
            or fbank.shape[1] < self.design.patch_size
        ):
            raise ValueError(
                f"fbank has shape {tuple(fbank.shape)}, expected (B, T, {NUM_MEL_BINS}) with T at "
                f"least {self.design.patch_size}"
            )
        # twice the deviation, as upstream and BEATs have it
        x = (fbank.float() - MEL_MEAN) / (2 * MEL_STD)
        x = x.to(self.patch_embedding.weight.dtype)
        x = self.patch_embedding(x[:, None])  # (B, E, T // 16, 8)
        x = rearrange(x, "b e t f -> b (t f) e")
        tokens: Tensor = self.post_extract_proj(self.layer_norm(x))  # (B, N, D)
        return tokens

    def classify(self, fbank: Tensor) -> Tensor:
        """Tell which sounds there are, by the fine-tuned head.

        Args:
            fbank: as in `forward`.

        Returns:
            (B, num_classes) probabilities; they are independent and do not sum to 1.

        Raises:
            ValueError: as `forward`, or there is no such head.
        """
        if self.design.num_classes is None:
            raise ValueError("num_classes is None, this BEATs has no head to classify with")
        logits = self.predictor(self(fbank))  # (B, N, num_classes)
        probabilities: Tensor = logits.mean(1).sigmoid()
        return probabilities


def is_audio_projector_type(name: str) -> bool:
    """Tell whether `build_audio_projector` knows this type."""
    return name in ("linear", "identity") or _MLP.fullmatch(name) is not None


def build_audio_projector(
    projector_type: str, mm_hidden_size_a: int, hidden_size: int
) -> nn.Module:
    """Build what takes audio tokens to the width of the language model, with random weights.

    Args:
        projector_type: `mm_projector_a_type`: "linear", "identity", or "mlp2x_gelu" and the like.
        mm_hidden_size_a: width of BEATs.
        hidden_size: width of the language model.

    Returns:
        A module from (B, N, mm_hidden_size_a) to (B, N, hidden_size).

    Raises:
        ValueError: the type is another, or is "identity" between two widths.

    Source: upstream VideoLLaMA2@8cedfbd, model/projector.py, `build_audio_projector`, which
    returns nothing for other types.
    """
    if projector_type == "linear":
        return nn.Linear(mm_hidden_size_a, hidden_size)
    if projector_type == "identity":
        if mm_hidden_size_a != hidden_size:
            raise ValueError(
                f"projector_type 'identity' between widths {mm_hidden_size_a} and {hidden_size}, "
                "expected equal widths"
            )
        return nn.Identity()
    match = _MLP.fullmatch(projector_type)
    if match is None:
        raise ValueError(
            f"projector_type {projector_type!r} is unknown, expected linear, identity or "
            "mlp2x_gelu and the like"
        )
    return build_readout(mm_hidden_size_a, hidden_size, int(match[1]))
