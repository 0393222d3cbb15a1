import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from tests.goldens import golden_engine
from tests.tiny import FAMILIES, tiny_av_engine, tiny_language_model
from tests.vla2cli.train.reference import (
    CASES,
    KINDS,
    PAD_TOKENS,
    batch_of,
    conversation_of,
    losses_of,
    media_of,
)
from vla2_models.beats import BEATs
from vla2_models.loading import load_model
from vla2cli.train.collate import Collator
from vla2cli.train.conversation import IGNORED, Utterance, build_row
from vla2cli.train.media import Media
from vla2cli.train.network import TrainedNetwork
from vla2cli.train.samples import Sample, Skipped
from vla2cli.train.splice import splice_rows

CLOSE = 1e-5  # two orders of the same float32 sums
COLLATOR = Collator(pad_token_id=0, max_length=2048)
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
    model = copy.deepcopy(load_model(tiny_av_engine().checkpoint))
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


def spliced_media(network, sample):
    """How many tokens the language model is given of a sample's media."""
    with torch.no_grad():
        (tokens,) = network.encode([sample.media])
    return len(tokens)


def logits_of_labels(network, sample):
    """What each learned token of a sample's conversations is predicted with, and which it is."""
    batch = COLLATOR([sample])
    tokens = network.encode(batch["media"])
    given = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    labels = splice_rows(network.model, *given, tokens, None).labels[:, 1:]
    batch.pop("skipped")
    logits = network(**batch)["logits"][:, :-1]
    return logits[labels != IGNORED].float(), labels[labels != IGNORED]


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
            network.encode(batch["media"]),
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
    network = TrainedNetwork(golden_engine(case).model)
    for sample, expected in zip(golden_samples(case), losses_of(case), strict=True):
        with torch.no_grad():
            loss = run(network, [sample], golden_collator(case))["loss"]
        assert abs(loss.item() - expected) < 1e-4


@pytest.mark.parametrize("form", ["chat", "plain"])
@pytest.mark.parametrize("has_sound", [False, True])
def test_packed_conversations_learn_what_they_learn_alone(form, has_sound):
    network = tiny_network().eval()
    sample = sample_of(tiny_rows(form=form), tiny_media(has_sound=has_sound))
    with torch.no_grad():
        apart = run(network, [sample], COLLATOR)
        packed = run(network, [sample], replace(COLLATOR, pack=3))
    torch.testing.assert_close(packed["loss"], apart["loss"], atol=CLOSE, rtol=0)
    assert packed["logits"].shape[0] == 1
    num_media = spliced_media(network, sample)
    shared = sample.rows[0].place + num_media
    start = shared
    for row, alone in zip(sample.rows, apart["logits"], strict=True):
        length = len(row.input_ids) - row.place - 1
        torch.testing.assert_close(
            packed["logits"][0, start : start + length],
            alone[shared : shared + length],
            atol=CLOSE,
            rtol=0,
        )
        torch.testing.assert_close(packed["logits"][0, :shared], alone[:shared], atol=CLOSE, rtol=0)
        start += length


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_language_model_takes_packed_rows(family):
    network = tiny_network().eval()
    network.model.language_model = tiny_language_model(family, vocab_size=512)
    sample = sample_of(tiny_rows(), tiny_media())
    other = sample_of(tiny_rows("text"), Media())
    with torch.no_grad():
        apart = run(network, [sample, other], COLLATOR)["loss"]
        packed = run(network, [sample, other], replace(COLLATOR, pack=2))["loss"]
    torch.testing.assert_close(packed, apart, atol=CLOSE, rtol=0)


def test_packed_rows_are_the_same_with_eager_attention():
    network = tiny_network().eval()
    sample = sample_of(tiny_rows(), tiny_media())
    losses = []
    for attention in ("sdpa", "eager"):
        network.model.language_model.set_attn_implementation(attention)
        with torch.no_grad():
            losses.append(run(network, [sample], replace(COLLATOR, pack=3))["loss"])
    torch.testing.assert_close(*losses, atol=CLOSE, rtol=0)


def test_gradients_of_packed_conversations_are_those_of_a_batch():
    network = tiny_network()
    sample = sample_of(tiny_rows(), tiny_media(has_sound=True))
    found = []
    for pack in (1, 3):
        network.zero_grad()
        run(network, [sample], replace(COLLATOR, pack=pack))["loss"].backward()
        found.append({name: p.grad for name, p in network.named_parameters()})
    for name, grad in found[0].items():
        if grad is not None:
            torch.testing.assert_close(found[1][name], grad, atol=1e-4, rtol=1e-3, msg=name)


def test_micro_batches_add_up_to_the_loss_and_gradient_of_the_whole():
    network = tiny_network()
    samples = [
        sample_of(tiny_rows()[:1], tiny_media()),
        sample_of(tiny_rows()[1:], tiny_media(seed=1)),
        sample_of(tiny_rows("text"), Media()),
    ]
    whole = run(network, samples, COLLATOR)["loss"]
    whole.backward()
    expected = network.model.mm_projector.readout[0].weight.grad.clone()
    network.zero_grad()
    labels = COLLATOR(samples)["labels"]
    count = (labels != IGNORED).sum()
    parts = [run(network, [s], COLLATOR, num_items_in_batch=count)["loss"] for s in samples]
    sum(parts).backward()
    torch.testing.assert_close(sum(parts), whole, atol=CLOSE, rtol=0)
    found = network.model.mm_projector.readout[0].weight.grad
    torch.testing.assert_close(found, expected, atol=CLOSE, rtol=1e-4)


