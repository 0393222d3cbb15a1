import os
import shutil
import socket
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from vla2cli.errors import InputError
from vla2cli.media.frames import probe, read_frames
from vla2cli.media.stills import pad_with_black
from vla2cli.media.video import read_video

SIZE = (48, 64)


def picture(i, height=SIZE[0], width=SIZE[1]):
    """A picture that no other frame resembles: a bar that moves and a block that spells `i`."""
    pixels = np.full((height, width, 3), 40, np.uint8)
    pixels[:, (3 * i) % width : (3 * i) % width + 6] = (220, 90, 30)
    for bit in range(8):
        pixels[30:42, bit * 8 : bit * 8 + 8] = 230 if i >> bit & 1 else 10
    return pixels


def write_video(
    path, codec="libx264", num=60, options=None, pts=None, rotation=None, size=SIZE, **kwargs
):
    with av.open(str(path), "w", **kwargs) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for i in range(num):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
            frame.pts = i if pts is None else pts[i]
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return str(path)


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.int16), "s16", "mono")
        frame.sample_rate = 16000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    return str(path)


def decode_all(path):
    with av.open(path) as container:
        frames = list(container.decode(video=0))
    return [f.to_ndarray(format="rgb24") for f in frames], [f.time for f in frames]


GOP = {"g": "12", "keyint_min": "12", "sc_threshold": "0"}
X264_OPEN = GOP | {"x264-params": "open-gop=1:bframes=3:b-adapt=0"}
X265_OPEN = {"x265-params": "log-level=none:keyint=12:min-keyint=12:bframes=3:open-gop=1"}
VARIABLE = [i + (i // 3) ** 2 for i in range(60)]
VIDEOS = {
    "h264 with B-frames": ("a.mp4", {"options": GOP | {"bf": "3"}}),
    "one key frame": ("a.mp4", {"options": {"g": "999"}}),
    "variable frame rate": ("a.mkv", {"pts": VARIABLE, "options": GOP}),
    "open GOP": ("a.mp4", {"options": X264_OPEN}),
    "HEVC open GOP": ("a.mp4", {"codec": "libx265", "options": X265_OPEN}),
    "MPEG-TS": ("a.ts", {"options": GOP | {"bf": "2"}}),
    "MPEG-TS open GOP": ("a.ts", {"options": X264_OPEN}),
    "MPEG-2 program stream": ("a.mpg", {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}}),
    "MPEG-4 avi": ("a.avi", {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}}),
    "raw h264 without times": ("a.h264", {"options": GOP}),
    "VP9": ("a.webm", {"codec": "libvpx-vp9", "options": {"g": "12", "deadline": "realtime"}}),
    "VP8 with hidden frames": ("a.webm", {"codec": "libvpx", "options": {"auto-alt-ref": "1"}}),
    "intra refresh": ("a.mp4", {"options": {"x264-params": "intra-refresh=1:keyint=12"}}),
    "upper-case GIF": ("a.GIF", {"codec": "gif", "num": 20}),
}


@pytest.mark.parametrize("name", VIDEOS)
@pytest.mark.parametrize("num_frames", [3, 16, 32])
def test_sampled_frames_are_those_of_a_full_decode(tmp_path, name, num_frames):
    file, how = VIDEOS[name]
    if how.get("codec") == "gif":
        path = str(tmp_path / file)
        stills = [Image.fromarray(picture(i)) for i in range(how["num"])]
        stills[0].save(path, save_all=True, append_images=stills[1:], duration=40, format="GIF")
    else:
        path = write_video(tmp_path / file, **how)
    images, times = decode_all(path)
    got = read_frames(path, "video", num_frames=num_frames)
    assert got.num_total == len(images)
    assert len(got.images) == num_frames
    assert got.flags == ()
    for image, index, timestamp_s in zip(got.images, got.indices, got.timestamps_s):
        assert np.array_equal(image, images[index]), index
        if times[0] is not None:
            assert timestamp_s == pytest.approx(times[index] - times[0], abs=1e-6)


