"""Sound in odd forms: the right samples, the right flags, and never a crash."""

import json
import os
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from safetensors import safe_open

from tests.goldens import golden_audio, media
from tests.sounds import (
    RATE,
    level_at,
    patch_codec,
    s16,
    spoil,
    tone,
    write_media,
    write_movie,
    write_wav,
)
from vla2_models.sound import SoundWindow
from vla2cli.errors import InputError
from vla2cli.media.container import open_container, packets
from vla2cli.media.frames import find_kind, probe, read_frames
from vla2cli.media.pool import ClipRequest, DecodePool
from vla2cli.media.records import SoundRequest
from vla2cli.media.sound import open_track, read_sound, read_track, resample_fft
from vla2cli.preprocess import FrameGeometry

WINDOW = SoundWindow()
REQUEST = SoundRequest(WINDOW, is_required=True)
OPTIONAL = SoundRequest(WINDOW, is_required=False)
GEOMETRY = FrameGeometry(28, 28, None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def hear(path, request=REQUEST, **kwargs):
    frames = read_frames(str(path), "video", num_frames=2, sound=request, **kwargs)
    return frames.sound, frames.flags


def heard_samples(sound, rate=RATE):
    return sound.waveform[: round(sum(end - start for start, end in sound.spans_s) * rate)]


def failure(path, request=REQUEST):
    with pytest.raises(InputError) as caught:
        read_sound(str(path), request)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) not in message
    return caught.value.kind, message


# the reference's numbers


def stored_of(case, *names):
    with safe_open(golden_audio(f"e2e/{case}.safetensors"), framework="np") as file:
        return [file.get_tensor(name) for name in names]


E2E = ["av", "av_long", "av_short"]


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize("case", E2E)
def test_track_matches_reference(case, decoder):
    if decoder == "decord":
        pytest.importorskip("decord", reason="decord is not installed")
    waveform, wave, clips = stored_of(case, "waveform16k", "ffmpeg_wave", "clip_samples")
    meta = json.loads(golden_audio("e2e/meta.json").read_text(encoding="utf-8"))
    sound, flags = hear(media(meta[case]["media"]), decoder=decoder)
    off = np.abs(sound.waveform.astype(np.int32) - waveform)
    assert off.max() <= 1
    assert (off > 0).mean() <= 4e-4
    assert sound.waveform.dtype == np.int16
    assert flags == ()
    n = len(wave)
    assert sound.duration_s == n / RATE
    bounds = [(start, min(end, n)) for start, end in clips.tolist()]
    # the file's time: the track may begin a little before or after the first frame
    begin_s = sound.spans_s[0][0]
    assert abs(begin_s) < 0.1
    for span, bound in zip(sound.spans_s, bounds):
        assert span == pytest.approx([begin_s + t / RATE for t in bound], abs=1e-9)


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_video_without_track_is_silence_or_not_heard(decoder):
    if decoder == "decord":
        pytest.importorskip("decord", reason="decord is not installed")
    path = media("output_v_3V9tzjyr51I.mp4")
    sound, flags = hear(path, decoder=decoder)
    assert flags == ("no-audio-track",)
    assert (sound.waveform.shape, sound.waveform.any()) == ((480_000,), False)
    assert (sound.spans_s, sound.duration_s) == ((), 0.0)
    assert hear(path, OPTIONAL, decoder=decoder) == (None, ("no-audio-track",))
    assert hear(path, None, decoder=decoder) == (None, ())


def test_audio_file_matches_reference():
    (waveform,) = stored_of("audio", "waveform16k")
    sound, flags = read_sound(str(media("bird-twitter-car.wav")), REQUEST)
    np.testing.assert_allclose(sound.waveform, waveform, atol=1e-6, rtol=0)
    assert (sound.waveform.dtype, flags) == (np.float64, ())


# resampling, against the Fourier sum itself


