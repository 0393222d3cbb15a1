"""Draw the clips and the still of this folder; nothing in them comes from elsewhere.

    python examples/make_examples.py

A scene is a function of the pen and of the time, a sound is a function of the time alone, so that
every run makes the same pictures and the same waves. The bytes differ only where the encoders do.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, cos, pi, sin
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

OVERSAMPLE = 4  # drawn larger, then shrunk: smooth edges, and motion finer than a pixel
SAMPLE_RATE = 44_100
BELL_START_S = 2.0  # the cut in 08.mp4
# not 0.5 or 1: eight frames spread over the four seconds would all show the ball at one height
BOUNCE_S = 0.8

Colour = tuple[int, int, int]  # red, green, blue, 0 to 255
Point = tuple[float, float]  # x to the right, y down, in pixels
Wave = NDArray[np.float64]  # (num_samples,), values from -1 to 1, or their times in seconds

BLACK, WHITE, GREY = (24, 24, 28), (245, 245, 240), (120, 124, 130)
RED, YELLOW, GREEN, BLUE = (214, 48, 44), (250, 200, 50), (60, 170, 70), (50, 100, 200)
BROWN, GOLD = (120, 78, 48), (222, 170, 50)


class Pen:
    """Draw filled shapes on one picture; positions are in pixels and may be fractions."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.image = Image.new("RGB", (width * OVERSAMPLE, height * OVERSAMPLE))
        self.draw = ImageDraw.Draw(self.image)

    def sky(self, top: Colour, bottom: Colour) -> None:
        """Fill the picture with a shade that runs from `top` to `bottom`."""
        num_rows = self.image.height
        for row in range(num_rows):
            colour = mix(top, bottom, row / num_rows)
            self.draw.line((0, row, self.image.width, row), fill=colour)

    def box(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        """Fill a rectangle, given its upper left corner."""
        self.shape([(x, y), (x + width, y), (x + width, y + height), (x, y + height)], colour)

    def disc(self, x: float, y: float, rx: float, colour: Colour, ry: float | None = None) -> None:
        """Fill a circle around (x, y), or an ellipse when `ry` is given."""
        ry = rx if ry is None else ry
        corners = (x - rx, y - ry, x + rx, y + ry)
        self.draw.ellipse([c * OVERSAMPLE for c in corners], fill=colour)

    def shape(self, points: Iterable[Point], colour: Colour) -> None:
        """Fill a polygon."""
        self.draw.polygon([(x * OVERSAMPLE, y * OVERSAMPLE) for x, y in points], fill=colour)

    def line(self, start: Point, end: Point, colour: Colour, width: float) -> None:
        """Draw a straight line."""
        ends = [c * OVERSAMPLE for c in (*start, *end)]
        self.draw.line(ends, fill=colour, width=round(width * OVERSAMPLE))

    def picture(self) -> NDArray[np.uint8]:
        """Return what was drawn, (height, width, 3) RGB."""
        return np.asarray(self.image.reduce(OVERSAMPLE))


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Blend two colours; a share of 0 gives the first, of 1 the second."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second))
    return red, green, blue


def place(points: Iterable[Point], x: float, y: float, angle: float = 0.0) -> list[Point]:
    """Turn points around (0, 0), clockwise by `angle` in radians, then move them to (x, y)."""
    c, s = cos(angle), sin(angle)
    return [(x + px * c - py * s, y + px * s + py * c) for px, py in points]


def hills(pen: Pen, y: float, height: float, waves: float, shift: float, colour: Colour) -> None:
    """Fill everything below a wavy line around `y`."""
    turns = 2 * pi * waves / pen.width
    ridge = [(x, y - height * sin(x * turns + shift)) for x in range(0, pen.width + 5, 4)]
    pen.shape([(0, pen.height), *ridge, (pen.width, pen.height)], colour)


def cloud(pen: Pen, x: float, y: float, colour: Colour = WHITE) -> None:
    """Draw three puffs side by side."""
    for dx, dy, r in ((-16, 3, 10), (0, -3, 14), (17, 3, 11)):
        pen.disc(x + dx, y + dy, r * 1.3, colour, r * 0.8)


def car(pen: Pen, t: float) -> None:
    """Drive a red car to the right over a green meadow."""
    pen.sky((110, 180, 240), (205, 232, 250))
    cloud(pen, 70 + 3 * t, 42)
    cloud(pen, 235 + 3 * t, 62)
    hills(pen, 140, 10, 1.5, 0.4, (110, 180, 90))
    pen.box(0, 160, pen.width, 80, (84, 160, 62))
    for flower in ((30, 222), (96, 176), (150, 230), (205, 172), (262, 225), (300, 180)):
        pen.disc(*flower, 2.5, YELLOW)
    x, y, radius = 48 + 56 * t, 198, 11
    pen.shape(place([(-26, -18), (-16, -36), (14, -36), (26, -18)], x, y), RED)
    pen.shape(place([(-20, -18), (-13, -32), (-2, -32), (-2, -18)], x, y), (200, 230, 245))
    pen.shape(place([(2, -18), (2, -32), (12, -32), (20, -18)], x, y), (200, 230, 245))
    pen.shape(place([(-40, -18), (36, -18), (42, -12), (42, 2), (-40, 2)], x, y), RED)
    pen.disc(x + 39, y - 9, 3, YELLOW)
    for wheel in (x - 23, x + 23):
        pen.disc(wheel, y + 3, radius, BLACK)
        pen.disc(wheel, y + 3, 6, (190, 190, 195))
        for spoke in range(3):
            # rolls without sliding: the angle is the way divided by the radius
            ends = place([(-6, 0), (6, 0)], wheel, y + 3, x / radius + spoke * pi / 3)
            pen.line(ends[0], ends[1], BLACK, 1.5)


def ball(pen: Pen, t: float) -> None:
    """Let an orange ball bounce on a wooden floor, always to the same height."""
    pen.sky((232, 222, 204), (214, 200, 180))
    pen.box(0, 262, pen.width, 58, (170, 120, 76))
    for x in range(-40, 400, 60):
        pen.line((160 + (x - 160) * 0.8, 262), (x, 320), (140, 96, 60), 1.5)
    phase = (t / BOUNCE_S + 0.5) % 1  # starts at the top, halfway between two bounces
    height = 170 * 4 * phase * (1 - phase)
    pen.disc(160, 284, 30 - 0.1 * height, (120, 82, 52), 7 - 0.02 * height)
    squash = max(0.0, 1 - height / 20)
    rx, ry = 30 * (1 + 0.15 * squash), 30 * (1 - 0.2 * squash)
    y = 284 - height - ry
    pen.disc(160, y, rx, (240, 130, 40), ry)
    pen.disc(150, y - 0.4 * ry, 7, (255, 196, 140), 6)


def rocket(pen: Pen, t: float) -> None:
    """Lift a white rocket into a night sky full of stars, faster and faster."""
    pen.sky((8, 10, 36), (34, 38, 84))
    random = np.random.default_rng(3)
    for x, y, size in random.uniform((0, 0, 0.5), (240, 270, 1.5), (60, 3)):
        pen.disc(x, y, size, WHITE)
    pen.disc(196, 48, 20, (240, 236, 205))
    pen.disc(204, 43, 17, (12, 14, 42))
    hills(pen, 296, 4, 1, 2, (18, 34, 30))
    pen.box(90, 284, 60, 8, GREY)
    x, y = 120, 284 - 13 * t**2  # y of the tail
    flicker = 4 * sin(40 * t) + 3 * sin(67 * t)
    if t > 0.05:
        pen.shape(place([(-9, 0), (9, 0), (0, 34 + flicker)], x, y), (250, 130, 40))
        pen.shape(place([(-5, 0), (5, 0), (0, 20 + flicker)], x, y), (255, 230, 120))
    pen.shape(place([(-12, -18), (-24, 2), (-12, -2)], x, y), RED)
    pen.shape(place([(12, -18), (24, 2), (12, -2)], x, y), RED)
    pen.box(x - 12, y - 52, 24, 52, WHITE)
    pen.shape(place([(-12, -52), (-6, -66), (0, -74), (6, -66), (12, -52)], x, y), RED)
    pen.disc(x, y - 36, 7, GREY)
    pen.disc(x, y - 36, 5, (120, 200, 240))


def sunset(pen: Pen, t: float) -> None:
    """Sink the sun behind hills while the sky turns from blue to red to dark."""
    late, dark = min(1.0, t / 3), max(0.0, (t - 3) / 2)
    top = mix(mix((90, 160, 230), (96, 70, 140), late), (18, 20, 60), dark)
    bottom = mix(mix((200, 224, 240), (250, 140, 70), late), (110, 50, 70), dark)
    pen.sky(top, bottom)
    pen.disc(170, 40 + 28 * t, 20, mix((255, 236, 140), (246, 90, 50), late))
    hills(pen, 122, 14, 1.3, 4.2, mix((90, 150, 110), (34, 36, 62), t / 5))
    hills(pen, 146, 12, 1.8, 1.0, mix((66, 130, 70), (20, 26, 40), t / 5))


def pendulum(pen: Pen, t: float) -> None:
    """Swing a golden pendulum to and fro, once in two seconds, below a beam."""
    pen.sky((58, 84, 96), (40, 60, 70))
    pen.box(60, 26, 180, 14, BROWN)
    angle = 0.6 * cos(pi * t)
    x, y = place([(0, 190)], 150, 40, angle)[0]
    pen.line((150, 40), (x, y), (200, 205, 210), 3)
    pen.disc(150, 40, 5, (200, 205, 210))
    pen.disc(x, y, 24, GOLD)
    pen.disc(x - 7, y - 7, 7, (248, 220, 140))


def rain(pen: Pen, t: float) -> None:
    """Let rain fall from grey clouds on a blue house with a red roof and one lit window."""
    pen.sky((104, 112, 124), (150, 158, 166))
    pen.box(0, 190, pen.width, 50, (78, 104, 78))
    for x, y in ((40, 24), (110, 18), (180, 26), (250, 18), (310, 26)):
        cloud(pen, x, y, (78, 84, 94))
    pen.box(110, 122, 100, 76, (84, 124, 180))
    pen.shape([(98, 124), (160, 76), (222, 124)], (160, 56, 50))
    pen.box(126, 142, 26, 24, (255, 222, 120))
    pen.box(138, 142, 2, 24, BROWN)
    pen.box(170, 150, 24, 48, BROWN)
    pen.disc(160, 220, 110, (112, 130, 144), 12)
    random = np.random.default_rng(6)
    for x, start, speed in random.uniform((0, 0, 260), (340, 200, 340), (90, 3)):
        way = (start + speed * t) % 200  # falls from y = 34 to y = 234, over and over
        x, y = x - 0.1 * way, 34 + way
        pen.line((x, y), (x - 1, y + 10), (205, 220, 235), 1)


def traffic_light(pen: Pen, t: float) -> None:
    """Change a traffic light from green over yellow to red."""
    pen.sky((190, 206, 216), (226, 228, 222))
    for x, y, width in ((0, 110, 62), (50, 160, 76), (124, 130, 70), (186, 90, 60)):
        pen.box(x, y, width, pen.height - y, mix(GREY, WHITE, x / 400))
    pen.box(0, 290, pen.width, 30, (88, 90, 94))
    pen.box(114, 190, 12, 110, (60, 62, 66))
    pen.box(84, 40, 72, 170, (44, 46, 50))
    now = GREEN if t < 2 else YELLOW if t < 3 else RED
    for y, colour in ((70, RED), (125, YELLOW), (180, GREEN)):
        pen.disc(120, y, 24, BLACK)
        pen.disc(120, y, 21, colour if colour == now else mix(BLACK, colour, 0.2))


def shapes_then_bell(pen: Pen, t: float) -> None:
    """Pass a blue square and a yellow triangle by each other, then cut to a swinging bell."""
    if t < BELL_START_S:
        pen.sky((236, 238, 240), (216, 220, 226))
        pen.box(34 + 116 * t, 36, 56, 56, BLUE)
        pen.shape(place([(0, -32), (34, 28), (-34, 28)], 324 - 116 * t, 152), YELLOW)
        return
    pen.sky((80, 30, 40), (44, 18, 30))
    pen.box(112, 14, 160, 12, BROWN)
    angle = 0.35 * sin(2 * pi * (t - BELL_START_S))  # swings once a second
    side = [(9, 6), (30, 22), (38, 78), (56, 116)]
    body = [*((-x, y) for x, y in reversed(side)), *side]
    clapper = place([(0, 124)], 192, 26, 1.5 * angle)[0]
    pen.disc(*clapper, 11, BROWN)
    pen.disc(192, 28, 10, GOLD)
    pen.shape(place(body, 192, 26, angle), GOLD)
    pen.shape(place([(-60, 112), (60, 112), (60, 122), (-60, 122)], 192, 26, angle), (180, 130, 34))


def boat(pen: Pen, t: float) -> None:
    """Show a red boat with a white sail on a blue sea, the sun above it."""
    pen.sky((120, 190, 240), (220, 238, 248))
    pen.disc(62, 56, 24, YELLOW)
    cloud(pen, 270, 62)
    pen.box(0, 200, pen.width, 100, (40, 110, 180))
    pen.box(176, 78, 5, 130, BROWN)
    pen.shape([(184, 82), (184, 188), (262, 188)], WHITE)
    pen.shape([(173, 96), (173, 188), (122, 188)], (225, 228, 230))
    pen.shape([(104, 204), (276, 204), (244, 240), (130, 240)], RED)
    hills(pen, 238, 4, 7, 0, (30, 92, 160))
    hills(pen, 266, 4, 5, 2, (24, 78, 142))


def engine(t: Wave) -> Wave:
    """Hum like a small engine."""
    tone = sum(np.sin(2 * pi * 70 * n * t + n) / n for n in (1, 2, 3, 4, 6))
    return 0.2 * tone * (1 + 0.3 * np.sin(2 * pi * 14 * t))


def strikes(t: Wave, starts: Iterable[float], pitches: Iterable[float], fade_s: float) -> Wave:
    """Add up struck tones; each begins at full strength and fades to 1/e in `fade_s`."""
    wave = np.zeros_like(t)
    for start in starts:
        since = np.maximum(t - start, 0)
        for pitch in pitches:
            wave += np.sin(2 * pi * pitch * since) * np.exp(-since / fade_s)
    return wave


def thuds(t: Wave) -> Wave:
    """Thud whenever the ball meets the floor."""
    return 0.4 * strikes(t, np.arange(0.5, 5) * BOUNCE_S, (90, 140), 0.06)


def bell(t: Wave) -> Wave:
    """Ring the bell at each end of its swing; silence before the cut."""
    # the partials of a church bell: hum, prime, minor third, fifth, octave
    partials = tuple(440 * ratio for ratio in (0.5, 1, 1.2, 1.5, 2))
    starts = BELL_START_S + np.arange(0.25, 2.5, 0.5)
    return 0.07 * strikes(t, starts, partials, 0.7)


def noise(t: Wave, smooth: int) -> Wave:
    """Hiss; the more samples are averaged, the lower it sounds."""
    white = np.random.default_rng(smooth).standard_normal(len(t) + smooth - 1)
    return np.convolve(white, np.ones(smooth) / smooth**0.5, "valid")


@dataclass(frozen=True)
class Clip:
    """One file of this folder."""

    name: str
    width: int  # pixels, even: the colours are stored at half size
    height: int  # pixels, even
    fps: Fraction
    duration_s: float
    scene: Callable[[Pen, float], None]
    sound: Callable[[Wave], Wave] | None = None

    @property
    def num_frames(self) -> int:
        """Frames whose time lies before the end."""
        return ceil(self.duration_s * self.fps)

    def frame(self, idx: int) -> NDArray[np.uint8]:
        """Draw one frame, (height, width, 3) RGB."""
        pen = Pen(self.width, self.height)
        self.scene(pen, float(idx / self.fps))
        return pen.picture()


CLIPS = (
    Clip("01.mp4", 320, 240, Fraction(25), 4, car, engine),
    Clip("02.mp4", 320, 320, Fraction(24), 4, ball, thuds),
    Clip("03.mp4", 240, 320, Fraction(30), 4, rocket, lambda t: 0.2 * noise(t, 60)),
    Clip("04.mp4", 320, 180, Fraction(25), 5, sunset),
    Clip("05.mp4", 300, 300, Fraction(24), 4, pendulum),
    Clip("06.mp4", 320, 240, Fraction(15), 3, rain, lambda t: 0.06 * noise(t, 3)),
    Clip("07.mp4", 240, 320, Fraction(30_000, 1001), 4.5, traffic_light),
    Clip("08.mp4", 384, 216, Fraction(30), 4.5, shapes_then_bell, bell),
)
STILL = Clip("09.png", 360, 300, Fraction(1), 1, boat)


def encode(clip: Clip, path: Path) -> None:
    """Write a clip as H.264 and, where it has a sound, AAC."""
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(str(path), "w", options=options) as container:
        video = container.add_stream("libx264", clip.fps, options={"crf": "28"})
        video.width, video.height, video.pix_fmt = clip.width, clip.height, "yuv420p"
        video.thread_count = 1  # the bytes would depend on the number of threads
        if clip.sound:
            # before the first packet of either stream: that one writes the header of both
            audio = container.add_stream("aac", SAMPLE_RATE, layout="mono", bit_rate=48_000)
        for idx in range(clip.num_frames):
            container.mux(video.encode(av.VideoFrame.from_ndarray(clip.frame(idx))))
        container.mux(video.encode(None))
        if clip.sound:
            wave = clip.sound(np.arange(round(clip.duration_s * SAMPLE_RATE)) / SAMPLE_RATE)
            samples = np.clip(wave, -1, 1).astype(np.float32)[None]  # (1 channel, num_samples)
            sound = av.AudioFrame.from_ndarray(samples, "fltp", "mono")
            sound.sample_rate = SAMPLE_RATE
            container.mux(audio.encode(sound))
            container.mux(audio.encode(None))


def make_examples(folder: Path) -> None:
    """Draw all files anew into `folder`."""
    for clip in CLIPS:
        encode(clip, folder / clip.name)
    Image.fromarray(STILL.frame(0)).save(folder / STILL.name, optimize=True)


if __name__ == "__main__":
    make_examples(Path(__file__).parent)
