"""Encoded clips on disk: they come back bit for bit, or not at all."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from tests.sounds import tone, write_movie, write_wav
from tests.tiny import change_json, tiny_av_engine, tiny_engine, tiny_hub, write_tiny
from vla2_models.sound import SoundWindow
from vla2cli import cache as module
from vla2cli.cache import Encoded, TokenCache, encoder_of, entry_key, parse_size
from vla2cli.config import GenerationChoice
from vla2cli.engine import Ask, Engine, MediaTokens
from vla2cli.errors import UsageError
from vla2cli.inputs import Item
from vla2cli.media.pool import DecodePool
from vla2cli.media.records import Clip, ClipRequest, FileState, Sound, SoundRequest
from vla2cli.plan import Sampling
from vla2cli.preprocess import FrameGeometry
from vla2cli.record import clip_fields

EXAMPLES = Path(__file__).parents[2] / "examples"
INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
GEOMETRY = FrameGeometry(56, 56, 56, (0.5,) * 3, (0.5,) * 3)
SOUND = SoundRequest(SoundWindow(), is_required=False, start_s=1.0, end_s=2.0)
REQUEST = ClipRequest("a/1.mp4", "video", GEOMETRY, 8, 1.0, 2.0, "pyav", SOUND)
STATE = FileState(123, 456, "5" * 64)
HERE = FileState(123, 789, "5" * 64)  # another file of the same content
KEY = entry_key(STATE.sha256, REQUEST, {})


def random_tokens(num, dtype):
    """Any finite numbers: subnormal ones and negative zero, too; rows with gaps between them."""
    bits = torch.randint(-(2**31), 2**31, (7, num, 2)).to(INTEGERS[dtype])
    tokens = bits.view(dtype)[..., 0].T
    tokens[0, 0] = -0.0
    return torch.where(tokens.isfinite(), tokens, torch.zeros((), dtype=dtype))


def make_encoded(dtype=torch.float32, *, kind="video", num_visual=3, num_audio=2):
    torch.manual_seed(0)
    is_seen = kind != "audio"
    sound = Sound(None, ((0.1, 0.30000000000000004), (2.0, 3.0)), 1 / 3) if num_audio else None
    clip = Clip(
        frames=None,
        kind=kind,
        indices=(3, 8) if is_seen else (),
        timestamps_s=(0.1, 2 / 3) if is_seen else (),
        num_total=10,
        fps=30000 / 1001,
        duration_s=1e-300,
        decoder="pyav",
        flags=("partial-video", "short-audio"),
        state=STATE,
        timings_s={"read": 1.0, "preprocess": 2.0},
        sound=sound,
    )
    visual = random_tokens(num_visual, dtype) if is_seen else None
    return Encoded(clip, MediaTokens(visual, random_tokens(num_audio, dtype) if sound else None))


def open_cache(folder, max_bytes=10**9):
    return TokenCache.open(folder, max_bytes, pytest.fail)


def assert_same_bits(found, tokens):
    assert (found is None) is (tokens is None)
    if found is not None:
        assert (found.dtype, found.device.type) == (tokens.dtype, "cpu")
        integers = INTEGERS[tokens.dtype]
        assert found.view(integers).equal(tokens.contiguous().view(integers))


@pytest.fixture
def entry(tmp_path):
    """The file of the one entry of the cache in `tmp_path`."""
    open_cache(tmp_path).put(KEY, make_encoded())
    (path,) = tmp_path.glob("??/*.safetensors")
    return path


# what comes back


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize(
    "parts",
    [{}, {"num_audio": 0}, {"kind": "audio"}, {"kind": "image", "num_audio": 0}],
    ids=["av", "video", "audio", "image"],
)
def test_clip_and_tokens_come_back_bit_for_bit(tmp_path, dtype, parts):
    encoded = make_encoded(dtype, **parts)
    open_cache(tmp_path).put(KEY, encoded)
    found = open_cache(tmp_path).get(KEY, HERE)
    assert_same_bits(found.media.visual, encoded.media.visual)
    assert_same_bits(found.media.audio, encoded.media.audio)
    timings_s = found.clip.timings_s
    assert found.clip == replace(encoded.clip, state=HERE, timings_s=timings_s)
    assert set(timings_s) == {"read", "preprocess"}
    assert 0 < timings_s["read"] < 60


@pytest.mark.parametrize("kind", ["av", "video", "image", "audio"])
def test_hit_answers_and_is_recorded_like_the_clip_itself(tmp_path, kind):
    engine = tiny_av_engine()
    match kind:
        case "image":
            path = EXAMPLES / "09.png"
        case "audio":
            path = write_wav(tmp_path / "a.wav", [tone(440, 2)])
        case _:
            path = write_movie(tmp_path / "a.mp4", ("aac", [tone(440, 2)], 16000))
    medium = "video" if kind == "av" else kind
    sampling = Sampling(8, modality="video" if kind == "video" else "auto")
    request = sampling.request(Item("a", str(path), medium), engine.geometry, engine.sound_window)
    with DecodePool(1) as pool:
        clip = pool.submit(request).result()
    (media,) = engine.encode([clip])
    key = entry_key(clip.state.sha256, request, encoder_of(engine))
    open_cache(tmp_path / "cache").put(key, Encoded(clip, media))
    found = open_cache(tmp_path / "cache").get(key, clip.state)
    assert found.clip.frames is None
    assert clip_fields(found.clip) == clip_fields(clip)
    assert (found.clip.flags, found.clip.state) == (clip.flags, clip.state)
    settings = engine.settings(GenerationChoice(max_new_tokens=6))
    texts = [
        engine.answer([Ask("What happens?", medium, of_clip)], settings)[0]
        for of_clip in (media, found.media)
    ]
    assert texts[0].generation.ids == texts[1].generation.ids
    assert texts[0].num_prompt == texts[1].num_prompt
    stored = load_file(next((tmp_path / "cache").glob("??/*.safetensors")))
    pixels = 0 if clip.frames is None else clip.frames.nbytes
    assert sum(tensor.nbytes for tensor in stored.values()) == sum(
        part.nbytes for part in media.parts()
    )
    assert clip.stripped().sound is None or clip.stripped().sound.waveform is None
    assert pixels == 0 or clip.stripped().frames is None


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_clip_without_its_pixels_and_samples_is_not_encoded_as_if_it_had_none(kind):
    clip = make_encoded(kind=kind).clip
    with pytest.raises(AssertionError, match=r"has no frames|samples were dropped"):
        tiny_av_engine().encode([clip])


def test_what_was_never_put_is_a_miss(tmp_path):
    assert open_cache(tmp_path).get(KEY, STATE) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["visual", "audio"])
def test_tokens_that_are_not_finite_are_neither_kept_nor_given(tmp_path, value, part, monkeypatch):
    encoded = make_encoded(torch.float16)
    getattr(encoded.media, part)[1, 1] = value
    cache = open_cache(tmp_path)
    cache.put(KEY, encoded)
    assert not list(tmp_path.glob("??/*"))
    with monkeypatch.context() as patch:
        patch.setattr(module, "_is_finite", lambda tokens: True)
        cache.put(KEY, encoded)
        assert cache.get(KEY, STATE) is not None
    assert cache.get(KEY, STATE) is None
    assert not list(tmp_path.glob("??/*"))


# what is spoiled is missed, goes, and is made again


def assert_is_missed(entry):
    cache = open_cache(entry.parents[1])
    assert cache.get(KEY, STATE) is None
    assert not entry.exists()
    cache.put(KEY, make_encoded())
    assert cache.get(KEY, STATE) is not None


def test_no_flipped_bit_goes_unnoticed(entry):
    whole = entry.read_bytes()
    cache = open_cache(entry.parents[1])
    for idx in range(len(whole)):
        spoiled = bytearray(whole)
        spoiled[idx] ^= 1 << idx % 8
        entry.write_bytes(spoiled)
        assert cache.get(KEY, STATE) is None, f"byte {idx}: {whole[idx]:#x} -> {spoiled[idx]:#x}"


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -1, -40])
def test_truncated_entry_is_missed(entry, length):
    entry.write_bytes(entry.read_bytes()[:length])
    assert_is_missed(entry)


@pytest.mark.parametrize(
    "garbage",
    [
        b"no safetensors at all, but a sentence",
        b"\xff" * 64,
        (2).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (10**6).to_bytes(8, "little") + b"[" * 10**6,
        save({"visual": torch.ones(3, 7)}),
        save({"visual": torch.ones(3, 7)}, {"sha256": "0" * 64}),
        save({"visual": torch.ones(())}, {"sha256": "0" * 64, "clip": "{}"}),
        save({"visual": torch.ones(2, 2).to(torch.float8_e4m3fn)}, {"sha256": "", "clip": "{"}),
    ],
    ids=["text", "0xff", "empty", "list", "deep", "bare", "no-clip", "scalar", "float8"],
)
def test_file_that_is_no_entry_is_missed(entry, garbage):
    entry.write_bytes(garbage)
    assert_is_missed(entry)


@pytest.mark.parametrize("clip", ["", "[]", "{}", '{"kind": "video"}', '{"sound": 5}'])
def test_facts_that_are_no_clip_are_missed(entry, clip):
    # with the right digest, as a vla2 of another format would write them
    tensors = load_file(entry)
    save_file(tensors, entry, {"clip": clip, "sha256": module._digest(KEY, clip, tensors)})
    assert_is_missed(entry)


def test_changed_facts_or_tensors_are_missed(entry):
    tensors = load_file(entry)
    with safe_open(entry, framework="pt") as file:
        about = file.metadata()
    facts = json.loads(about["clip"])
    for changes in (
        (tensors, {**about, "clip": json.dumps(facts | {"fps": 25.0})}),
        ({**tensors, "visual": tensors["visual"].view(7, 3)}, about),
        ({**tensors, "visual": tensors["visual"].view(torch.int32)}, about),
        ({"visual": tensors["audio"], "audio": tensors["visual"]}, about),
        ({"visual": tensors["visual"]}, about),
        ({**tensors, "smell": torch.ones(3, 7)}, about),
    ):
        save_file(changes[0], entry, changes[1])
        assert_is_missed(entry)


def test_entry_of_another_key_in_this_ones_place_is_missed(entry):
    other = entry_key("6" * 64, REQUEST, {})
    cache = open_cache(entry.parents[1])
    cache.put(other, make_encoded())
    (place,) = entry.parents[1].glob(f"??/{other}.safetensors")
    place.replace(entry)
    assert_is_missed(entry)


# the key


def test_key_differs_wherever_the_tokens_may():
    encoder = encoder_of(tiny_engine())
    requests = [
        REQUEST,
        *(replace(REQUEST, path=path) for path in ("a/1.gif", "a/1.GIF", "a/1")),
        *(replace(REQUEST, kind=kind) for kind in ("audio", "image")),
        replace(REQUEST, num_frames=16),
        replace(REQUEST, start_s=1.5),
        replace(REQUEST, end_s=None),
        replace(REQUEST, decoder="decord"),
        replace(REQUEST, geometry=replace(GEOMETRY, shortest_edge=None)),
        replace(REQUEST, geometry=replace(GEOMETRY, is_padded=True)),
        replace(REQUEST, sound=None),
        replace(REQUEST, sound=replace(SOUND, is_required=True)),
        replace(REQUEST, sound=replace(SOUND, audio_start_s=1.0)),
        replace(REQUEST, sound=replace(SOUND, window=SoundWindow(duration_s=20.0))),
    ]
    keys = [entry_key(STATE.sha256, request, encoder) for request in requests]
    keys.append(entry_key("6" * 64, REQUEST, encoder))
    keys += [
        entry_key(STATE.sha256, REQUEST, encoder | {name: "other"})
        for name in ("format", "versions", "weights", "design", "frontend", "dtype", "num_frames")
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 64 for key in keys)


def test_key_is_the_same_for_the_same_content_elsewhere():
    elsewhere = replace(REQUEST, path="/b/\udcff\n2.mp4")
    assert entry_key(STATE.sha256, elsewhere, {}) == KEY


def test_encoders_that_make_other_tokens_of_the_same_weights_differ(tmp_path):
    folder = write_tiny(tmp_path / "hub")
    tower = folder.parents[1] / "openai/clip-vit-miniature-patch14-56/config.json"
    found = []
    for path, changes in (
        (folder / "config.json", {}),
        (folder / "config.json", {"mm_projector_type": "stc_connector_v35"}),
        (folder / "config.json", {"mm_vision_select_layer": -1}),
        (folder / "config.json", {"num_frames": 4}),
        (tower, {"hidden_act": "gelu"}),
    ):
        change_json(path, **changes)
        for dtype in ("float32", "bfloat16"):
            engine = Engine.load(str(folder), hub_dir=tmp_path / "hub", device="cpu", dtype=dtype)
            found.append(encoder_of(engine))
    assert len({encoder["weights"] for encoder in found}) == 1
    keys = {entry_key(STATE.sha256, REQUEST, encoder) for encoder in found}
    assert len(keys) == len(found)


def test_same_weights_under_another_path_are_the_same_encoder(tmp_path):
    folder = next(path.parent for path in tiny_hub().glob("*/*/model.safetensors"))
    moved = shutil.copytree(folder, tmp_path / "moved")
    engine = Engine.load(str(moved), hub_dir=tiny_hub(), device="cpu", dtype="float32")
    assert encoder_of(engine) == encoder_of(tiny_engine())


# the option


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("20GB", 20 * 10**9), ("500mb", 5 * 10**8), (" 1.5 TB ", 15 * 10**11), ("1.0MB", 10**6)],
)
def test_size_is_read_in_units_of_ten(text, size_bytes):
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        *("", "20", "GB", "-1GB", "1e3GB", "nanGB", "20GiB", "1,5GB", "٣GB", "9" * 400),
        *("0", "0GB", "1KB", "0.999999MB"),
    ],
)
def test_what_is_no_size_or_less_than_a_megabyte_is_refused(text):
    expected = r"^'--cache-size .*': expected a size like 20GB or 500MB, and at least 1MB$"
    with pytest.raises(UsageError, match=expected):
        parse_size(text)


def test_file_in_place_of_the_cache_is_refused(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UsageError, match="cache' is a file; expected a folder"):
        TokenCache.open(tmp_path / "cache", 10**9)