@pytest.mark.parametrize("num", [1, 2, 5, 8, 9, 12, 13, 24, 27])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 12, 13])
def test_resampling_evaluates_the_fourier_sum(n, num):
    samples = np.random.default_rng(n).standard_normal(n)
    shorter = min(n, num)
    t = np.arange(num) / num
    expected = np.zeros(num)
    for k in range(-(shorter // 2), shorter // 2 + 1):
        weight = 1.0
        if 2 * abs(k) == shorter and n != num:
            # shorter spectrum, even: the bin at its edge is shared by both signs when it is filled
            # up, and holds the sum of both when it is cut
            weight = 0.5 if num > n else 1.0
        elif 2 * abs(k) == shorter:
            weight = 0.5
        coefficient = (samples * np.exp(-2j * np.pi * k * np.arange(n) / n)).sum() / n
        expected += weight * (coefficient * np.exp(2j * np.pi * k * t)).real
    np.testing.assert_allclose(resample_fft(samples, num), expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_file_of_another_rate_keeps_its_tone(tmp_path, rate):
    path = write_wav(tmp_path / "a.wav", [s16(tone(440, 3, rate))], rate)
    sound, flags = read_sound(path, REQUEST)
    assert (len(sound.waveform), flags, sound.duration_s) == (480_000, (), 3.0)
    middle = sound.waveform[8000:40000]
    np.testing.assert_allclose(middle, tone(440, 3)[8000:40000], atol=2e-4, rtol=0)
    assert sound.waveform[48_100:].any()  # padding comes first: it rings


def test_odd_rate_may_give_one_sample_more(tmp_path):
    path = write_wav(tmp_path / "a.wav", [s16(tone(300, 1, 4502))], 4502)
    assert len(read_sound(path, REQUEST)[0].waveform) == 480_001  # figure of the specification


def test_cut_comes_before_resampling(tmp_path):
    # a resampler that saw the whole file would carry the loud end into the window
    whole = np.concatenate([np.zeros(8000 * 30, np.int16), np.full(8000, 30_000, np.int16)])
    sound, _ = read_sound(write_wav(tmp_path / "a.wav", [whole], 8000), REQUEST)
    assert not sound.waveform.any()
    assert sound.spans_s == ((0.0, 30.0),)


# sample formats: integers and floats as they are stored


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("u8", [0, 128, 255], [-1, 0, 127 / 128]),
        ("s16", [-(2**15), 1, 2**15 - 1], [-1, 2**-15, 1 - 2**-15]),
        ("s24", [-(2**23), 1, 2**23 - 1], [-1, 2**-23, 1 - 2**-23]),
        ("s32", [-(2**31), 1, 2**31 - 1], [-1, 2**-31, 1 - 2**-31]),
        ("f32", [-3.5, 2**-30, 2.0], [-3.5, 2**-30, 2.0]),
    ],
    ids=["u8", "s16", "s24", "s32", "float beyond 1"],
)
def test_values_are_those_of_the_file(tmp_path, kind, values, expected):
    dtype = np.float64 if kind == "f32" else np.int64
    left, right = np.resize(np.array(values, dtype), 3000), np.full(3000, values[1], dtype)
    sound, flags = read_sound(write_wav(tmp_path / "a.wav", [left, right], kind=kind), REQUEST)
    assert np.array_equal(sound.waveform[:3000], np.resize(expected, 3000))
    assert not sound.waveform[3000:].any()
    assert flags == ()


def test_first_of_six_channels_is_heard(tmp_path):
    channels = [s16(tone(200 * (i + 1), 1)) for i in range(6)]
    path = write_wav(tmp_path / "a.wav", channels)
    sound, _ = read_sound(path, REQUEST)
    assert np.array_equal(sound.waveform[:RATE], channels[0] / 2**15)


# coefficients of FFmpeg's mix of 5.1 to mono: front -3 dB, centre 0 dB, back -6 dB, bass none,
# over their sum so that nothing clips
MIX = np.array([2**-0.5, 2**-0.5, 1.0, 0.0, 0.5, 0.5]) / (2**0.5 + 2)


def levels(samples, rate=RATE):
    return [level_at(samples, 200 * (i + 1), rate) for i in range(6)]


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "aac"), ("a.mov", "pcm_s16le")])
def test_six_channels_of_a_track_are_mixed(tmp_path, name, codec):
    channels = [tone(200 * (i + 1), 2, 48000, level=0.8) for i in range(6)]
    path = write_movie(tmp_path / name, (codec, channels, 48000))
    sound, flags = hear(path)
    found = levels(sound.waveform[8000:24000] / 2**15)
    np.testing.assert_allclose(found, 0.8 * MIX, atol=4e-3)
    assert flags == ()
    first, _ = read_sound(path, REQUEST)
    np.testing.assert_allclose(levels(first.waveform[8000:24000]), [0.8, 0, 0, 0, 0, 0], atol=4e-3)


