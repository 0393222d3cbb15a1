"""Attention by two products is PyTorch's own."""

import pytest
import torch

from tests.tiny import tiny_language_model
from vla2cli.engines.attention import attend_to_slots, attending_to_slots
from vla2cli.engines.passes import Passes


def test_masked_attention_is_that_of_pytorch():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(3, heads, length, 16, generator=generator)
        for heads, length in ((6, 1), (2, 11), (2, 11))
    )
    mask = torch.arange(11) < torch.tensor([11, 1, 7])[:, None]
    found, _ = attend_to_slots(None, query, key, value, mask[:, None, None], scaling=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(3, 1),
        value.repeat_interleave(3, 1),
        attn_mask=mask[:, None, None],
        scale=0.3,
    )
    torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "mixtral", "qwen2"])
def test_a_model_decodes_alike_and_is_as_before_behind_it(family):
    model = tiny_language_model(family, sliding_window=5)
    before = model.config._attn_implementation
    prompts = [torch.randn(n, 64, generator=torch.Generator().manual_seed(n)) for n in (9, 2, 6)]
    logits = []
    for is_by_products in (False, True):
        passes = Passes(model, 3, torch.device("cpu"))
        passes.prefill(0, prompts, 0)
        decode = passes._decode_by_products if is_by_products else passes._decode
        tokens, positions = torch.tensor([[5], [6], [7]]), torch.tensor([[9], [2], [6]])
        logits.append(decode(tokens, positions, 12))
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-5)
    assert model.config._attn_implementation == before
    with pytest.raises(ZeroDivisionError), attending_to_slots(model):
        1 / 0  # noqa: B018
    assert model.config._attn_implementation == before
