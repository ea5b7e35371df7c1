"""Videos: the frames and times that transformers chooses, from every container; damaged and hostile files are one clear line."""

import io
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
from transformers.video_utils import VideoMetadata, default_sample_indices_fn, read_video_pyav

from mlx_diffgemma.errors import InputError
from mlx_diffgemma.steps import run
from mlx_diffgemma.vision import video as ours
from mlx_diffgemma.vision.film import Film
from mlx_diffgemma.vision.pictures import read_picture
from mlx_diffgemma.vision.video import read_video, read_video_steps
from support.image_files import VISION, noise, saved
from support.video_files import number_of, numbered, sound, turned, video

QUICK = {"g": "25", "deadline": "realtime", "cpu-used": "8", "threads": "1"}
#: Every container, with keyframes every 25 frames where the codec has others.
CONTAINERS: dict[str, Callable[[], bytes]] = {
    "mp4": lambda: video(300, g="25"),
    "mp4 hevc": lambda: video(300, codec="libx265", **{"x265-params": "log-level=none:keyint=25"}),
    "mov": lambda: video(300, "mov", g="25"),
    "mkv": lambda: video(300, "matroska", g="25"),
    "webm vp9": lambda: video(300, "webm", "libvpx-vp9", **QUICK),
    "webm vp8": lambda: video(300, "webm", "libvpx", **QUICK),
    "avi": lambda: video(300, "avi", "mpeg4"),
    "mpegts": lambda: video(300, "mpegts", g="25"),
    "gif": lambda: video(300, "gif", "gif", pixels="rgb8", rate=25),
}


def numbers(film: Film) -> list[int]:
    return [number_of(patches) for patches in film.images]


def times(film: Film) -> list[float]:
    return [seconds for seconds, _ in film.frames]


def expected(total: int, **sampling: Any) -> list[int]:
    """The indices that transformers chooses at 30 frames per second."""
    return default_sample_indices_fn(VideoMetadata(total_num_frames=total, fps=30.0), **sampling).tolist()


@pytest.mark.parametrize(("rate", "count"), [(30, 300), (Fraction(30000, 1001), 400), (24, 2000), (10, 33)])
def test_frames_times_and_markup_are_those_of_transformers(tmp_path: Path, rate: Fraction | int, count: int) -> None:
    file = tmp_path / "a.mp4"
    file.write_bytes(video(count, rate=rate, g="40"))
    frames, metadata = read_video_pyav(str(file), lambda metadata, **_: default_sample_indices_fn(metadata, num_frames=32))
    film = read_video(file, VISION)
    assert times(film) == pytest.approx(metadata.timestamps, abs=1e-9)
    assert [patches.digest for patches in film.images] == [read_picture(frame, VISION, 70).digest for frame in frames]
    markers = SimpleNamespace(boi_token="<|image>", eoi_token="<image|>", video_token="<|video|>")
    made = {"num_soft_tokens_per_video": [film.images[0].soft_tokens], "video_metadata": [metadata]}
    assert film.markup == Gemma4Processor.replace_video_token(markers, made, 0)
    assert film.markup.startswith("00:00 <|image><|video|><|video|>")


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_give_the_same_frames(name: str) -> None:
    film = read_video(CONTAINERS[name](), VISION)
    assert numbers(film) == expected(300, num_frames=32)
    rate = 25 if name == "gif" else 30
    assert times(film) == pytest.approx([index / rate for index in expected(300, num_frames=32)], abs=1e-6)
    assert all(patches.soft_tokens <= 70 for patches in film.images)


def test_frames_and_fps() -> None:
    content = video(300)
    assert numbers(read_video(content, VISION, frames=7)) == expected(300, num_frames=7)
    assert numbers(read_video(content, VISION, fps=2)) == expected(300, fps=2)
    assert len(read_video(content, VISION, fps=0.001).frames) == 1
    assert numbers(read_video(content, VISION, fps=100)) == list(range(300))
    assert read_video(content, VISION, frames=1, budget=280).images[0].soft_tokens > 70