def test_six_channels_without_an_order_are_taken_in_the_usual_one(tmp_path):
    channels = [tone(200 * (i + 1), 2, level=0.8) for i in range(6)]
    path = write_wav(tmp_path / "a.wav", [s16(channel) for channel in channels])
    sound, _ = read_track(path, REQUEST, 0.0)
    np.testing.assert_allclose(levels(sound.waveform[:RATE] / 2**15), 0.8 * MIX, atol=4e-3)


def test_more_channels_than_have_a_usual_order(tmp_path):
    path = write_wav(tmp_path / "a.wav", [s16(tone(100 * (i + 1), 1)) for i in range(12)])
    sound, flags = read_sound(path, REQUEST)
    assert np.array_equal(sound.waveform[:RATE], s16(tone(100, 1)) / 2**15)
    assert flags == ()
    assert read_track(path, OPTIONAL, 0.0) == (None, ("no-audio-track",))


# odd lengths and damage


def test_eleven_milliseconds_are_short(tmp_path):
    samples = s16(tone(440, 0.011))
    path = write_wav(tmp_path / "a.wav", [samples])
    sound, flags = read_sound(path, REQUEST)
    assert np.array_equal(sound.waveform[: len(samples)], samples / 2**15)
    assert not sound.waveform[len(samples) :].any()
    assert (flags, sound.duration_s) == (("short-audio",), 0.011)
    sound, flags = read_track(path, REQUEST, 0.0)
    assert flags == ("short-audio",)
    assert np.array_equal(sound.waveform[: 8 * len(samples)], np.tile(samples, 8))


def test_damaged_packets_in_the_middle_cost_only_themselves(tmp_path):
    path = write_movie(tmp_path / "a.mp4", ("aac", [tone(440, 2, 48000)], 48000))
    whole, _ = hear(path)
    num_packets = spoil(path, 40, 44)
    sound, flags = hear(path)
    assert flags == ("short-audio",)
    lost_s = whole.duration_s - sound.duration_s
    assert lost_s <= 5 * 1024 / 48000 + 1e-3
    assert num_packets > 90
    # before and after the damage the tone is there
    track = read_sound(path, REQUEST)[0].waveform
    assert level_at(track[1600:11200], 440) == pytest.approx(0.5, abs=0.01)
    assert level_at(track[17600:27200], 440) == pytest.approx(0.5, abs=0.01)
    assert read_sound(path, REQUEST)[1] == ("short-audio",)


def test_damaged_flac_goes_on_after_the_damage(tmp_path):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 2 * RATE)
    path = write_media(tmp_path / "a.flac", ("flac", [samples], RATE))
    # FFmpeg's parser drops what is no frame without a word: the missing length tells
    spoil(path, 3, 12, fill=0)
    sound, flags = read_sound(path, REQUEST)
    assert flags == ("short-audio",)
    assert sound.spans_s[0][1] == pytest.approx(2 - 9 * 1152 / RATE)


TRUNCATED = {
    "wav": ("pcm_s16le", {}),
    "flac": ("flac", {}),
    "aiff": ("pcm_s16be", {}),
    "m4a": ("aac", {"container_options": {"movflags": "faststart"}}),
    "mka": ("pcm_s16le", {}),
    "ogg": ("libopus", {}),
    "mp3": ("libmp3lame", {}),
    "aac": ("aac", {}),
}


