"""What `vla2 models` says about checkpoints, with ears and without."""

import pytest

from tests.tiny import SHORT_WINDOW, open_tiny, write_tiny
from vla2_models.hub import Source
from vla2_models.loading import check_weights
from vla2_models.miniature import WITH_EARS_ID
from vla2_models.public import WITH_EARS
from vla2cli.facts import (
    describe_checkpoint,
    describe_line,
    find_checkpoints,
    missing_public,
)


def facts_of(folder):
    checkpoint = open_tiny(folder)
    return describe_checkpoint("mine", checkpoint, check_weights(checkpoint))


def test_facts_of_ears_are_tokens_and_seconds(tmp_path):
    facts = facts_of(write_tiny(tmp_path, has_ears=True, **SHORT_WINDOW))
    # 4 s are 398 frames, 24 of 16; each has 8 squares
    assert (facts["audio_tokens"], facts["audio_window_s"]) == (24 * 8, 4.0)
    assert "45 tokens, sound 192 tokens, " in describe_line(facts)


def test_facts_without_ears_say_so(tmp_path):
    facts = facts_of(write_tiny(tmp_path))
    assert (facts["audio_tokens"], facts["audio_window_s"]) == (0, None)
    assert "sound" not in describe_line(facts)


def test_parameters_of_the_ears_are_counted_once(tmp_path):
    deaf, hearing = (facts_of(write_tiny(tmp_path / n, has_ears=n == "b")) for n in "ab")
    # width 32, feed-forward 64, 4 heads, patches of 16 x 16 to 16, 16 taps in 4 groups, 2 layers
    attention = 4 * (32 * 32 + 32) + (8 * 8 + 8) + 4
    layer = attention + (32 * 64 + 64) + (64 * 32 + 32) + 2 * 64
    front = 16 * 256 + 2 * 16 + (32 * 16 + 32) + (16 + 32 * 8 * 16 + 32) + 64
    projector = 2 * (32 * 32 + 32)
    wanted = front + 2 * layer + 320 * 4 + projector
    assert hearing["parameters"] - deaf["parameters"] == wanted


def test_memory_of_a_small_model_is_not_0(tmp_path):
    facts = facts_of(write_tiny(tmp_path))
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        num_bytes = width * facts["parameters"]
        assert facts["memory_gb"][dtype] == pytest.approx(num_bytes / 1e9, rel=0.01)


def test_public_checkpoint_with_ears_is_listed_with_its_tokens(tmp_path):
    facts = {found["id"]: found for found in missing_public(here=())}
    assert facts[WITH_EARS]["audio_tokens"] == 1496
    assert "1352 tokens, sound 1496 tokens, 8.5 B" in describe_line(facts[WITH_EARS])
    assert {found["audio_tokens"] for id, found in facts.items() if id != WITH_EARS} == {0}


@pytest.mark.parametrize("is_whole", [True, False])
def test_checkpoint_with_ears_is_found_on_this_disk(tmp_path, is_whole):
    folder = write_tiny(tmp_path, has_ears=True, **SHORT_WINDOW)
    if not is_whole:
        (folder / "model.safetensors").unlink()
    found = {facts["id"]: facts for facts in find_checkpoints(Source(tmp_path, offline=True))}
    assert found[WITH_EARS_ID]["usable"] is is_whole
