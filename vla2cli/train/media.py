"""What is seen and heard of one file, as the towers take it, read by the decoders that answer use.

Source: upstream VideoLLaMA2@c0bb03a, train.py; for sound its branch audio_visual at 8cedfbd. A file
that cannot be read is reported, where upstream takes another one in silence.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vla2_models.sound import SoundWindow
from vla2cli.errors import InputError
from vla2cli.media.pool import Clip, ClipRequest, DecodePool
from vla2cli.media.records import SoundRequest
from vla2cli.preprocess import FrameGeometry, fbank, normalise


# two of them are never compared by value; the network encodes one that several rows share once
@dataclass(frozen=True, eq=False)
class Media:
    """The input of the towers for one placeholder; nothing for a text."""

    pixel_values: Tensor | None = None  # (T, 3, S, S) float32; T is 1 for an image
    fbank: Tensor | None = None  # (1, R, 128) bfloat16
    is_image: bool = False  # its one frame stands for all the frames of a video


@dataclass(frozen=True)
class MediaFile:
    """A file of the training data."""

    path: str
    medium: str  # video, image or audio


@dataclass
class MediaReader:
    """Reads files in processes that can be killed; a copy in another process has its own."""

    geometry: FrameGeometry  # of the tower; `is_padded` for the reference's fine-tuning
    num_frames: int
    window: SoundWindow | None = None  # which sound the model hears; None: it has no ears
    hears_videos: bool = False  # a video's sound is read too; one without sound is silent
    decoder: str = "pyav"
    num_workers: int = 1
    timeout_s: float = 60.0
    _pool: DecodePool | None = field(default=None, init=False, repr=False)
    _pool_pid: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse to listen without ears."""
        if self.hears_videos and self.window is None:
            raise ValueError("the sound of videos is wanted of a model without an audio branch")

    def read(self, files: Sequence[MediaFile]) -> list[Media | InputError]:
        """Read several files at a time: each one's media, or why there are none."""
        futures = [self._submit(file) for file in files]
        return [self._result(future) for future in futures]

    def close(self) -> None:
        """End the processes; the next file starts new ones."""
        if self._pool is not None and self._pool_pid == os.getpid():
            self._pool.close()
        self._pool = None

    def __getstate__(self) -> dict[str, object]:
        """Leave the processes behind: they belong to the one that started them."""
        return {**self.__dict__, "_pool": None, "_pool_pid": 0}

    def _submit(self, file: MediaFile) -> Future[Clip] | InputError:
        if file.medium == "audio" and self.window is None:
            return InputError(
                "the model has no audio branch", kind="unsupported", stage="preprocess"
            )
        hears = file.medium == "audio" or (file.medium == "video" and self.hears_videos)
        request = ClipRequest(
            file.path,
            file.medium,
            geometry=None if file.medium == "audio" else self.geometry,
            num_frames=self.num_frames,
            decoder=self.decoder,
            # silence is a sound like any other: joint training needs its tokens
            sound=SoundRequest(self.window, is_required=True) if self.window and hears else None,
        )
        return self._own_pool().submit(request)

    def _result(self, submitted: Future[Clip] | InputError) -> Media | InputError:
        try:
            return submitted if isinstance(submitted, InputError) else self._media(submitted)
        except InputError as error:
            return error

    def _media(self, submitted: Future[Clip]) -> Media:
        clip = submitted.result()
        seen, heard = clip.frames, clip.sound.waveform if clip.sound else None
        return Media(
            pixel_values=None if seen is None else torch.from_numpy(normalise(seen, self.geometry)),
            fbank=None if heard is None else fbank(heard)[None],
            is_image=clip.kind == "image",
        )

    def _own_pool(self) -> DecodePool:
        # a data loader forks: threads and processes of the parent are not the child's
        if self._pool is None or self._pool_pid != os.getpid():
            self._pool = DecodePool(self.num_workers, timeout_s=self.timeout_s)
            self._pool_pid = os.getpid()
        return self._pool