@pytest.mark.parametrize("name", TRUNCATED)
def test_truncated_file_gives_what_is_there(tmp_path, name):
    codec, kwargs = TRUNCATED[name]
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 5 * 48000)
    path = write_media(tmp_path / f"a.{name}", (codec, [noise], 48000), **kwargs)
    whole, flags = read_sound(path, REQUEST)
    assert flags == ()
    assert whole.duration_s == pytest.approx(5, abs=0.06)
    assert whole.spans_s[0][1] == pytest.approx(5, abs=0.06)
    os.truncate(path, Path(path).stat().st_size * 6 // 10)
    sound, flags = read_sound(path, REQUEST)
    assert 1.5 < sound.spans_s[0][1] < 4
    if name not in ("ogg", "mp3", "aac"):  # their heads do not say how long they are
        assert flags == ("short-audio",)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_truncated_video_is_short_of_sound(tmp_path, name):
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 6 * 48000)
    options = {"movflags": "faststart"} if name == "a.mp4" else {}
    path = write_movie(
        tmp_path / name, ("aac", [noise], 48000), picture_s=6.0, container_options=options
    )
    os.truncate(path, Path(path).stat().st_size * 6 // 10)
    sound, flags = hear(path)
    assert 2 < sound.duration_s < 5
    assert "short-audio" in flags


def test_track_shorter_than_the_picture_is_flagged_and_a_longer_one_is_not(tmp_path):
    for seconds, expected in [(1.2, ("short-audio",)), (1.8, ()), (3.5, ())]:
        track = ("aac", [tone(440, seconds, 48000)], 48000)
        sound, flags = hear(write_movie(tmp_path / "a.mp4", track))
        assert flags == expected
        assert sound.duration_s == pytest.approx(seconds, abs=0.05)


def test_not_a_number_is_refused(tmp_path):
    for value in (np.nan, np.inf):
        samples = tone(440, 1)
        samples[500] = value
        path = write_wav(tmp_path / "a.wav", [samples], kind="f32")
        kind, message = failure(path)
        assert (kind, "NaN" in message) == ("decode", True)


def test_absurd_sample_rate_is_refused(tmp_path):
    path = write_wav(tmp_path / "a.wav", [np.zeros(800, np.int16)], 14_171_776)
    kind, message = failure(path)
    assert (kind, "14171776 Hz" in message) == ("decode", True)


# which track is heard

DEFAULT = av.stream.Disposition.default
NO_DISPOSITION = av.stream.Disposition(0)


@pytest.mark.parametrize(
    ("dispositions", "numbers", "expected"),
    [
        ((DEFAULT, NO_DISPOSITION), (1, 2), 0),
        ((NO_DISPOSITION, DEFAULT), (2, 1), 1),
        ((NO_DISPOSITION, NO_DISPOSITION), (1, 2), 1),
        ((NO_DISPOSITION, NO_DISPOSITION), (1, 1), 0),
        ((DEFAULT, DEFAULT), (1, 2), 1),
    ],
    ids=["default first", "default last", "more channels", "a tie", "two defaults"],
)
def test_track_is_chosen_as_ffmpeg_chooses(tmp_path, dispositions, numbers, expected):
    tracks = [
        ("pcm_s16le", [tone(hertz, 1)] * number, RATE, 0.0, disposition)
        for hertz, number, disposition in zip((400, 1000), numbers, dispositions)
    ]
    path = write_movie(tmp_path / "a.mkv", *tracks, picture_s=1.0)
    for sound in (hear(path)[0], read_sound(path, REQUEST)[0]):
        scale = 2.0**15 if sound.waveform.dtype == np.int16 else 1.0
        found = [level_at(sound.waveform[:RATE] / scale, hertz) for hertz in (400, 1000)]
        assert found[expected] == pytest.approx(0.5, abs=1e-3)
        assert found[1 - expected] < 1e-3


def test_unreadable_track_counts_as_none(tmp_path):
    path = write_movie(tmp_path / "a.mp4", ("aac", [tone(440, 2, 48000)], 48000))
    assert probe(path, "video").has_sound
    patch_codec(path)
    sound, flags = hear(path)
    assert (sound.waveform.any(), flags) == (False, ("no-audio-track",))
    assert hear(path, OPTIONAL) == (None, ("no-audio-track",))
    assert not probe(path, "video").has_sound
    assert failure(path) == ("decode", "cannot decode: no decoder for the sound in this file")


def test_track_without_a_whole_packet_counts_as_none(tmp_path):
    path = write_movie(tmp_path / "a.mp4", ("aac", [tone(440, 2, 48000)], 48000))
    spoil(path, 0, None)
    assert hear(path, OPTIONAL) == (None, ("no-audio-track",))
    assert failure(path) == ("decode", "cannot decode: no sound can be decoded")


# a range of time


def in_range(start_s, end_s, window=WINDOW, is_required=True):
    return SoundRequest(window, is_required, start_s=start_s, end_s=end_s)


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "pcm_s16le"), ("a.mp4", "aac")])
def test_range_counts_from_the_first_frame_where_the_track_begins_late(tmp_path, name, codec):
    # 400 Hz from 1 s, 1000 Hz from 2 s, nothing before
    samples = np.concatenate([tone(400, 1, 48000), tone(1000, 1, 48000)])
    path = write_movie(tmp_path / name, (codec, [samples], 48000, 1.0), picture_s=3.0)
    sound, flags = hear(path, in_range(2.0, 3.0))
    heard = sound.waveform[:15000] / 2**15
    assert level_at(heard[1000:], 1000) == pytest.approx(0.5, abs=0.01)
    assert level_at(heard[1000:], 400) < 0.01
    assert sound.spans_s[0] == pytest.approx((2.0, 3.0), abs=0.03)
    assert flags == ()
    # half of this range is before the track
    sound, _ = hear(path, in_range(0.5, 1.5))
    assert sound.spans_s[0] == pytest.approx((1.0, 1.5), abs=0.03)
    assert level_at(sound.waveform[1000:7000] / 2**15, 400) == pytest.approx(0.5, abs=0.01)
    sound, flags = hear(path, in_range(0.2, 0.7))
    assert (sound.waveform.any(), sound.spans_s, flags) == (False, (), ("short-audio",))
    assert hear(path, in_range(0.2, 0.7, is_required=False)) == (None, ("short-audio",))
    # the same when the video is only listened to
    sound, _ = read_sound(path, in_range(2.0, 3.0))
    assert sound.spans_s[0] == pytest.approx((2.0, 3.0), abs=0.03)
    assert level_at(sound.waveform[1000:15000], 1000) == pytest.approx(0.5, abs=0.01)