def test_every_single_frame_of_an_open_gop_is_exact(tmp_path):
    path = write_video(tmp_path / "a.mp4", options=X264_OPEN)
    images, _ = decode_all(path)
    for first in range(60):
        # one frame at a time: each is reached by a seek of its own
        got = read_frames(path, "video", num_frames=1, start_s=(first + 1.01) / 25, end_s=None)
        index = got.indices[0]
        assert np.array_equal(got.images[0], images[index])


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_by_metadata_is_applied(tmp_path, rotation):
    path = write_video(tmp_path / "a.mp4", num=5, rotation=rotation)
    with av.open(path) as container:
        frame = next(container.decode(video=0))
    assert frame.rotation % 360 == rotation
    got = read_frames(path, "video", num_frames=5).images[0]
    assert np.array_equal(got, np.rot90(frame.to_ndarray(format="rgb24"), rotation // 90))


def test_rotated_pixels_equal_decord(tmp_path):
    pytest.importorskip("decord", reason="decord is not installed")
    path = write_video(tmp_path / "a.mp4", num=5, rotation=90, size=(64, 128))
    ours, theirs = (
        read_frames(path, "video", num_frames=5, decoder=decoder) for decoder in ("pyav", "decord")
    )
    assert all(np.array_equal(a, b) for a, b in zip(ours.images, theirs.images))


CLIPS = ["sample_demo_1.mp4", "sample_demo_3.mp4", "short_0p7s.mp4", "1034346401.mp4"]


@pytest.mark.parametrize("clip", CLIPS)
def test_pyav_equals_decord_on_real_clips(shared, clip):
    pytest.importorskip("decord", reason="decord is not installed")
    path = str(shared / "media" / clip)
    ours, theirs = (
        read_frames(path, "video", num_frames=8, decoder=decoder) for decoder in ("pyav", "decord")
    )
    assert (ours.indices, ours.num_total, ours.fps) == (
        theirs.indices,
        theirs.num_total,
        theirs.fps,
    )
    assert np.allclose(ours.timestamps_s, theirs.timestamps_s, atol=2e-3)
    assert all(np.array_equal(a, b) for a, b in zip(ours.images, theirs.images))
    assert (ours.decoder, theirs.decoder) == ("pyav", "decord")


def test_truncated_video_gives_what_is_there(tmp_path):
    path = write_video(tmp_path / "a.mp4", options=GOP, container_options={"movflags": "faststart"})
    images, _ = decode_all(path)
    size = Path(path).stat().st_size
    os.truncate(path, size * 6 // 10)
    got = read_frames(path, "video", num_frames=16)
    assert got.flags == ("partial-video",)
    assert len(got.images) == 16
    assert got.num_total < 60
    assert np.array_equal(got.images[0], images[got.indices[0]])


def test_damage_in_the_middle_is_replaced_by_frames_that_decode(tmp_path):
    path = write_video(tmp_path / "a.mp4", options=GOP | {"bf": "0"})
    images, _ = decode_all(path)
    with av.open(path) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    with Path(path).open("r+b") as file:
        for pos, size in packets[24:36]:  # one whole GOP
            file.seek(pos + 4)
            file.write(b"\0" * (size - 4))
    got = read_frames(path, "video", num_frames=30)
    assert got.flags == ("partial-video",)
    assert len(got.images) == 30
    assert not set(got.indices) & set(range(24, 36))
    for image, index in zip(got.images, got.indices):
        assert np.array_equal(image, images[index])


def test_time_range_picks_frames_of_that_range(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    got = read_frames(path, "video", num_frames=4, start_s=1.0, end_s=2.0)
    assert got.indices == (27, 33, 40, 46)
    with pytest.raises(InputError) as caught:
        read_frames(path, "video", num_frames=4, start_s=99.0, end_s=100.0)
    assert caught.value.kind == "out-of-range"


def test_without_a_number_one_frame_a_second_is_taken(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    assert read_frames(path, "video", num_frames=None).indices == (12, 37)


def test_bytes_in_a_name_that_are_not_utf8(tmp_path):
    path = write_video(tmp_path / "a.mp4", num=5)
    odd = str(tmp_path / os.fsdecode(b"odd \xff\n name.mp4"))
    shutil.move(path, odd)
    assert read_frames(odd, "video", num_frames=2).num_total == 5


def failure(path, kind="video", **kwargs):
    with pytest.raises(InputError) as caught:
        read_frames(str(path), kind, num_frames=4, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) not in message
    return caught.value.kind, message


def test_files_that_are_no_video_are_refused(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("hello " * 100)
    assert failure(tmp_path / "none.mp4") == ("missing", "no such file")
    assert failure(tmp_path / "empty.mp4") == ("empty-file", "the file is empty")
    assert failure(tmp_path / "text.mp4")[0] == "decode"
    assert failure(write_sound(tmp_path / "a.wav")) == (
        "no-video",
        "this file has sound but no picture; a model with ears takes --modality audio",
    )
    path = write_video(tmp_path / "a.mp4")
    os.truncate(path, Path(path).stat().st_size // 2)
    assert failure(path) == ("decode", "cannot decode: moov atom not found")
    assert failure(tmp_path / "text.mp4", decoder="decord")[0] == "decode"


def test_picture_of_an_unknown_codec_is_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4", num=5)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data.replace(b"avc1", b"zzzz").replace(b"avcC", b"free"))
    expected = "cannot decode: no decoder for the picture in this file"
    assert failure(path) == ("decode", expected)


def test_what_is_not_a_file_is_refused_without_opening_it(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.mp4")
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("s.mp4")
        assert failure("s.mp4") == ("not-a-file", "this is a socket, not a file")
    assert failure("pipe.mp4") == ("not-a-file", "this is a named pipe, not a file")
    assert failure("/dev/zero") == ("not-a-file", "this is a device, not a file")
    assert failure(tmp_path, "image") == ("not-a-file", "this is a folder, not a file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4", num=5)
    Path(path).chmod(0)
    assert failure(path)[0] == "unreadable"


def test_playlist_does_not_reach_the_network(tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        playlist = tmp_path / "a.m3u8"
        playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n")
        assert failure(playlist) == ("decode", "cannot decode: this is a playlist, not a video")
        with pytest.raises(TimeoutError):
            server.accept()


def save_gif(path, num=6):
    stills = [Image.fromarray(picture(i * 5)) for i in range(num)]
    stills[0].save(path, save_all=True, append_images=stills[1:], duration=100)
    return str(path)


def test_gif_takes_a_doubled_frame_once_and_fills_up_with_black(tmp_path):
    got = read_frames(save_gif(tmp_path / "a.gif"), "video", num_frames=8)
    assert got.indices == (0, 1, 2, 3, 4, 5)
    assert got.timestamps_s[1] == pytest.approx(0.04)  # 25 frames a second, whatever the file says
    assert [image.shape for image in got.images[5:]] == [(48, 64, 3), (64, 48, 3), (48, 64, 3)]
    assert not got.images[6].any()


def test_black_frames_alternate_in_shape():
    padded = pad_with_black([np.ones((2, 5, 3), np.uint8)], 4)
    assert [image.shape[:2] for image in padded] == [(2, 5), (5, 2), (2, 5), (5, 2)]


def test_folder_of_pictures_is_read_in_string_order_at_3_fps(tmp_path):
    for i in (1, 2, 10):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.png")
    got = read_frames(str(tmp_path), "video", num_frames=3)
    assert got.timestamps_s == (pytest.approx(0), pytest.approx(1 / 3), pytest.approx(2 / 3))
    for image, i in zip(got.images, (1, 10, 2)):
        assert np.array_equal(image, picture(i))
    (tmp_path / "3.png").write_text("no picture")
    assert failure(tmp_path) == ("decode", "'3.png': this is not a picture")


def test_pictures_become_rgb_and_keep_their_orientation(tmp_path):
    tagged = Image.fromarray(picture(1))
    exif = tagged.getexif()
    exif[0x0112] = 6  # "rotate by 90 degrees", which the reference does not look at
    tagged.save(tmp_path / "a.png", exif=exif)
    got = read_frames(str(tmp_path / "a.png"), "image", num_frames=8)
    assert len(got.images) == 1
    assert np.array_equal(got.images[0], picture(1))
    Image.fromarray(picture(1)).convert("L").save(tmp_path / "grey.png")
    assert read_frames(str(tmp_path / "grey.png"), "image", num_frames=8).images[0].ndim == 3


def test_damaged_pictures_are_refused(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(picture(1)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert failure(path, "image")[0] == "decode"
    # a header that claims 60,000 x 60,000 pixels
    path.write_bytes(whole[:16] + struct.pack(">II", 60_000, 60_000) + whole[24:])
    assert failure(path, "image")[0] == "decode"


def test_postscript_is_not_run(tmp_path):
    (tmp_path / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert failure(tmp_path / "a.eps", "image") == ("decode", "this is not a picture")


def test_probe_finds_the_kind(tmp_path):
    video = write_video(tmp_path / "video.dat", format="mp4")
    got = probe(video, "unknown")
    assert (got.kind, got.num_total, got.fps, got.width, got.height) == ("video", 60, 25.0, 64, 48)
    assert got.duration_s == pytest.approx(2.4)
    Image.fromarray(picture(1)).save(tmp_path / "still.dat", format="PNG")
    assert probe(str(tmp_path / "still.dat"), "unknown").kind == "image"
    assert probe(save_gif(tmp_path / "a.gif"), "unknown").kind == "video"


def test_unknown_words_are_a_callers_mistake(tmp_path):
    path = write_video(tmp_path / "a.mp4", num=2)
    with pytest.raises(ValueError, match="'opencv'"):
        read_frames(path, "video", num_frames=1, decoder="opencv")
    with pytest.raises(ValueError, match="'song'"):
        read_frames(path, "song", num_frames=1)


def test_seeking_is_used_where_it_is_exact(tmp_path, monkeypatch):
    # the slow path would hide a seek that never works
    monkeypatch.setattr("vla2cli.media.video._decode_from_start", None)
    for name in ("h264 with B-frames", "open GOP", "HEVC open GOP", "MPEG-4 avi", "VP9"):
        file, how = VIDEOS[name]
        assert len(read_video(write_video(tmp_path / file, **how), 16, None, None).images) == 16
