import hashlib
import json
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from tests.goldens import golden_audio, media
from vla2_models.sound import SoundWindow
from vla2cli.media.frames import read_frames
from vla2cli.media.records import SoundRequest
from vla2cli.media.sound import read_sound
from vla2cli.media.stills import pad_with_black
from vla2cli.preprocess import FrameGeometry, expand_to_square, fbank, fit_frame, normalise

CLIP_OLD = {
    "crop_size": 56,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 56,
}
CLIP_NEW = CLIP_OLD | {
    "crop_size": {"height": 56, "width": 56},
    "size": {"shortest_edge": 56},
    "image_processor_type": "CLIPImageProcessor",
    "rescale_factor": 0.00392156862745098,
}
SIGLIP = {
    "image_processor_type": "SiglipImageProcessor",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 70, "width": 70},
}
GEOMETRY = {
    "clip": FrameGeometry.from_config(CLIP_OLD),
    "siglip": FrameGeometry.from_config(SIGLIP),
}


def pixel_values(images, geometry, pad=False):
    if pad:
        images = [expand_to_square(image, geometry.image_mean) for image in images]
    return normalise(np.stack([fit_frame(image, geometry) for image in images]), geometry)


def tower(shared, name):
    path = shared / "golden/vision/towers" / name / "preprocessor_config.json"
    return FrameGeometry.from_config(json.loads(path.read_text()))


def test_old_and_new_forms_of_a_config_mean_the_same():
    assert FrameGeometry.from_config(CLIP_OLD) == FrameGeometry.from_config(CLIP_NEW)


@pytest.mark.parametrize("tower_name", GEOMETRY)
def test_geometry_survives_json(tower_name):
    geometry = GEOMETRY[tower_name]
    assert FrameGeometry.from_dict(json.loads(json.dumps(asdict(geometry)))) == geometry


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_rescale": False}, "do_rescale"),
        ({"do_center_crop": False}, "do_center_crop"),
        ({"image_processor_type": "ViTImageProcessor"}, "ViTImageProcessor"),
        ({"size": {"longest_edge": 56}}, "longest_edge"),
        ({"crop_size": "big"}, "big"),
        ({"image_mean": [0.5]}, "three numbers"),
        ({"resample": 99}, "99"),
    ],
)
def test_config_that_is_not_understood_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        FrameGeometry.from_config(CLIP_OLD | change)


@pytest.mark.parametrize("crop", [56, {"height": 41, "width": 83}], ids=["crop", "larger_crop"])
@pytest.mark.parametrize("size", [(56, 56), (1, 7), (7, 1), (33, 100), (101, 57), (361, 639)])
def test_clip_pixels_equal_transformers(size, crop):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    config = CLIP_NEW | {"crop_size": crop}
    image = np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), np.uint8)
    processor = CLIPImageProcessorPil(**config)
    expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"]
    got = pixel_values([image], FrameGeometry.from_config(config))
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("size", [(70, 70), (1, 7), (33, 100), (101, 57), (361, 639)])
def test_siglip_pixels_equal_transformers(size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    image = np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), np.uint8)
    processor = SiglipImageProcessorPil(**SIGLIP)
    expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"]
    assert np.array_equal(pixel_values([image], GEOMETRY["siglip"]), expected)


def test_raw_frames_give_the_reference_pixels(shared):
    data = shared / "golden/vision/data"
    frames = np.load(data / "mistral_clip_stc_8f.cap.raw_frames.npz")["frames"]
    expected = load_file(data / "mistral_clip_stc_8f.cap.safetensors")["pixel_values"]
    got = pixel_values(frames, tower(shared, "openai/clip-vit-tiny-patch14-56"))
    assert np.array_equal(got, expected)
    assert got.flags.c_contiguous


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("mistral_clip_stc_16f_336", "openai/clip-vit-tiny-patch14-336"),
        ("qwen2_siglip_stcv35_16f_384", "google/siglip-tiny-patch14-384"),
    ],
)
def test_full_size_crops_and_pixels_match_reference(shared, case, name):
    data = shared / "golden/vision/data"
    media = json.loads((data / f"{case}.json").read_text())["runs"]["cap"]["media"]
    geometry = tower(shared, name)
    frames = read_frames(str(shared / "media" / media), "video", num_frames=16)
    crops = np.stack([fit_frame(image, geometry) for image in frames.images])
    golden = np.load(data / f"{case}.cap.crop_u8.npz")
    expected = golden["crop_u8"].transpose(0, 2, 3, 1)
    assert np.array_equal(crops[golden["frame_slots"]], expected)
    tensors = load_file(data / f"{case}.cap.safetensors")
    got = normalise(crops, geometry)
    assert np.array_equal(got[:1], tensors["pixel_values_frame0"])
    spread = np.stack([got.mean((1, 2, 3)), got.std((1, 2, 3), ddof=1)], axis=1)
    assert np.allclose(spread, tensors["pixel_mean_std_per_frame"], atol=1e-5)