def test_range_of_a_track_is_cut_to_the_sample(tmp_path):
    samples = np.random.default_rng(0).integers(-9000, 9000, 4 * RATE) / 2**15
    path = write_movie(tmp_path / "a.mkv", ("pcm_s16le", [samples], RATE), picture_s=4.0)
    sound, flags = hear(path, in_range(1.25, 2.0))
    expected = np.tile(np.round(samples[20000:32000] * 2**15), 8)
    assert np.array_equal(sound.waveform[: len(expected)], expected)
    assert (sound.spans_s, flags) == (((1.25, 2.0),) * 8, ())
    # reversed ends are swapped, as those of the picture
    assert np.array_equal(hear(path, in_range(2.0, 1.25))[0].waveform[:96_000], expected)


def test_track_that_ends_before_the_range_does_is_flagged(tmp_path):
    path = write_movie(tmp_path / "a.mkv", ("pcm_s16le", [tone(440, 2)], RATE), picture_s=6.0)
    assert hear(path, in_range(0.0, 2.0))[1] == ()
    assert hear(path, in_range(0.0, 2.4))[1] == ()
    assert hear(path, in_range(0.0, 4.0))[1] == ("short-audio",)
    assert hear(path, in_range(4.0, 5.0))[1] == ("short-audio",)


def test_early_range_does_not_decode_the_whole_track(tmp_path):
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 20 * RATE)
    path = write_movie(tmp_path / "a.mkv", ("pcm_s16le", [noise], RATE), picture_s=20.0)
    whole, _ = hear(path)
    sound, flags = hear(path, in_range(0.0, 2.0))
    np.testing.assert_allclose(sound.waveform[:32000], noise[:32000] * 2**15, atol=1, rtol=0)
    assert (flags, whole.duration_s) == ((), 20.0)
    assert sound.duration_s == pytest.approx(20.0, abs=0.05)  # as its header has it
    with open_container(path) as container:
        track = open_track(container, in_range(0.0, 2.0))
        for packet in packets(container, track.stream):
            track.feed(packet)
        track.finish()
        assert 2 * RATE < len(track.samples) < 6 * RATE


