"""formats.video: the frames that were written come back, at the times asked for; anything else is named."""

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stereovla.dataset_builder.formats.video import VideoError, VideoWriter, frame_times, read_all_frames, read_frames

FPS, LENGTH = 10, 24


def frame(number: int) -> np.ndarray:
    """Flat grey that says which frame it is, through any codec."""
    return np.full((32, 48, 3), 10 * number, np.uint8)


@pytest.fixture(scope="module", params=["libx264", "libsvtav1"])
def video(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "file.mp4"
    with VideoWriter(path, FPS, (48, 32), request.param, 18) as writer:
        for number in range(LENGTH):
            writer.write(frame(number))
    return path


def numbers(images) -> list[int]:
    return [int(round(image.mean() / 10)) for image in images]


def test_another_program_sees_rate_size_and_times(video):
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate, stream.width, stream.height) == (LENGTH, FPS, 48, 32)
        frames = list(container.decode(stream))
        assert stream.codec_context.name in ("h264", "libdav1d", "av1")
    assert [float(item.pts * item.time_base) for item in frames] == pytest.approx(np.arange(LENGTH) / FPS)
    assert numbers(item.to_ndarray(format="rgb24") for item in frames) == list(range(LENGTH))
    assert sum(item.key_frame for item in frames) >= LENGTH // 2


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, LENGTH - 1).flatmap(lambda a: st.tuples(st.just(a), st.integers(a + 1, LENGTH))))
def test_any_part_of_a_video_is_read_exactly(video, part):
    times = np.arange(*part) / FPS + 0.002  # LeRobot adds up durations: times need not be exact
    assert numbers(read_frames(video, times, FPS)) == list(range(*part))


def test_everything_is_read_in_order(video):
    assert numbers(read_all_frames(video)) == list(range(LENGTH))


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([2.2, 2.3, 2.4], "frame 2: file.mp4 ends after 2 of 3 frames"),
        ([0.5, 0.55], "frame 1: file.mp4 has no picture at 0.5500 s"),
        ([0.5, 0.7], "frame 1: file.mp4 has a picture too many at 0.6000 s"),
    ],
)
def test_missing_and_surplus_frames_are_named(video, times, message):
    with pytest.raises(VideoError, match=message):
        list(read_frames(video, times, FPS))


def test_times_of_all_frames_are_known_without_decoding(video):
    np.testing.assert_allclose(frame_times(video), np.arange(LENGTH) / FPS, atol=1e-6)


@pytest.mark.parametrize("times", [[0.5, float("nan")], [float("inf"), 0.5]])
def test_times_that_are_no_times_give_no_picture(video, times):
    with pytest.raises(VideoError, match="is asked for a picture at (nan|inf) s"):
        list(read_frames(video, times, FPS))


def test_what_a_damaged_file_gives_does_not_depend_on_the_processor(video, tmp_path):
    """Decoders with several threads lose frames before the damage; every whole frame before it must come."""
    with av.open(str(video)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(container.streams.video[0]) if packet.size]
    whole, (position, size) = bytearray(video.read_bytes()), packets[15]
    whole[position : position + size] = bytes(size)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(whole)
    found: list[int] = []
    with pytest.raises(VideoError, match=r"frame \d+: damaged.mp4"):
        for image in read_all_frames(damaged):
            found += numbers([image])
    assert found[:14] == list(range(14))  # packet 15 of H.264 may be shown as frame 14
    found.clear()
    with pytest.raises(VideoError, match="frame 1[45]: damaged.mp4"):
        for image in read_frames(damaged, np.arange(LENGTH) / FPS, FPS):
            found += numbers([image])
    assert 14 <= len(found) and found == list(range(len(found)))


def test_damaged_files_and_odd_sizes_are_named(video, tmp_path):
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(video.read_bytes()[:-400])
    with pytest.raises(VideoError, match="cut.mp4"):
        list(read_frames(cut, np.arange(LENGTH) / FPS, FPS))
    with pytest.raises(VideoError, match="gone.mp4 cannot be read"):
        list(read_frames(tmp_path / "gone.mp4", [0.0], FPS))
    with pytest.raises(ValueError, match="31x32 px cannot be stored"):
        VideoWriter(tmp_path / "odd.mp4", FPS, (31, 32), "libx264", 18)