CASES = ["mistral_clip_stc_8f", "mixtral_clip_stc_8f", "qwen2_siglip_stcv35_16f"]


@pytest.mark.parametrize("case", CASES)
def test_every_run_decodes_and_preprocesses_as_the_reference(shared, case):
    data = shared / "golden/vision/data"
    root = shared / "golden/vision/checkpoints" / case
    tower_name = json.loads((root / "config.json").read_text())["mm_vision_tower"]
    geometry = tower(shared, tower_name)
    for run, about in json.loads((data / f"{case}.json").read_text())["runs"].items():
        tensors = load_file(data / f"{case}.{run}.safetensors")
        if "pixel_values" not in tensors:
            continue
        kwargs = about.get("process_kwargs", {})
        frames = read_frames(
            str(shared / "media" / about["media"]),
            about["modal"],
            num_frames=len(tensors["frame_indices"]) if about["modal"] == "video" else None,
            start_s=kwargs.get("s"),
            end_s=kwargs.get("e"),
        )
        if about["modal"] == "video":
            assert list(frames.indices) == tensors["frame_indices"].tolist()
            hashes = [hashlib.sha256(image.tobytes()).hexdigest() for image in frames.images]
            assert hashes == about["raw_frame_sha256"]
        assert np.array_equal(pixel_values(frames.images, geometry), tensors["pixel_values"])


FOLDERS = {"folder_none": "frames", "folder_pad": "frames", "folder_range": "frames"}
GIFS = {"gif_few": "anim.gif", "gif_dups": "anim.gif"}
LISTS = {
    "list_short_pad": ["frames/1.png", "frames/2.png"],
    "list_short_none": ["frames/1.png", "frames/2.png"],
    "list_none_frames": ["frames/1.png", "frames/2.png"],
    "list_grey": ["grey.png"] * 2,
    "list_rgba": ["rgba.png"] * 2,
}
IMAGES = {"img_none": "one.png", "img_pad": "one.png", "grey": "grey.png", "rgba": "rgba.png"}


def misc_images(media, tag, kwargs):
    sampling = {
        "num_frames": kwargs.get("num_frames"),
        "start_s": kwargs.get("s"),
        "end_s": kwargs.get("e"),
    }
    if tag in FOLDERS | GIFS:
        return read_frames(str(media / (FOLDERS | GIFS)[tag]), "video", **sampling).images
    if tag in LISTS:
        paths = [str(media / name) for name in LISTS[tag]]
        images = [read_frames(p, "image", num_frames=None).images[0] for p in paths]
        return pad_with_black(images, kwargs["num_frames"] or 0)
    return read_frames(str(media / IMAGES[tag]), "image", num_frames=None).images


@pytest.mark.parametrize("tag", [*FOLDERS, *GIFS, *LISTS, *IMAGES])
@pytest.mark.parametrize("tower_name", GEOMETRY)
def test_folders_gifs_and_pictures_match_reference(shared, tower_name, tag):
    data = shared / "golden/vision/data"
    about = json.loads((data / "preprocess_misc.json").read_text())[f"{tower_name}.{tag}"]
    kwargs = about.get("kwargs", {})
    images = misc_images(shared / "golden/vision/media", tag, kwargs)
    is_padded = kwargs.get("aspect_ratio") == "pad" or tag == "img_pad"
    got = pixel_values(images, GEOMETRY[tower_name], pad=is_padded)
    if "error" in about:  # the reference cannot take grey or RGBA here, we can
        assert got.shape == (2, 3, 70, 70)
    else:
        assert np.array_equal(got, np.load(data / "preprocess_misc.npz")[f"{tower_name}.{tag}"])


def test_expand_to_square_centres_a_wide_frame():
    wide = np.zeros((1, 4, 3), np.uint8)
    square = expand_to_square(wide, (0.48145466, 0.4578275, 0.40821073))
    assert square.shape == (4, 4, 3)
    assert square[:, 0].tolist() == [[122, 116, 104], [0, 0, 0], [122, 116, 104], [122, 116, 104]]


def test_a_frame_that_is_not_rgb_is_refused():
    with pytest.raises(ValueError, match=r"expected \(H, W, 3\)"):
        fit_frame(np.zeros((4, 4), np.uint8), GEOMETRY["clip"])


# the fbank


def bits_of(rows):
    return rows.view(torch.int16).numpy().view(np.uint16)