def test_window_of_an_audio_file(tmp_path):
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, 5 * RATE)
    path = write_wav(tmp_path / "a.wav", [samples])
    window = SoundWindow(duration_s=2.0, num_clips=1, clip_s=1.0)

    def spans(**kwargs):
        sound, flags = read_sound(path, SoundRequest(window, is_required=True, **kwargs))
        (start_s, end_s) = sound.spans_s[0]
        heard = samples[round(start_s * RATE) : round(end_s * RATE)] / 2**15
        assert np.array_equal(sound.waveform[: len(heard)], heard)
        assert not sound.waveform[len(heard) :].any()
        assert (len(sound.waveform), flags) == (32_000, ())
        return start_s, end_s, sound.duration_s

    assert spans() == (0.0, 2.0, 5.0)
    assert spans(audio_start_s=1.5) == (1.5, 3.5, 5.0)
    assert spans(start_s=1.0, end_s=1.5) == (1.0, 1.5, 5.0)
    assert spans(start_s=1.0, end_s=4.0, audio_start_s=3.0) == (3.0, 4.0, 5.0)
    assert spans(start_s=4.5) == (4.5, 5.0, 5.0)
    assert spans(end_s=0.25) == (0.0, 0.25, 5.0)


def test_start_beyond_the_end_tells_the_length(tmp_path):
    path = write_wav(tmp_path / "a.wav", [s16(tone(440, 2))])
    for request in (
        SoundRequest(WINDOW, is_required=True, start_s=7.5),
        SoundRequest(WINDOW, is_required=True, audio_start_s=2.0),
    ):
        kind, message = failure(path, request)
        assert kind == "out-of-range"
        assert "the file is 2.00 s long" in message
    assert failure(path, in_range(7.5, 9.0)) == (
        "out-of-range",
        "no sound between 7.5 s and 9 s: the file is 2.00 s long",
    )


# sound that changes on the way


def concatenate(path, *parts):
    Path(path).write_bytes(b"".join(Path(part).read_bytes() for part in parts))
    return str(path)


def test_change_of_rate_and_channels_within_a_track(tmp_path):
    first = write_media(tmp_path / "1.aac", ("aac", [tone(440, 2, 48000)] * 2, 48000))
    second = write_media(tmp_path / "2.aac", ("aac", [tone(880, 2, 22050)], 22050))
    path = concatenate(tmp_path / "a.aac", first, second)
    sound, _ = read_track(path, REQUEST, 0.0)
    assert sound.duration_s == pytest.approx(4, abs=0.15)
    wide = SoundRequest(SoundWindow(duration_s=30.0, num_clips=1, clip_s=30.0), is_required=True)
    samples = read_track(path, wide, 0.0)[0].waveform / 2**15
    assert level_at(samples[8000:24000], 440) == pytest.approx(0.5, abs=0.01)
    assert level_at(samples[40000:56000], 880) == pytest.approx(0.5, abs=0.01)
    # an audio file ends where another recording begins, and says so
    sound, flags = read_sound(path, REQUEST)
    assert (flags, sound.spans_s[0][1]) == (("short-audio",), pytest.approx(2, abs=0.1))


def test_change_within_the_track_of_a_video(tmp_path):
    parts = [
        write_movie(tmp_path / f"{i}.ts", ("aac", [tone(440, 2, rate)] * num, rate))
        for i, (rate, num) in enumerate([(48000, 2), (32000, 1)])
    ]
    sound, _ = hear(concatenate(tmp_path / "a.ts", *parts))
    assert sound.duration_s == pytest.approx(4, abs=0.2)


# containers and codecs

CODECS = {
    "wav": "pcm_s16le",
    "flac": "flac",
    "mp3": "libmp3lame",
    "ogg": "flac",
    "oga": "libopus",
    "m4a": "aac",
    "aac": "aac",
    "aiff": "pcm_s16be",
    "wma": "wmav2",
    "webm": "libopus",
    "mka": "ac3",
}


