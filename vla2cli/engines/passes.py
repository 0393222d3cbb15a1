"""The passes of a language model over the slots of a batch: which tokens, where, seeing what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import MixtralConfig, Qwen2Config
from transformers.modeling_utils import PreTrainedModel

from vla2_models.errors import one_line
from vla2cli.engines.attention import attending_to_slots
from vla2cli.engines.base import Ids
from vla2cli.engines.graphs import DecodeGraphs
from vla2cli.engines.slots import SlotCache
from vla2cli.errors import is_out_of_memory

MOST_TOKENS = 2048  # that are read in one pass, which bounds the memory of activations


class Passes:
    """A language model and the keys and values of its rows.

    Args:
        model: a causal language model of transformers.
        num_slots: rows at most.
        device: where prompts come from and logits go.
        say: told when passes cannot be recorded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_slots: int,
        device: torch.device,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.model = model
        self.device = device
        self.cache = SlotCache(num_slots)
        self._say = say
        self._graphs: DecodeGraphs | None = None
        if can_record(model, device):
            self._graphs = DecodeGraphs(self._decode_by_products, self.cache, device)

    def prefill(self, slot: int, prompts: Sequence[Tensor], start: int) -> Tensor:
        """Read prompts into slots, a piece of all of them at a time.

        Args:
            slot: the first of as many slots as there are prompts.
            prompts: (L, D) inputs_embeds, each longer than `start`.
            start: positions that the slots hold already.

        Returns:
            (B, V) float32 logits at the last position of each prompt.
        """
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        # what fills a shorter prompt up stands behind it, where nothing of it is looking
        embeds = pad_sequence([prompt[start:] for prompt in prompts], batch_first=True)
        end = start + embeds.shape[1]
        size = max(1, MOST_TOKENS // len(prompts))
        hidden = embeds.new_empty(len(prompts), embeds.shape[-1])
        for first in range(start, end, size):
            positions = torch.arange(first, min(first + size, end), device=self.device)
            read = self._read(
                slice(slot, slot + len(prompts)),
                first,
                positions.expand(len(prompts), -1),
                end=min(first + size, end),
                inputs_embeds=embeds[:, positions - start],
            )
            is_last = last[:, None] == positions
            hidden[is_last.any(-1)] = read[is_last].to(hidden.device)
        return self._logits(hidden)

    def decode(self, ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Read one more token of each of the first rows.

        Args:
            ids: one for each row.
            positions: where it stands.

        Returns:
            (B, V) float32 logits behind it.
        """
        if self._graphs is not None:
            try:
                return self._graphs(ids, positions)
            except Exception as error:
                if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
                    raise
                self._graphs = None
                self._say(f"passes cannot be recorded, which is slower: {one_line(error)[:200]}")
        places = torch.tensor(positions, device=self.device)[:, None]
        tokens = torch.tensor(ids, device=self.device)[:, None]
        return self._decode(tokens, places, max(positions) + 1)

    def _decode_by_products(self, tokens: Tensor, positions: Tensor, end: int) -> Tensor:
        with attending_to_slots(self.model):
            return self._decode(tokens, positions, end)

    def _decode(self, tokens: Tensor, positions: Tensor, end: int) -> Tensor:
        rows = slice(0, len(tokens))
        hidden = self._read(rows, positions, positions, end=end, input_ids=tokens)
        return self._logits(hidden[:, -1])

    def drop(self, num_slots: int) -> None:
        """Give all memory back and begin anew with so many rows."""
        if self._graphs is not None:
            self._graphs.clear()
        self.cache.drop(num_slots)

    def weigh(
        self, slot: int, lengths: Sequence[int], options: Sequence[Sequence[Ids]], logits: Tensor
    ) -> list[tuple[float, ...]]:
        """Sum the log-probabilities of options behind prompts that were just read.

        All options of a prompt are read in one pass, beside each other: each sees the prompt and
        itself, from the position behind the prompt on.

        Args:
            slot: the first of as many slots as there are prompts.
            lengths: of the prompts.
            options: of each prompt; each with the id that ends it.
            logits: (B, V) at the last position of each prompt.

        Returns:
            For each prompt one sum for each of its options.
        """
        sums: list[list[float]] = [[] for _ in lengths]
        first = logits.log_softmax(-1)
        size = max(1, MOST_TOKENS // len(lengths))
        each = (_in_pieces(of_row, size) for of_row in options)
        for pieces in zip_longest(*each, fillvalue=()):
            for of_row, found in zip(sums, self._weigh(slot, lengths, pieces, first), strict=True):
                of_row += found
        return [tuple(of_row) for of_row in sums]

    def _weigh(
        self, slot: int, lengths: Sequence[int], options: Sequence[Sequence[Ids]], first: Tensor
    ) -> Iterator[list[float]]:
        # each option without its last id, after which nothing is asked
        given = [[i for ids in of_row for i in ids[:-1]] for of_row in options]
        owners = [[k for k, ids in enumerate(of_row) for _ in ids[:-1]] for of_row in options]
        steps = [[j for ids in of_row for j in range(len(ids) - 1)] for of_row in options]
        tokens, owner, step = (self._padded(rows) for rows in (given, owners, steps))
        length = torch.tensor(lengths, device=self.device)[:, None]
        columns = length + torch.arange(tokens.shape[1], device=self.device)
        positions = length + step
        end = max(lengths) + tokens.shape[1]
        keys = torch.arange(end, device=self.device).expand(len(lengths), -1)
        is_own = (
            owner[:, :, None] == keys.new_full(keys.shape, -1).scatter(1, columns, owner)[:, None]
        )
        is_before = keys[:, None] <= columns[:, :, None]
        is_prompt = keys < length
        hidden = self._read(
            slice(slot, slot + len(lengths)),
            columns,
            positions,
            end=end,
            visible=is_prompt[:, None] | (is_own & is_before),
            distance=positions[:, :, None] - keys.scatter(1, columns, positions)[:, None],
            input_ids=tokens,
        )
        for row, of_row in enumerate(options):
            if not of_row:  # its options were fewer than those of another prompt
                yield []
                continue
            logprobs = self._logits(hidden[row, : len(given[row])]).log_softmax(-1)
            targets = torch.tensor([i for ids in of_row for i in ids[1:]], device=logprobs.device)
            found = logprobs.gather(-1, targets.long()[:, None])[:, 0]
            begun = first[row, [ids[0] for ids in of_row]]
            parts = torch.split(found, [len(ids) - 1 for ids in of_row])
            yield [float(one + part.sum()) for one, part in zip(begun, parts, strict=True)]

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Stack rows of numbers with zeros on the right, (B, T) int64."""
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        return pad_sequence(tensors, batch_first=True).to(self.device)

    def _read(
        self,
        rows: slice,
        start: int | Tensor,
        positions: Tensor,
        *,
        end: int,
        visible: Tensor | None = None,
        distance: Tensor | None = None,
        **inputs: Tensor,
    ) -> Tensor:
        """Run the layers on new positions of some slots; return the (B, T, D) hidden states.

        Args:
            rows: the slots.
            start: the columns they go to, as `SlotCache.place` takes them.
            positions: (B, T) of the new tokens.
            end: columns that are looked at.
            visible: (B, T, columns), what each token sees; by default all up to itself.
            distance: the same shape, how far before it that stands.
            inputs: `input_ids` or `inputs_embeds`.
        """
        if distance is None:
            distance = positions[:, :, None] - torch.arange(end, device=self.device)
        visible = distance >= 0 if visible is None else visible
        self.cache.place(rows, start, end)
        output = self.model.model(
            inputs.get("input_ids"),
            self._mask(visible, distance),
            positions,
            self.cache,  # transformers 5.24 has another name for it
            inputs.get("inputs_embeds"),
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _mask(self, visible: Tensor, distance: Tensor) -> Tensor | dict[str, Tensor]:
        config = self.model.config
        window = config.sliding_window
        windowed = visible if window is None else visible & (distance < window)
        if isinstance(config, Qwen2Config):  # each of its layers has a window or none
            return {"full_attention": visible[:, None], "sliding_attention": windowed[:, None]}
        return windowed[:, None]

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(hidden)
        return logits.float().to(self.device)


def can_record(model: PreTrainedModel, device: torch.device) -> bool:
    """Tell whether the passes of a model can be replayed: it is whole on one GPU, and plain."""
    is_plain = not isinstance(model.config, MixtralConfig)  # which expert runs depends on numbers
    is_exact = all(parameter.is_floating_point() for parameter in model.parameters())
    places = {parameter.device for parameter in model.parameters()}
    return device.type == "cuda" and is_plain and is_exact and len(places) == 1


def _in_pieces(options: Sequence[Ids], size: int) -> Iterator[tuple[Ids, ...]]:
    """Split options into pieces of at most so many tokens, or of one option."""
    piece: list[Ids] = []
    num_tokens = 0
    for ids in options:
        if piece and num_tokens + len(ids) > size:
            yield tuple(piece)
            piece, num_tokens = [], 0
        piece.append(ids)
        num_tokens += len(ids)
    yield tuple(piece)