FBANK_FILES = [
    "sine440_16k.wav",
    "noise_16k.wav",
    "speech_22k.wav",
    "stereo_44k.wav",
    "mono_8k.wav",
    "silence_16k.wav",
    "long35_16k.flac",
]


@pytest.mark.parametrize("name", FBANK_FILES)
def test_fbank_of_a_file_is_the_references_bit_for_bit(name):
    meta = json.loads(golden_audio("fbank/meta.json").read_text(encoding="utf-8"))[name]
    stored = np.load(golden_audio(f"fbank/{name.rpartition('.')[0]}.npz"))
    crop = meta["crop_start_and_max"]
    start_s = crop and crop[0] / meta["sample_rate"]
    request = SoundRequest(SoundWindow(), is_required=True, audio_start_s=start_s)
    sound, _ = read_sound(str(golden_audio(f"fbank/{name}")), request)
    begin = stored["waveform16k"]
    np.testing.assert_allclose(sound.waveform[: len(begin)], begin, atol=1e-6, rtol=0)
    rows = fbank(sound.waveform)
    assert (rows.dtype, tuple(rows.shape)) == (torch.bfloat16, (2998, 128))
    assert np.array_equal(bits_of(rows), stored["fbank_bf16_bits"])


@pytest.mark.parametrize("case", ["audio", "av", "av_long", "av_short", "av_silent"])
def test_fbank_of_a_real_clip_matches_reference(case):
    file = load_torch(golden_audio(f"e2e/{case}.safetensors"))
    meta = json.loads(golden_audio("e2e/meta.json").read_text(encoding="utf-8"))[case]
    path, request = str(media(meta["media"])), SoundRequest(SoundWindow(), is_required=True)
    if case == "audio":
        waveform = read_sound(path, request)[0].waveform
    else:
        waveform = read_frames(path, "video", num_frames=1, sound=request).sound.waveform
    rows = fbank(waveform)
    expected = file.get("fbank_bf16", torch.full((1, 2998, 128), -15.9375, dtype=torch.bfloat16))
    flipped = rows != expected[0]
    assert flipped.float().mean() <= (0 if case in ("audio", "av_silent") else 1e-3)
    # bits read as an integer: a flip is to the next number, from a sample that is one unit off to
    # the one after at most
    steps = rows.view(torch.int16).int() - expected[0].view(torch.int16).int()
    assert steps.abs().max() <= 2
    if "waveform16k" in file and case != "audio":
        # from the reference's own samples nothing may differ
        assert torch.equal(fbank(file["waveform16k"].numpy()), expected[0])


def test_fbank_of_stored_samples_before_rounding():
    file = load_torch(golden_audio("e2e/audio.safetensors"))
    rows = fbank(file["waveform16k"].double().numpy())
    torch.testing.assert_close(rows.float(), file["fbank_raw"], atol=0.0626, rtol=0)


def test_fbank_of_silence_is_one_number():
    for dtype in (np.int16, np.float64):
        rows = fbank(np.zeros(2800, dtype))
        assert rows.shape == (16, 128)
        assert (rows == -15.9375).all()


@pytest.mark.parametrize("num", [400, 559, 560, 4999])
def test_fbank_has_a_row_for_every_whole_window(num):
    assert len(fbank(np.ones(num, np.int16))) == 1 + (num - 400) // 160


def test_fbank_agrees_with_the_stored_filters_and_window():
    # the definition written out: frame, mean, pre-emphasis, window, power, filters, log
    stored = np.load(golden_audio("fbank/mel_and_window.npz"))
    samples = np.random.default_rng(0).standard_normal(1600) * 3000
    frames = np.stack([samples[i : i + 400] for i in range(0, 1600 - 399, 160)])
    frames = frames - frames.mean(axis=1, keepdims=True)
    frames = frames - 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    power = np.abs(np.fft.rfft(frames * stored["povey_window"], 512)) ** 2
    energy = power[:, :256] @ stored["mel_filters"].astype(np.float64).T
    expected = np.log(np.maximum(energy, 1.1920929e-07))
    rows = fbank(samples / 2**15).float().numpy()
    np.testing.assert_allclose(rows, expected, rtol=2**-8)
    assert (rows[:, 3] == -15.9375).all()  # the one filter that is empty


@pytest.mark.parametrize(
    "waveform",
    [np.zeros((1, 800), np.int16), np.zeros(800, np.float32), np.zeros(399, np.int16)],
    ids=["2-D", "float32", "shorter than a row"],
)
def test_fbank_rejects_what_no_reader_gives(waveform):
    with pytest.raises(ValueError, match="expected at least"):
        fbank(waveform)
