"""The networks as they are trained: a batch in, one loss out.

    frames of all rows -> tower -> connector ─┐
    sounds of all rows -> audio tower -> ─────┴─ splice -> language model -> loss
                                                └─ (word targets) -> norm, lm_head -> second loss

Source: upstream VideoLLaMA2@c0bb03a, model/videollama2_arch.py,
`prepare_inputs_labels_for_multimodal`; the loss is that of transformers' causal language models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from vla2_models.beats_design import NUM_MEL_BINS
from vla2_models.videollama2 import VideoLLaMA2
from vla2cli.train.conversation import IGNORED
from vla2cli.train.media import Media
from vla2cli.train.splice import Spliced, attention_mask_of, splice_rows


class TrainedNetwork(nn.Module):
    """A checkpoint's networks with the loss of a batch; what is frozen runs without gradients.

    Args:
        model: the networks; their `requires_grad` says what is trained.
        num_frames: that an image is repeated to; None: the checkpoint's.
    """

    # transformers' Trainer counts the learned tokens of all micro-batches and passes the number
    accepts_loss_kwargs = True

    def __init__(self, model: VideoLLaMA2, num_frames: int | None = None) -> None:
        super().__init__()
        self.model, self.num_frames = model, num_frames

    @property
    def _decoder(self) -> nn.Module:
        # by its accessor, which also finds it where LoRA is wrapped around the language model
        decoder: nn.Module = self.model.language_model.get_decoder()  # type: ignore[no-untyped-call]  # transformers
        return decoder

    @property
    def _head(self) -> nn.Module:
        head: nn.Module = self.model.language_model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers
        return head

    def enable_checkpointing(self) -> None:
        """Keep only the inputs of the language model's and the tower's blocks for backward."""
        for part in (self.model.language_model, self.model.vision_tower):
            # transformers renamed it, and warns of the older name
            enable = getattr(part, "activation_checkpointing_enable", None)
            (enable or part.gradient_checkpointing_enable)({"use_reentrant": False})

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        media: Sequence[Media],
        segments: Tensor | None = None,
        word_targets: Sequence[Tensor | None] | None = None,
        word_weight: float = 0.0,
        left_open: Sequence[Tensor | None] | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch as `Collator` makes it.

        Args:
            input_ids: (B, L) with one negative id at most in each row.
            attention_mask: (B, L) bool, False for the padding on the right.
            labels: (B, L), `IGNORED` where nothing is learned.
            media: what belongs at each row's placeholder; one object in several rows is encoded
                once.
            segments: (B, L), 0 for what a packed row's conversations share, k for conversation k.
            word_targets: for each row (num_media_tokens, K) words that the media's tokens are to
                name by themselves, `IGNORED` for none; None for a row without.
            word_weight: of that second loss, the mean over all words that are given.
            left_open: for each row the ids that are out of the choice in both losses, but where
                one is the label itself; None for none.
            num_items_in_batch: learned tokens of all micro-batches and processes that make one
                step; None for those of this batch.

        Returns:
            `loss`, and when the module is evaluated `logits` (B, L', V) of the spliced rows, of
            all ids.
        """
        tokens = self.encode(media)
        spliced = splice_rows(self.model, input_ids, attention_mask, labels, tokens, segments)
        hidden, router_loss = self._read(spliced)
        row, position = spliced.learned
        logits = self._head(hidden[row, spliced.predictors[row, position]])
        is_open = None if left_open is None else _mark(left_open, logits)
        labels = spliced.labels[row, position]
        if is_open is not None:
            # the label may be a piece of another word
            barred = is_open[row].scatter(1, labels[:, None], False)
            logits = logits.masked_fill(barred, -torch.inf)
        total = functional.cross_entropy(logits.float(), labels, reduction="sum")
        # at least 1: there may be nothing but bad samples in the whole step
        counted = len(row) if num_items_in_batch is None else num_items_in_batch
        num_items = torch.as_tensor(counted, device=total.device).clamp(min=1)
        loss = total / num_items
        # the other losses are means: they count as much as this batch's tokens do in the step
        share = len(row) / num_items
        loss = loss + share * router_loss
        if word_targets is not None and word_weight:
            word_loss = self._word_loss(media, tokens, word_targets, is_open)
            loss = loss + share * word_weight * word_loss
        loss = loss + self._unused(media)
        return {"loss": loss} if self.training else {"loss": loss, "logits": self._head(hidden)}

    @torch.no_grad()
    def recite(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        media: Sequence[Media],
        segments: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tell which of the learned tokens the network finds likeliest, given those before them.

        An answer whose tokens all are is the one that greedy decoding gives.

        Args:
            input_ids: as in `forward`, like all the others.
            attention_mask: the same.
            labels: the same.
            media: the same.
            segments: of packed rows.

        Returns:
            For each learned token, (N,): its row, its conversation in the row, and whether it is.
        """
        tokens = self.encode(media)
        spliced = splice_rows(self.model, input_ids, attention_mask, labels, tokens, segments)
        assert spliced.segments is not None, "rows that are not packed"
        hidden, _ = self._read(spliced)
        row, position = spliced.learned
        said = self._head(hidden[row, spliced.predictors[row, position]]).argmax(-1)
        return row, spliced.segments[row, position], said == spliced.labels[row, position]

    def _read(self, spliced: Spliced) -> tuple[Tensor, Tensor | float]:
        """Run the language model without its head; a router's own loss, or 0."""
        config = self.model.language_model.config
        routes = bool(getattr(config, "output_router_logits", False))
        output = self._decoder(
            inputs_embeds=spliced.inputs_embeds,
            attention_mask=attention_mask_of(spliced, config),
            position_ids=spliced.position_ids,
            use_cache=False,
            **({"output_router_logits": True} if routes else {}),
        )
        if not routes:
            return output.last_hidden_state, 0.0
        balance = load_balancing_loss_func(
            output.router_logits,
            config.num_local_experts,
            config.num_experts_per_tok,
            spliced.attention_mask,
        )
        return output.last_hidden_state, config.router_aux_loss_coef * balance

    def encode(self, media: Sequence[Media]) -> list[Tensor | None]:
        """Encode what the rows are given: (num_tokens, D) each, the visual ones before the sound's.

        Rows that share an object share its tokens.
        """
        different = list({id(medium): medium for medium in media}.values())
        visual = self._see([m for m in different if m.pixel_values is not None])
        audio = self._hear([m for m in different if m.fbank is not None])
        tokens = {}
        for medium in different:
            parts = [found[id(medium)] for found in (visual, audio) if id(medium) in found]
            tokens[id(medium)] = torch.cat(parts) if parts else None
        return [tokens[id(medium)] for medium in media]

    def _see(self, media: Sequence[Media]) -> dict[int, Tensor]:
        if not media:
            return {}
        model = self.model
        clips = [medium.pixel_values for medium in media if medium.pixel_values is not None]
        with _frozen_without_grad(model.vision_tower):
            frames = torch.cat(clips).to(model.device, model.dtype)
            features = torch.split(model.encode_frames(frames), [len(clip) for clip in clips])
            by_length: dict[int, dict[int, Tensor]] = {}
            for medium, of_clip in zip(media, features, strict=True):
                if medium.is_image:
                    of_clip = model.repeat_image(of_clip, self.num_frames)
                by_length.setdefault(len(of_clip), {})[id(medium)] = of_clip
        tokens: dict[int, Tensor] = {}
        for clips_of_length in by_length.values():
            projected = model.project(torch.stack(list(clips_of_length.values())))
            tokens |= zip(clips_of_length, projected, strict=True)
        return tokens

    def _hear(self, media: Sequence[Media]) -> dict[int, Tensor]:
        if not media:
            return {}
        model = self.model
        if model.audio_tower is None or model.mm_projector_a is None:
            raise ValueError("the batch has sound, the model has no audio branch")
        with _frozen_without_grad(model.audio_tower):
            fbanks = torch.cat([medium.fbank for medium in media if medium.fbank is not None])
            features = model.encode_sound(fbanks)
        projected = model.project_sound(features)
        return dict(zip((id(medium) for medium in media), projected, strict=True))

    def _word_loss(
        self,
        media: Sequence[Media],
        tokens: Sequence[Tensor | None],
        word_targets: Sequence[Tensor | None],
        is_open: Tensor | None,
    ) -> Tensor:
        """Mean cross-entropy of the words that the media's tokens are to name."""
        # rows that share a medium have its words once, packed or not
        rows = enumerate(zip(media, tokens, word_targets, strict=True))
        different = {id(m): (t, w, row) for row, (m, t, w) in rows if w is not None}.values()
        for media_tokens, words, _ in different:
            found = 0 if media_tokens is None else len(media_tokens)
            if len(words) != found:
                raise ValueError(
                    f"word_targets for {len(words)} tokens of media, there are {found}"
                )
        if not different:
            return torch.zeros((), device=self.model.device)
        media_tokens = torch.cat([t for t, _, _ in different if t is not None])
        num_words = max(words.shape[1] for _, words, _ in different)
        words = torch.cat(
            [functional.pad(w, (0, num_words - w.shape[1]), value=IGNORED) for _, w, _ in different]
        ).to(media_tokens.device)
        is_named = (words != IGNORED).any(1)
        logits = self._name(media_tokens[is_named])
        if is_open is not None:
            barred = torch.cat([is_open[row].expand(len(w), -1) for _, w, row in different])
            logits = logits.masked_fill(barred[is_named], -torch.inf)
        words = words[is_named]
        is_word = words != IGNORED
        named = logits.log_softmax(-1).gather(1, words.clamp(min=0))[is_word]
        return -named.sum() / max(named.numel(), 1)

    def _name(self, media_tokens: Tensor) -> Tensor:
        """Read (N, D) tokens with the language model's own norm and head: (N, V) float32."""
        norm = self._decoder.get_submodule("norm")
        dtype = next(norm.parameters()).dtype
        logits: Tensor = self._head(norm(media_tokens.to(dtype))).float()
        return logits

    def _unused(self, media: Sequence[Media]) -> Tensor | float:
        """Run what is trained and has no input in this batch on blanks, for a gradient of 0.

        Other processes wait for the gradients, and under some for the very call, of each part.
        """
        if not self.training:
            return 0.0
        model = self.model
        blanks: list[Tensor] = []
        if _is_trained(model.vision_tower, model.mm_projector) and not any(
            medium.pixel_values is not None for medium in media
        ):
            size = model.config.vision.image_size
            assert isinstance(size, int), size
            frames = torch.zeros(model.config.connector.min_frames, 3, size, size)
            blanks += self._see([Media(pixel_values=frames)]).values()
        if (
            model.audio_tower is not None
            and _is_trained(model.audio_tower, model.mm_projector_a)
            and not any(medium.fbank is not None for medium in media)
        ):
            # one row of patches
            fbank = torch.zeros(1, model.audio_tower.design.patch_size, NUM_MEL_BINS)
            blanks += self._hear([Media(fbank=fbank)]).values()
        return sum((0.0 * tokens.float().sum() for tokens in blanks), 0.0)


def _mark(left_open: Sequence[Tensor | None], logits: Tensor) -> Tensor:
    """Mark the ids of each row: (rows, V) bool."""
    shape = len(left_open), logits.shape[-1]
    is_open = torch.zeros(shape, dtype=torch.bool, device=logits.device)
    for row, ids in zip(is_open, left_open, strict=True):
        if ids is not None:
            row[ids] = True
    return is_open


def _is_trained(*parts: nn.Module | None) -> bool:
    return any(p.requires_grad for part in parts if part is not None for p in part.parameters())


@contextmanager
def _frozen_without_grad(part: nn.Module) -> Iterator[None]:
    # for towers, before which nothing is trained; a frozen connector passes gradients on
    with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trained(part)):
        yield