@pytest.mark.parametrize("name", CODECS)
def test_sound_files_are_known_by_their_content(tmp_path, name):
    path = write_media(
        tmp_path / "a.dat",
        (CODECS[name], [tone(440, 2, 48000)], 48000),
        format={"m4a": "ipod", "aac": "adts", "wma": "asf", "mka": "matroska"}.get(name, name),
    )
    assert find_kind(path, "unknown") == "audio"
    found = probe(path, "unknown")
    assert (found.kind, found.has_sound, found.width, found.num_total) == ("audio", True, 0, 0)
    assert found.duration_s == pytest.approx(2, abs=0.3)
    sound, flags = read_sound(path, REQUEST)
    assert flags == ()
    assert sound.spans_s[0] == pytest.approx((0, 2), abs=0.06)
    assert level_at(sound.waveform[4000:24000], 440) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("name", "codec"), [("a.m4a", "aac"), ("a.mp3", "libmp3lame")])
def test_cover_picture_makes_no_video(tmp_path, name, codec):
    path = str(tmp_path / name)
    with av.open(path, "w", format="mp4" if codec == "aac" else "mp3") as container:
        stream = container.add_stream(codec, rate=48000, layout="mono")
        cover = container.add_stream("png", rate=1)
        cover.width = cover.height = 32
        cover.pix_fmt = "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        still = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        packets = [*cover.encode(still), *cover.encode()]
        frame = av.AudioFrame.from_ndarray(tone(440, 2, 48000)[None].astype("f4"), "fltp", "mono")
        frame.sample_rate = 48000
        container.mux([*packets, *stream.encode(frame), *stream.encode()])
    assert probe(path, "unknown").kind == "audio"
    sound, flags = read_sound(path, REQUEST)
    assert level_at(sound.waveform[4000:24000], 440) == pytest.approx(0.5, abs=0.03)
    assert flags == ()
    with pytest.raises(InputError, match="a model with ears takes --modality audio") as caught:
        read_frames(path, "video", num_frames=2)
    assert caught.value.kind == "no-video"


def test_webm_with_picture_and_sound(tmp_path):
    path = write_movie(tmp_path / "a.webm", ("libopus", [tone(440, 2, 48000)], 48000))
    assert probe(path, "unknown").kind == "video"
    sound, flags = hear(path)
    assert level_at(sound.waveform[4000:24000] / 2**15, 440) == pytest.approx(0.5, abs=0.02)
    assert flags == ()


def test_what_holds_no_sound_is_refused(tmp_path):
    (tmp_path / "text.wav").write_text("hello " * 100)
    (tmp_path / "short.wav").write_bytes(b"RIFF")
    assert failure(tmp_path / "text.wav")[0] == "decode"
    assert failure(tmp_path / "short.wav")[0] == "decode"
    path = write_movie(tmp_path / "a.mp4")
    assert failure(path) == ("no-audio", "this file has a picture but no sound")
    assert failure(write_wav(tmp_path / "empty.wav", [np.zeros(0)]))[0] == "decode"
    (tmp_path / "list.m3u").write_text("#EXTM3U\nhttp://127.0.0.1:9/a.mp3\n")
    assert failure(tmp_path / "list.m3u")[0] == "decode"


def test_pictures_and_folders_have_no_sound(tmp_path):
    from PIL import Image

    for i in range(3):
        Image.new("RGB", (60, 40)).save(tmp_path / f"{i}.png")
    for path, kind in [(tmp_path, "video"), (tmp_path / "0.png", "image")]:
        frames = read_frames(str(path), kind, num_frames=2, sound=REQUEST)
        assert frames.flags == ("no-audio-track",)
        assert (frames.sound.waveform.shape, frames.sound.waveform.any()) == ((480_000,), False)
        assert read_frames(str(path), kind, num_frames=2, sound=OPTIONAL).sound is None


# one opening, many processes


@pytest.fixture
def openings(monkeypatch):
    """The files that PyAV was asked to open."""
    opened = []
    real = av.open
    monkeypatch.setattr(
        av, "open", lambda path, *a, **k: opened.append(path) or real(path, *a, **k)
    )
    return opened


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm"])
def test_picture_and_sound_are_opened_once(tmp_path, openings, name):
    path = write_movie(tmp_path / name, ("libopus", [tone(440, 2, 48000)], 48000))
    openings.clear()
    plain = read_frames(path, "video", num_frames=8)
    assert len(openings) == 1
    both = read_frames(path, "video", num_frames=8, sound=REQUEST)
    assert len(openings) == 2
    assert both.sound.waveform.any()
    assert (both.indices, both.timestamps_s) == (plain.indices, plain.timestamps_s)
    assert all(np.array_equal(a, b) for a, b in zip(both.images, plain.images))


