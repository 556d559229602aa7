"""Frames out of and into video files, by PyAV."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from stereovla.extras import extra

with extra("data"):
    import av
import numpy as np

from stereovla.untrusted import MOST_PIXELS, check_pixels

# Frames this far (in frame durations) from the time asked for are that frame: containers round times to their time
# base, and LeRobot adds up durations.
_SLACK = 0.25


class VideoError(RuntimeError):
    """A video that does not hold what is asked of it; the message says what, and at which frame."""


def _open(path: Path) -> "av.container.InputContainer":
    """A video, as mp4 whatever its bytes look like: FFmpeg's playlists may name any file and address. VideoError for
    pictures that are too large, also those that begin in the middle.
    """
    container = av.open(str(path), format="mp4")
    for stream in container.streams.video:
        stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
        try:
            check_pixels(stream.width, stream.height, path.name)
        except ValueError as error:
            container.close()
            raise VideoError(str(error)) from error
    return container


def frame_times(path: Path) -> np.ndarray:
    """Times (n,) s of all frames of a video from its start, rising; nothing is decoded."""
    try:
        with _open(path) as container:
            stream = container.streams.video[0]
            stamps = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
            start = stream.start_time or 0
    except (av.error.FFmpegError, IndexError, OSError) as error:
        raise VideoError(f"{path.name} cannot be read: {error}") from error
    if None in stamps:
        raise VideoError(f"frame {stamps.index(None)}: {path.name} does not say when it is shown")
    return np.array([float((stamp - start) * stream.time_base) for stamp in sorted(stamps)])


def first_beside(found_s: np.ndarray, wanted_s: np.ndarray, fps: float) -> int | None:
    """The first of equally many frames that lie at `found_s` and not where they are wanted; None = all do."""
    beside = np.flatnonzero(~(np.abs(found_s - wanted_s) <= _SLACK / fps))  # NaN is beside
    return int(beside[0]) if len(beside) else None


def read_frames(path: Path, times_s: Sequence[float], fps: float) -> Iterator[np.ndarray]:
    """Decode the frames at `times_s` (rising, from the video's start), uint8 (h, w, 3) RGB each.

    VideoError names the first frame that is missing, damaged, or too many: between the first and the last time there
    must be exactly `len(times_s)` frames.
    """
    slack, number = _SLACK / fps, 0
    if len(bad := np.flatnonzero(~np.isfinite(times_s))):
        raise VideoError(f"frame {bad[0]}: {path.name} is asked for a picture at {times_s[bad[0]]} s")
    try:
        with _open(path) as container:
            stream = _single_threaded(container)
            start = stream.start_time or 0
            if times_s[0] > 1 / fps:  # the container seeks to the key frame before
                container.seek(start + int((times_s[0] - slack) / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.pts is None:
                    raise VideoError(f"frame {number}: {path.name} does not say when it is shown")
                time = float((frame.pts - start) * stream.time_base)
                if time < times_s[0] - slack:
                    continue
                if number == len(times_s):
                    return
                if time > times_s[number] + slack:
                    raise VideoError(f"frame {number}: {path.name} has no picture at {times_s[number]:.4f} s")
                if time < times_s[number] - slack:
                    raise VideoError(f"frame {number}: {path.name} has a picture too many at {time:.4f} s")
                _check_whole(frame, number, path)
                yield frame.to_ndarray(format="rgb24")
                number += 1
    except (av.error.FFmpegError, IndexError, OSError) as error:
        raise VideoError(f"frame {number}: {path.name} cannot be read: {error}") from error
    if number < len(times_s):
        raise VideoError(f"frame {number}: {path.name} ends after {number} of {len(times_s)} frames")


def read_all_frames(path: Path) -> Iterator[np.ndarray]:
    """Decode every frame in order, uint8 (h, w, 3) RGB each; VideoError where the file is damaged."""
    number, count = 0, len(frame_times(path))
    try:
        with _open(path) as container:
            for frame in container.decode(_single_threaded(container)):
                _check_whole(frame, number, path)
                yield frame.to_ndarray(format="rgb24")
                number += 1
    except (av.error.FFmpegError, IndexError, OSError) as error:
        raise VideoError(f"frame {number}: {path.name} cannot be read: {error}") from error
    if number != count:
        raise VideoError(f"frame {number}: {path.name} has {count} frames, {number} of them can be decoded")


def _single_threaded(container: Any) -> Any:
    """The video of an open file. Several threads lose frames before a damaged one, as many as there are threads: a file
    would be judged differently on another processor.
    """
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    return stream


def _check_whole(frame: Any, number: int, path: Path) -> None:
    if frame.is_corrupt:  # decoders fill what is damaged with what lies around it
        raise VideoError(f"frame {number}: {path.name} is damaged there")


class VideoWriter:
    """Encodes RGB frames into one mp4, as a context manager; `path` is whole only after it.

    Args:
        codec: "libx264" (H.264) or "libsvtav1" (AV1).
        quality: constant rate factor, lower = better; 18 of H.264 is hard to tell from the original.
    """

    KEY_FRAMES = 2  # every second frame is a key frame, as LeRobot does it: training reads at random places

    def __init__(self, path: Path, fps: float, size_px: tuple[int, int], codec: str, quality: int):
        width, height = size_px
        if width % 2 or height % 2:
            raise ValueError(f"views of {width}x{height} px cannot be stored as video: width and height must be even")
        self.frames = 0
        self._container = av.open(str(path), "w", options={"movflags": "faststart"})
        rate = Fraction(fps).limit_denominator(1000)
        options = {"crf": str(quality), "g": str(self.KEY_FRAMES)}
        if codec == "libsvtav1":
            options |= {"preset": "8", "svtav1-params": "lp=1"}
        self._stream = self._container.add_stream(codec, rate=rate, options=options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._stream.time_base = 1 / rate

    def __enter__(self) -> "VideoWriter":
        return self

    def write(self, image: np.ndarray) -> None:
        """Append one frame, uint8 (h, w, 3) RGB."""
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts = self.frames
        self._container.mux(self._stream.encode(frame))
        self.frames += 1

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is None:
            self._container.mux(self._stream.encode())
        self._container.close()