def test_a_medium_of_several_rows_is_encoded_once():
    network = tiny_network()
    seen = []
    network.model.vision_tower.embeddings.register_forward_hook(
        lambda module, inputs, output: seen.append(len(inputs[0]))
    )
    image = Media(torch.randn(1, 3, 56, 56), is_image=True)
    samples = [
        sample_of(tiny_rows(), tiny_media()),
        sample_of(tiny_rows("image"), image),
    ]
    run(network, samples, COLLATOR)
    assert seen == [9]


@pytest.mark.parametrize("num_frames", [None, 4])
def test_an_image_is_as_many_frames_as_a_video_of_the_run(num_frames):
    network = TrainedNetwork(tiny_network().model, num_frames)
    frames = torch.randn(1, 3, 56, 56)
    video = frames.expand(num_frames or network.model.config.num_frames, -1, -1, -1)
    with torch.no_grad():
        of_image, of_video = network.encode([Media(frames, is_image=True), Media(video)])
    torch.testing.assert_close(of_image, of_video)


def test_frozen_towers_keep_no_graph_and_get_no_gradient():
    network = tiny_network()
    network.model.requires_grad_(False)
    network.model.mm_projector.requires_grad_(True)
    features = []
    network.model.mm_projector.register_forward_pre_hook(
        lambda module, inputs: features.append(inputs[0])
    )
    sample = sample_of(tiny_rows(), tiny_media(has_sound=True))
    run(network, [sample], COLLATOR)["loss"].backward()
    assert not features[0].requires_grad
    trained = {name.split(".")[1] for name, p in network.named_parameters() if p.grad is not None}
    assert trained == {"mm_projector"}


def test_a_tower_is_trained_behind_a_frozen_connector():
    network = tiny_network()
    network.model.requires_grad_(False)
    network.model.audio_tower.requires_grad_(True)
    sample = sample_of(tiny_rows(), tiny_media(has_sound=True))
    run(network, [sample], COLLATOR)["loss"].backward()
    assert network.model.audio_tower.patch_embedding.weight.grad.any()


def test_what_a_batch_does_not_use_gets_a_gradient_of_zero():
    network = tiny_network()
    run(network, [sample_of(tiny_rows("text"), Media())], COLLATOR)["loss"].backward()
    for part in (network.model.mm_projector, network.model.mm_projector_a):
        assert all(p.grad is not None and not p.grad.any() for p in part.parameters())


def test_ears_with_larger_patches_are_kept_in_step_too():
    network = tiny_network()
    design = replace(network.model.audio_tower.design, patch_size=32)
    network.model.audio_tower = BEATs(design)
    run(network, [sample_of(tiny_rows("text"), Media())], COLLATOR)["loss"].backward()
    assert network.model.audio_tower.patch_embedding.weight.grad is not None


def test_a_batch_of_bad_samples_alone_has_a_loss_of_zero():
    network = tiny_network()
    batch = COLLATOR([Skipped("a", "it is gone")])
    assert batch.pop("skipped") == [("a", "it is gone")]
    for count in (None, 7, torch.tensor(0)):
        loss = network(**batch, num_items_in_batch=count)["loss"]
        loss.backward()
        assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in network.parameters())


