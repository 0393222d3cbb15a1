import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.goldens import golden_engine
from tests.tiny import tiny_av_engine
from tests.vla2cli.train.reference import (
    CASES,
    KINDS,
    PAD_TOKENS,
    batch_of,
    conversation_of,
    media_of,
    trainable_model,
)
from vla2cli.train.collate import Collator
from vla2cli.train.conversation import IGNORED, Row, Utterance, build_row
from vla2cli.train.media import Media
from vla2cli.train.network import TrainedNetwork
from vla2cli.train.samples import Sample, Skipped
from vla2cli.train.splice import splice_rows

CLOSE = 1e-5  # two orders of the same float32 sums
QUESTIONS = (
    ("Please describe the video in detail.", "a red car moves to the right"),
    ("what happens in this image?", "the ball bounces"),
    ("where?", "on the green meadow in front of the blue wall"),
)


def golden_samples(case):
    tokenizer = golden_engine(case).tokenizer
    media = media_of(case)
    rows = [build_row(tokenizer, conversation_of(case, kind), kind) for kind in KINDS]
    return [Sample((kind,), (row,), m) for kind, row, m in zip(KINDS, rows, media, strict=True)]


def golden_collator(case):
    pad_token_id = golden_engine(case).tokenizer.added_ids[PAD_TOKENS[case]]
    return Collator(pad_token_id, max_length=2048)


def run(network, samples, collator, **more):
    batch = collator(samples)
    assert not batch.pop("skipped")
    return network(**batch, **more)


def tiny_network():
    """Networks with ears whose weights are the test's own, free to be trained."""
    model = copy.deepcopy(tiny_av_engine().model)
    return TrainedNetwork(model.requires_grad_(True)).train()


def tiny_media(*, has_sound=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixel_values = torch.randn(8, 3, 56, 56, generator=generator)
    fbank = torch.randn(1, 398, 128, generator=generator) * 4 + 10
    return Media(pixel_values, fbank.to(torch.bfloat16) if has_sound else None)


def tiny_rows(medium="video", form="chat"):
    tokenizer = tiny_av_engine().tokenizer
    tag = "" if medium == "text" else f"<{medium}>\n"
    return tuple(
        build_row(
            tokenizer,
            [Utterance("human", f"{tag}{question}"), Utterance("gpt", answer)],
            medium,
            form,
        )
        for question, answer in QUESTIONS
    )


def sample_of(rows, media, word_targets=None):
    ids = tuple(f"s{i}" for i in range(len(rows)))
    return Sample(ids, tuple(rows), media, word_targets=word_targets)


@pytest.mark.parametrize("case", CASES)
def test_the_spliced_batch_and_its_loss_are_the_reference_s(case):
    expected = batch_of(case)
    network = TrainedNetwork(golden_engine(case).model)
    batch = golden_collator(case)(golden_samples(case))
    assert batch["input_ids"].equal(expected["batch.input_ids"])
    with torch.no_grad():
        spliced = splice_rows(
            network.model,
            batch["input_ids"],
            batch["attention_mask"],
            batch["labels"],
            network._encode(batch["media"]),
            None,
        )
        batch.pop("skipped")
        loss = network(**batch)["loss"]
    assert spliced.attention_mask.long().equal(expected["batch.attention_mask"])
    assert spliced.labels.equal(expected["batch.labels"])
    sums = (spliced.inputs_embeds.sum(-1) - expected["batch.inputs_embeds_sum"]).abs()
    # masked positions hold zeros here and the padding's embedding there
    assert sums[spliced.attention_mask].max() < 1e-3
    torch.testing.assert_close(loss, expected["batch.loss"][0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_the_loss_of_each_sample_is_the_reference_s(case):
    import json

    from tests.goldens import golden

    about = json.loads(golden("data/train_batches.json").read_text(encoding="utf-8"))
    network = TrainedNetwork(golden_engine(case).model)
    for sample, expected in zip(
        golden_samples(case), about[f"{case}.batch"]["per_sample_loss"], strict=True
    ):
        with torch.no_grad():
            loss = run(network, [sample], golden_collator(case))["loss"]
        assert abs(loss.item() - expected) < 1e-4
