"""Messages with images and videos: every form of a part, what is refused, and how much is read."""

import base64
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from mlx_diffgemma.errors import InputError
from mlx_diffgemma.vision.film import Film, Picture
from mlx_diffgemma.vision.media import split_media, split_media_steps
from mlx_diffgemma.vision.pictures import read_picture
from mlx_diffgemma.vision.sources import Image, Video
from mlx_diffgemma.vision.video import read_video
from support.alone import run_alone
from support.image_files import BOMBS, VISION, noise, saved
from support.video_files import numbered, video


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


PIXELS = noise(61, 93)
PNG = saved(PIXELS, "PNG")
BASE64 = in_base64(PNG)
URL = f"data:image/png;base64,{BASE64}"
MP4 = video(40)
MP4_URL = f"data:video/mp4;base64,{in_base64(MP4)}"


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def tokens(part: dict[str, Any], **options: Any) -> int:
    """The soft tokens of the one image of a part."""
    _, [media] = split_media([user(part)], VISION, **options)
    return media.images[0].soft_tokens


def fetch(url: str) -> bytes:
    return {"https://example.com/a.png": PNG, "http://example.com/a.mp4": MP4}[url]


# ---- Forms of parts


@pytest.mark.parametrize(
    "part",
    [
        *({"type": "image", "image": source} for source in (PNG, PIXELS, Pillow.fromarray(PIXELS), URL, Image(URL), Image(PNG))),
        *(
            {"type": "image", name: source}
            for name, source in (("url", URL), ("data", PNG), ("data", BASE64), ("base64", BASE64))
        ),
        {"type": "image", "data": URL},
        {"type": "image", "image": "https://example.com/a.png"},
        {"type": "image", "image": {"url": URL}},
        {"type": "image_url", "image_url": {"url": URL, "detail": "auto"}},
        {"type": "image_url", "image_url": URL},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        {"type": "input_image", "image_url": URL, "detail": "auto", "file_id": None},
        {"type": "image", "image": Picture(read_picture(PNG, VISION))},
        {"type": "image", "image": URL.replace("image/png", "IMAGE/svg+xml;charset=utf-8").replace("data:", "DATA:")},
        {"type": "image", "image": URL.replace("image/png", "video/mp4")},
    ],
)
def test_forms_of_images(part: dict[str, Any]) -> None:
    messages = [{"role": "system", "content": "Hi"}, user({"type": "text", "text": "What?"}, part)]
    split, [picture] = split_media(messages, VISION, fetch=fetch)
    assert split == [messages[0], user({"type": "text", "text": "What?"}, {"type": "image"})]
    assert isinstance(picture, Picture)
    assert picture.images[0].digest == read_picture(PNG, VISION).digest
    assert picture.markup == "<|image>" + "<|image|>" * picture.images[0].soft_tokens + "<image|>"


@pytest.mark.parametrize(
    "part",
    [
        *({"type": "video", "video": source} for source in (MP4, MP4_URL, Video(MP4), "http://example.com/a.mp4")),
        {"type": "video", "url": MP4_URL},
        {"type": "video", "base64": in_base64(MP4)},
        {"type": "video_url", "video_url": {"url": MP4_URL}},
        {"type": "video_url", "video_url": "http://example.com/a.mp4"},
        {"type": "video", "video": read_video(MP4, VISION)},
    ],
)
def test_forms_of_videos(part: dict[str, Any]) -> None:
    split, [film] = split_media([user(part)], VISION, fetch=fetch)
    assert split == [user({"type": "video"})]
    assert isinstance(film, Film)
    wanted = read_video(MP4, VISION)
    assert film.markup == wanted.markup
    assert [patches.digest for patches in film.images] == [patches.digest for patches in wanted.images]