@pytest.mark.parametrize("count", [1, 2, 31])
def test_short_videos_have_the_frames_that_they_have(count: int) -> None:
    assert numbers(read_video(video(count), VISION)) == list(range(count))


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_irregular_videos_have_the_times_of_the_file(container: str) -> None:
    moments = [0, 40, 80, 120, 5000, 5040, 9000, 20_000, 20_040, 61_000]
    film = read_video(video(10, container, rate=25, times=moments), VISION)
    assert numbers(film) == list(range(10))
    assert times(film) == pytest.approx([moment / 1000 for moment in moments], abs=2e-3)
    assert film.markup.split()[-2:][0] == "01:01"


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_videos_are_turned_upright(degrees: int) -> None:
    content = video(3)
    with av.open(io.BytesIO(content)) as opened:
        first = next(opened.decode(video=0)).to_ndarray(format="rgb24")
    wanted = read_picture(np.rot90(first, -degrees // 90), VISION, 70)
    assert read_video(turned(content, degrees), VISION).images[0].digest == wanted.digest


def test_a_list_of_images_is_a_video(tmp_path: Path) -> None:
    frames = [numbered(number) for number in range(50)]
    film = read_video(frames, VISION)
    assert numbers(film) == default_sample_indices_fn(VideoMetadata(total_num_frames=50), num_frames=32).tolist()
    assert times(film)[:4] == pytest.approx([index / 24 for index in numbers(film)[:4]])
    film = read_video(np.stack(frames), VISION, fps=5)
    assert numbers(film) == list(range(50))
    assert times(film)[-1] == pytest.approx(49 / 5)
    (tmp_path / "a.png").write_bytes(saved(frames[3], "PNG"))
    assert numbers(read_video((Image.fromarray(frames[2]), tmp_path / "a.png"), VISION)) == [2, 3]


def test_sources_give_the_same_film(tmp_path: Path) -> None:
    content = video(10)
    file = tmp_path / "a.png"  # the content counts, not the name
    file.write_bytes(content)
    films = [read_video(source, VISION) for source in (content, bytearray(content), memoryview(content), file, str(file))]
    assert len({tuple(patches.digest for patches in film.images) for film in films}) == 1


# ---- Cost


def test_a_long_video_is_decoded_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the keyframe before each frame. If there is only one keyframe, all is decoded."""
    monkeypatch.setattr(ours, "_STEP_PIXELS", 1)
    monkeypatch.setattr(ours, "MAX_DECODED", 32 * 27 * 64 * 96)
    options = {"preset": "ultrafast", "sc_threshold": "0"}
    for container in ("mp4", "matroska"):
        film = read_video(video(3200, container, g="25", **options), VISION)
        assert numbers(film) == expected(3200, num_frames=32)
    with pytest.raises(InputError, match="the video: takes too long to decode; make it shorter or smaller, or give it more key"):
        read_video(video(3200, g="10000", **options), VISION)


def test_reading_takes_steps() -> None:
    content = video(300)
    films: list[Film] = []

    def reading() -> Iterator[None]:
        films.append((yield from read_video_steps(content, VISION)))

    assert len(list(reading())) >= 32
    assert numbers(films[0]) == expected(300, num_frames=32)
    read_video_steps(content, VISION).close()  # nothing was opened


def test_too_many_soft_tokens_are_known_before_frames_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    content = video(300)
    tokens = sum(patches.soft_tokens for patches in read_video(content, VISION).images)
    run(read_video_steps(content, VISION, max_soft_tokens=tokens))
    monkeypatch.setattr(ours, "_decoded", None)
    wanted = f"the video: its frames have {tokens:,} soft tokens, but only {tokens - 1:,} fit; use fewer frames"
    with pytest.raises(InputError, match=wanted):
        run(read_video_steps(content, VISION, max_soft_tokens=tokens - 1))
    with pytest.raises(InputError, match=r"soft tokens, but only 100 fit"):
        run(read_video_steps([noise(50, 50)] * 5, VISION, max_soft_tokens=100))


# ---- What is no video

OTHERS = {
    "a list of addresses": b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    "a list of files": b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    "a session": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    "an image": saved(noise(9, 9), "PNG"),
    "an audio file": b"ID3\3" + bytes(2000),
    "a text": b"Hi there",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_no_videos(name: str) -> None:
    with pytest.raises(InputError, match="the video: not a video that can be read; use an MP4, MOV, WebM, MKV, AVI"):
        read_video(OTHERS[name], VISION)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (b"", {}, "the video: empty; use an MP4"),
        ([], {}, "the video has no frames"),
        (None, {}, "a video must be a path, bytes or a list of images, got an object of type NoneType"),
        (noise(9, 9), {}, "got an object of type ndarray"),
        ("nowhere.mp4", {}, r"nowhere\.mp4: there is no such file"),
        ("/dev/zero", {}, "/dev/zero: not a file; give the path of a video"),
        (["nowhere.png"], {}, r"nowhere\.png: there is no such file"),
        (b"", {"frames": 0}, "frames must be an integer from 1 to 1024, got 0"),
        (b"", {"frames": 1025}, "frames must be an integer from 1 to 1024"),
        (b"", {"fps": 0}, "fps must be a number from 0.001 to 1000, got 0"),
        ([noise(9, 9)], {"budget": 71}, "the budget of an image must be one of 70, 140"),
        ([noise(9, 9)] * 2000, {"fps": 25}, "the video: fps 25 makes 2,000 frames, but at most 1,024 fit; use a smaller fps"),
    ],
)
def test_other_sources_are_refused(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_video(source, VISION, **options)


def test_a_video_without_pictures_is_refused() -> None:
    with pytest.raises(InputError, match="the video: has no video in it"):
        read_video(sound(), VISION)


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("MAX_FRAME_PIXELS", 6143, "its frames have 96 x 64 pixels, more than 6,143; make it smaller"),
        ("MAX_FRAMES", 99, "has more than 99 frames; cut it"),
        ("MAX_BYTES", 1000, r"has [\d,]+ bytes, but a video may have 1,000; make it smaller"),
    ],
)
def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, message: str) -> None:
    file = tmp_path / "a.mp4"
    file.write_bytes(video(100))
    monkeypatch.setattr(ours, limit, value)
    with pytest.raises(InputError, match=rf"a\.mp4: {message}"):
        read_video(file, VISION)
    with pytest.raises(InputError, match=rf"the video: {message}"):
        read_video(file.read_bytes(), VISION)


def test_video_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    content = video(2)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match="the video: video needs another package; run: pip install av"):
        read_video(content, VISION)


@pytest.mark.parametrize("name", CONTAINERS)
def test_damaged_videos_are_refused_or_read(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """No other error, nothing printed, and not slow."""
    content, rng = CONTAINERS[name](), np.random.default_rng(0)
    capfd.readouterr()
    start = time.perf_counter()
    for round_ in range(10):
        damaged = bytearray(content[: int(len(content) * rng.uniform(0.05, 1))] if round_ < 4 else content)
        for _ in range(0 if round_ < 4 else 12):
            damaged[int(rng.integers(0, len(damaged) if rng.random() < 0.7 else 600))] = rng.integers(0, 256)
        said = problem_of(bytes(damaged))
        assert said is None or (said.startswith("the video: ") and len(said) < 200)
        if name in ("mp4", "mov", "mp4 hevc") and round_ < 4:
            assert said == "the video: is damaged or cut short; save it or send it again"
    assert time.perf_counter() - start < 20
    assert capfd.readouterr() == ("", "")


def problem_of(content: bytes) -> str | None:
    """What is wrong with a video; None if it is read."""
    try:
        assert 1 <= len(read_video(content, VISION).frames) <= 32
    except InputError as refused:
        return str(refused)
    return None