def loaded_libraries(pid):
    lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
    return {Path(line.split()[-1]).name.split(".")[0].split("_")[0] for line in lines}


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_sound_arrives_through_the_pool(tmp_path):
    video = write_movie(tmp_path / "a.mp4", ("aac", [tone(440, 2, 48000)] * 2, 48000))
    song = write_wav(tmp_path / "a.wav", [s16(tone(440, 3, 44100))], 44100)
    silent = write_movie(tmp_path / "b.mp4")
    (tmp_path / "text.wav").write_text("hello " * 100)
    with DecodePool(1) as pool:

        def clip(path, kind, request=REQUEST, geometry=GEOMETRY):
            wanted = ClipRequest(str(path), kind, geometry, num_frames=3, sound=request)
            return pool.submit(wanted).result(30)

        both, expected = clip(video, "video"), hear(video)[0]
        assert both.frames.shape == (3, 28, 28, 3)
        assert np.array_equal(both.sound.waveform, expected.waveform)
        assert (both.sound.spans_s, both.sound.duration_s, both.flags) == (
            expected.spans_s,
            expected.duration_s,
            (),
        )
        for path, kind in [(song, "unknown"), (song, "audio"), (video, "audio")]:
            heard, expected = clip(path, kind, geometry=None), read_sound(path, REQUEST)[0]
            assert heard.sound.waveform.dtype == np.float64
            assert np.array_equal(heard.sound.waveform, expected.waveform)
            assert (heard.kind, heard.frames, heard.indices) == ("audio", None, ())
            assert (heard.duration_s, heard.fps) == (expected.duration_s, 0.0)
        assert clip(video, "video", None).sound is None
        unheard = clip(silent, "video", OPTIONAL)
        assert (unheard.sound, unheard.flags) == (None, ("no-audio-track",))
        assert pool.submit_probe(song, "unknown").result(30).kind == "audio"
        ranged = clip(video, "video", in_range(0.5, 1.0))
        assert ranged.sound.spans_s[0] == pytest.approx((0.5, 1.0), abs=0.03)
        for path, kind in [(tmp_path / "text.wav", "audio"), (silent, "audio"), (song, "video")]:
            with pytest.raises(InputError) as caught:
                clip(path, kind)
            assert caught.value.kind in ("decode", "no-audio", "no-video")
        (pid,) = pool.worker_pids()
        assert not {"libtorch", "libtorchaudio"} & set(loaded_libraries(pid))


def test_clips_that_fill_the_window_to_the_last_sample(tmp_path):
    # three clips of a length that no sample count is a multiple of, one after the other
    window = SoundWindow(duration_s=1.0, num_clips=3, clip_s=1 / 3)
    path = write_wav(tmp_path / "a.wav", [np.full(7 * RATE, 99, np.int16)])
    for seconds in (0.2, 1.0, 6.9):
        request = SoundRequest(window, is_required=True, start_s=0.0, end_s=seconds)
        sound, _ = read_track(path, request, 7.0)
        assert len(sound.waveform) == RATE


def test_windows_media_is_seen_and_heard(tmp_path):
    path = write_movie(tmp_path / "a.wmv", ("wmav2", [tone(440, 2, 44100)] * 2, 44100))
    sound, flags = hear(path)
    assert "no-audio-track" not in flags
    assert level_at(sound.waveform[3200:19200] / 2**15, 440) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("start_s", [1.5, 20.0], ids=["in the end", "after the end"])
def test_track_that_begins_long_after_the_picture_is_flagged(tmp_path, start_s):
    path = write_movie(tmp_path / "a.mkv", ("aac", [tone(440, 1)], RATE, start_s), picture_s=2.5)
    assert hear(path)[1] == ("short-audio",)


def test_level_beyond_all_recordings_is_refused(tmp_path):
    path = write_wav(tmp_path / "a.wav", [np.full(RATE, 1e30)], kind="f32")
    assert failure(path)[0] == "decode"