def test_paths(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "a.mp4").write_bytes(MP4)
    picture, film = tmp_path / "a.png", tmp_path / "a.mp4"
    parts = [
        {"type": "image", "image": str(picture)},
        {"type": "image", "path": str(picture)},
        {"type": "image", "image": picture},
    ]
    films = [{"type": "video", "path": str(film)}, {"type": "video", "video": film}, {"type": "video", "video": [str(picture)]}]
    split, media = split_media([user(*parts), user(*films)], VISION)
    assert split == [user(*[{"type": "image"}] * 3), user(*[{"type": "video"}] * 3)]
    assert [len(each.images) for each in media] == [1, 1, 1, 32, 32, 1]
    for part in (*parts, *films, {"type": "image", "image": Image(picture)}):
        with pytest.raises(
            InputError, match=r"^messages\[0\]: paths are not allowed here; send the content as a data URL instead"
        ):
            split_media([user(part)], VISION, allow_paths=False)


def test_media_keep_their_order() -> None:
    frames = [numbered(number) for number in range(3)]
    messages = [
        user(
            {"type": "image", "image": noise(48, 48, seed=1)}, {"type": "text", "text": "and"}, {"type": "video", "video": frames}
        ),
        {"role": "assistant", "content": "Yes."},
        user({"type": "image", "image": noise(48, 48, seed=2)}),
    ]
    split, media = split_media(messages, VISION)
    wanted = [read_picture(noise(48, 48, seed=seed), VISION).digest for seed in (1, 2)]
    assert [type(each) for each in media] == [Picture, Film, Picture]
    assert [media[0].images[0].digest, media[2].images[0].digest] == wanted
    assert [part["type"] for part in split[0]["content"]] == ["image", "text", "video"]
    assert messages[0]["content"][0].keys() == {"type", "image"}  # what the caller gave is unchanged


def test_whatever_is_no_media_is_left_as_it_is() -> None:
    messages = [
        {"role": "user", "content": "Hi", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "user", "content": [{"type": "text", "text": "a", "cache": True}, {"type": "other"}, "text", {"type": 5}, 7]},
        {"role": "tool"},
        "no message",
    ]
    assert split_media(messages, VISION) == (messages, [])
    assert split_media(messages, None) == (messages, [])


def test_detail_and_budgets() -> None:
    url = f"data:image/png;base64,{in_base64(saved(noise(500, 500), 'PNG'))}"
    part = {"type": "image_url", "image_url": {"url": url}}

    def with_detail(detail: str) -> dict[str, Any]:
        return {**part, "image_url": {"url": url, "detail": detail}}

    counts = {"low": 64, "auto": 256, "high": 1089}
    assert {detail: tokens(with_detail(detail)) for detail in counts} == counts
    assert tokens(part, budget=560) == tokens(with_detail("auto"), budget=560) == 529
    assert tokens(with_detail("low"), budget=560) == 64
    assert tokens({"type": "input_image", "image_url": url, "detail": "low"}) == 64
    assert tokens({"type": "image", "image": Image(noise(500, 500), 140)}, budget=560) == 121
    assert tokens({"type": "image", "image": Image(noise(500, 500))}, budget=560) == 529


def test_frames_and_fps() -> None:
    def count(part: dict[str, Any], **options: Any) -> int:
        _, [film] = split_media([user({"type": "video", **part})], VISION, **options)
        return len(film.images)

    assert count({"video": MP4}, frames=3) == 3
    assert count({"video": MP4}, fps=6) == 8
    assert count({"video": MP4, "frames": 4}, fps=6) == 4
    assert count({"video": MP4, "fps": 3}, frames=30) == 4
    assert count({"video": Video(MP4, frames=2)}, frames=30) == 2
    assert count({"type": "video_url", "video_url": {"url": MP4_URL, "frames": 5}}) == 5