def test_the_word_loss_is_the_mean_cross_entropy_of_the_words_that_are_given():
    network = tiny_network().eval()
    media = tiny_media(has_sound=True)
    bare = sample_of(tiny_rows()[:2], media)
    num_tokens = spliced_media(network, bare)
    words = torch.full((num_tokens, 2), IGNORED)
    words[0] = torch.tensor([300, 301])
    words[-1, 0] = 302
    sample = replace(bare, word_targets=words)
    language_model = network.model.language_model
    with torch.no_grad():
        (tokens,) = network.encode([media])
        logits = language_model.lm_head(language_model.model.norm(tokens))
        expected = functional.cross_entropy(logits[[0, 0, -1]], torch.tensor([300, 301, 302]))
        without = run(network, [bare], replace(COLLATOR, pack=2))["loss"]
        found = [
            run(network, [sample], replace(COLLATOR, pack=pack), word_weight=0.5)["loss"]
            for pack in (1, 2)
        ]
    for loss in found:
        torch.testing.assert_close(loss - without, 0.5 * expected, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("pack", [1, 2])
def test_what_is_left_open_is_out_of_the_choice_of_both_losses(pack):
    network = tiny_network().eval()
    media = tiny_media(has_sound=True)
    bare = sample_of(tiny_rows()[:2], media)
    words = torch.full((spliced_media(network, bare), 1), IGNORED)
    words[:, 0] = 300
    left_open = torch.tensor([301, 17])
    collator = replace(COLLATOR, pack=pack)
    with torch.no_grad():
        (tokens,) = network.encode([media])
        language_model = network.model.language_model
        named = language_model.lm_head(language_model.model.norm(tokens)).float()
        learned, labels = logits_of_labels(network, bare)
        assert not torch.isin(labels, left_open).any()
        for logits in (named, learned):
            logits[:, left_open] = -torch.inf
        expected = functional.cross_entropy(learned, labels)
        expected = expected + 0.5 * functional.cross_entropy(named, words[:, 0])
        sample = replace(bare, word_targets=words, left_open=left_open)
        found = run(network, [sample], collator, word_weight=0.5)["loss"]
        # of another medium nothing is left open
        other = replace(bare, media=tiny_media(has_sound=True), word_targets=words)
        both = run(network, [sample, other], collator, word_weight=0.5)["loss"]
        without = run(network, [other], collator, word_weight=0.5)["loss"]
    torch.testing.assert_close(found, expected, atol=CLOSE, rtol=0)
    torch.testing.assert_close(both, (found + without) / 2, atol=CLOSE, rtol=0)


def test_a_label_stays_in_the_choice_though_it_is_left_open():
    network = tiny_network().eval()
    sample = sample_of(tiny_rows()[:1], tiny_media())
    with torch.no_grad():
        logits, labels = logits_of_labels(network, sample)
        open_ids = torch.tensor(sorted({int(labels[0]), 17}))
        barred = torch.zeros_like(logits, dtype=torch.bool)
        barred[:, open_ids] = True
        barred[torch.arange(len(labels)), labels] = False
        expected = functional.cross_entropy(logits.masked_fill(barred, -torch.inf), labels)
        found = run(network, [replace(sample, left_open=open_ids)], COLLATOR)["loss"]
    torch.testing.assert_close(found, expected, atol=CLOSE, rtol=0)


def test_words_for_another_number_of_tokens_are_refused():
    network = tiny_network()
    sample = sample_of(tiny_rows()[:1], tiny_media(), torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="word_targets for 3 tokens of media"):
        run(network, [sample], COLLATOR, word_weight=1.0)


def test_checkpointing_changes_no_gradient():
    network = tiny_network()
    sample = sample_of(tiny_rows(), tiny_media(has_sound=True))
    found = []
    for _ in range(2):
        network.zero_grad()
        run(network, [sample], replace(COLLATOR, pack=3))["loss"].backward()
        found.append([p.grad for p in network.parameters() if p.grad is not None])
        network.enable_checkpointing()
    assert len(found[0]) == len(found[1])
    for without, with_checkpoints in zip(*found, strict=True):
        torch.testing.assert_close(with_checkpoints, without, atol=CLOSE, rtol=1e-4)


@pytest.mark.parametrize("pack", [1, 3])
def test_bfloat16_autocast_stays_near_float32(pack):
    network = tiny_network()
    sample = sample_of(tiny_rows(), tiny_media(has_sound=True))
    collator = replace(COLLATOR, pack=pack)
    exact = run(network, [sample], collator)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = run(network, [sample], collator)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, atol=0.05, rtol=0)
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_a_router_s_loss_counts_only_where_the_config_asks_for_it():
    network = tiny_network().eval()
    sample = sample_of(tiny_rows()[:1], tiny_media())
    losses = {}
    for asked in (False, True):
        language_model = tiny_language_model(
            "mixtral", vocab_size=512, output_router_logits=asked, router_aux_loss_coef=0.5
        )
        network.model.language_model = language_model
        with torch.no_grad():
            losses[asked] = run(network, [sample], COLLATOR)["loss"]
            embeds = network.model.splice(
                sample.rows[0].input_ids, [network.encode([sample.media])[0]]
            )[None]
            labels = torch.full(embeds.shape[:2], IGNORED)
            answer = [label for label in sample.rows[0].labels if label != IGNORED]
            labels[0, -len(answer) :] = torch.tensor(answer)
            theirs = language_model(inputs_embeds=embeds, labels=labels).loss
        torch.testing.assert_close(losses[asked], theirs, atol=CLOSE, rtol=0)
    assert losses[True] - losses[False] > 0.1


@pytest.mark.parametrize(("row", "media"), [(0, Media()), (1, None)], ids=["none", "unplaced"])
def test_media_without_a_place_and_a_place_without_media_are_refused(row, media):
    rows = (tiny_rows()[0], tiny_rows("text")[0])
    sample = sample_of(rows[row : row + 1], media or tiny_media())
    with pytest.raises(ValueError, match="placeholders for"):
        run(tiny_network(), [sample], COLLATOR)


def test_packed_rows_beyond_a_sliding_window_are_refused():
    network = tiny_network()
    network.model.language_model.config.sliding_window = 16
    sample = sample_of(tiny_rows(), tiny_media())
    with pytest.raises(ValueError, match="pass the sliding window of 16"):
        run(network, [sample], replace(COLLATOR, pack=3))


def test_an_optimizer_step_lowers_the_loss():
    network = tiny_network()
    sample = sample_of(tiny_rows(), tiny_media(has_sound=True))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = run(network, [sample], replace(COLLATOR, pack=3))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