# ---- What is refused


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image"}, r'messages\[1\]: the part with an image has no source; use {"type": "image", "image": ...}'),
        ({"type": "image", "image": None}, r"messages\[1\]: the part with an image has no source"),
        ({"type": "video"}, r"messages\[1\]: the part with a video has no source"),
        ({"type": "image", "image": PNG, "url": URL}, r"messages\[1\]: .* more than one source \(image, url\)"),
        ({"type": "image_url", "image_url": {}}, r"must be a data, http or https URL, got None"),
        ({"type": "image_url", "image_url": "no.png"}, r"no\.png: there is no such file"),
        ({"type": "image", "image": "https://example.com/a.png"}, "addresses are not fetched; send the content as a data URL"),
        ({"type": "image", "image": "file:///etc/passwd"}, "only data, http and https URLs are supported, got 'file:///etc"),
        ({"type": "video_url", "video_url": "ftp://example.com/a"}, "only data, http and https URLs are supported"),
        ({"type": "image", "path": 5}, "the path of an image must be a string, got 5"),
        ({"type": "image", "image": {"image": PNG}}, "must be a data, http or https URL, got None"),
        ({"type": "image", "image": [PNG]}, "must be a path, bytes, a Pillow image or a NumPy array, got an object of type list"),
        ({"type": "image", "image": 5}, "got an object of type int"),
        ({"type": "image", "image": Video(MP4)}, "the part with an image holds a video; its type must be video"),
        ({"type": "video", "video": Image(PNG)}, "the part with a video holds an image; its type must be image"),
        ({"type": "image_url", "image_url": {"url": URL, "detail": "best"}}, "must be low, high or auto, got 'best'"),
        ({"type": "image_url", "image_url": {"url": URL, "detail": ["low"]}}, r"must be low, high or auto, got \['low'\]"),
        ({"type": "video", "video": MP4, "frames": "5"}, r"messages\[1\]: the video's frames must be an integer"),
        ({"type": "video", "video": MP4, "fps": 0}, r"messages\[1\]: the video's fps must be a number"),
        (
            {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
            "audio is not supported; send text, images and videos",
        ),
        ({"type": "audio", "audio": b""}, r"messages\[1\]: audio is not supported"),
        ({"type": "image", "image": "data:image/png,abc"}, "a data URL must begin like data:image/png;base64,"),
        ({"type": "image", "image": "data:text/html;base64,aGk="}, "a data URL must begin like"),
        ({"type": "image", "image": "data:;base64,aGk="}, "a data URL must begin like"),
        ({"type": "image", "image": f"{URL[:-8]}\n{URL[-8:]}"}, "the base64 of the data URL is damaged"),
        ({"type": "image", "image": URL[:-3]}, "the base64 of the data URL is damaged"),
        ({"type": "image", "image": f"{URL}é"}, "the base64 of the data URL is damaged"),
        ({"type": "image", "base64": "!"}, "the base64 of the data URL is damaged"),
        ({"type": "image", "image": "data:image/png;base64,"}, r"messages\[1\]: the image: empty; use a PNG"),
        ({"type": "image", "image": PNG[:50]}, r"messages\[1\]: the image: is damaged or cut short"),
        ({"type": "image", "image": MP4}, r"messages\[1\]: the image: not an image that can be read"),
        ({"type": "video", "video": PNG}, r"messages\[1\]: the video: not a video that can be read"),
        ({"type": "video", "video": [[PNG]]}, "got an object of type list"),
        ({"type": "image", "image": "nowhere.png"}, r"^nowhere\.png: there is no such file"),
        ({"type": "video", "path": "nowhere.mp4"}, r"^nowhere\.mp4: there is no such file"),
    ],
)
def test_other_parts_are_refused(part: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        split_media([user("Hi"), user({"type": "text", "text": "a"}, part)], VISION)
    assert len(str(refused.value)) < 300


def test_a_fetched_text_is_no_path() -> None:
    with pytest.raises(InputError, match="fetch must return bytes, got an object of type str"):
        split_media([user({"type": "image", "image": "https://example.com/"})], VISION, fetch=lambda url: "/etc/passwd")  # type: ignore[arg-type, return-value]


def test_long_data_urls_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_diffgemma.vision.pictures.MAX_BYTES", 100)
    with pytest.raises(InputError, match="the data URL has more than 100 bytes; make it smaller"):
        split_media([user({"type": "image", "image": URL})], VISION)


@pytest.mark.parametrize("source", [PNG, Picture(read_picture(PNG, VISION)), None])
def test_a_model_without_a_tower_reads_text_only(source: Any) -> None:
    with pytest.raises(InputError, match="this checkpoint has no vision tower, so it reads text only; leave out images"):
        split_media([user({"type": "image", "image": source})], None)


# ---- Cost


def test_reading_takes_a_step_per_image_and_more_for_a_video() -> None:
    def count(*parts: dict[str, Any]) -> int:
        def reading() -> Iterator[None]:
            yield from split_media_steps([user(*parts)], VISION)

        return len(list(reading()))

    image = {"type": "image", "image": PNG}
    assert [count(*[image] * number) for number in range(4)] == [0, 1, 2, 3]
    assert count({"type": "video", "video": MP4}) > 30


def test_reading_stops_at_the_most_soft_tokens() -> None:
    one = tokens({"type": "image", "image": PNG})
    read: list[str] = []

    def fetching(url: str) -> bytes:
        read.append(url)
        return PNG

    parts = [{"type": "image", "image": f"https://example.com/{number}"} for number in range(500)]
    _, media = split_media([user(*parts[:4])], VISION, fetch=fetching, max_soft_tokens=4 * one)
    assert len(media) == 4
    read.clear()
    message = rf"^messages\[0\]: the images and videos up to this one have {5 * one:,} soft tokens, but only {5 * one - 1:,} fit"
    with pytest.raises(InputError, match=message):
        split_media([user(*parts)], VISION, fetch=fetching, max_soft_tokens=5 * one - 1)
    assert len(read) == 5
    film = read_video(MP4, VISION)
    made = [{"type": "image", "image": PNG}, {"type": "video", "video": MP4}]
    most = one + sum(patches.soft_tokens for patches in film.images)
    split_media([user(*made)], VISION, max_soft_tokens=most)
    for last in (MP4, film):
        with pytest.raises(InputError, match=r"messages\[0\]: .* soft tokens, but only"):
            split_media([user(made[0], {"type": "video", "video": last})], VISION, max_soft_tokens=most - 1)


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux counts it")
def test_500_images_cost_what_fits() -> None:
    printed = run_alone("""
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.vision.media import split_media
from support.alone import run_alone
from support.image_files import VISION, noise, saved

image = {"type": "image", "image": saved(noise(600, 800), "JPEG")}

def problem(count):
    try:
        split_media([{"role": "user", "content": [image] * count}], VISION, max_soft_tokens=10_000)
    except InputError as refused:
        return refused

assert problem(1) is None
print(*measured(lambda: problem(500)), sep="|")
""")
    said, grown, seconds = printed.strip().split("|")
    assert said.endswith("soft tokens, but only 10,000 fit; send fewer, or with a smaller budget")
    assert float(grown) < 1.3 * 10_000 * 3 * VISION.side**2 / 2**20 + 20, grown
    assert float(seconds) < 20, seconds


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_in_data_urls_are_one_line(name: str) -> None:
    url = f"data:image/png;base64,{in_base64(BOMBS[name]())}"
    try:
        _, [picture] = split_media([user({"type": "image", "image": url})], VISION, allow_paths=False)
        said, shown = "", picture.images[0].soft_tokens
    except InputError as refused:
        said, shown = str(refused), 0
    assert shown <= VISION.soft_tokens
    assert not said or (said.startswith("messages[0]: the image: ") and "\n" not in said and len(said) < 200)


def test_a_saved_image_of_the_model_is_read_as_it_was() -> None:
    """The pixels of a picture of exactly the size that its budget gives are unchanged."""
    pixels = noise(672, 960)
    file = io.BytesIO()
    Pillow.fromarray(pixels).save(file, "PNG")
    _, [picture] = split_media([user({"type": "image", "image": file.getvalue()})], VISION)
    side, patches = VISION.patch_size, picture.images[0]
    shape = patches.rows, patches.columns, side, side, 3
    np.testing.assert_array_equal(patches.pixels.reshape(shape).swapaxes(1, 2).reshape(pixels.shape), pixels)
