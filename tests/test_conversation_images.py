"""Conversations with pictures: caches save work but change no result, and a picture is read and seen once."""

import base64
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from mlx_diffgemma import ComputationError, Conversation, DiffusionGemma, InputError, PrefixCache, Reply, load
from mlx_diffgemma.backends import Features, Piece
from mlx_diffgemma.steps import run
from mlx_diffgemma.vision.film import Film, Picture
from mlx_diffgemma.vision.patches import Patches
from mlx_diffgemma.vision.sources import Image
from support.checkpoints import SEEING_SHAPE, edit_json, make_chat_checkpoint
from support.pictures import random_picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_chat_checkpoint(tmp_path_factory.mktemp("seeing"), SEEING_SHAPE)
    edit_json(folder / "generation_config.json", eos_token_id=[1, 106, 50])  # as released
    return folder


@pytest.fixture(scope="module")
def model(folder: Path, backend_name: str) -> DiffusionGemma:
    return load(folder, backend=backend_name, dtype="float32")


def picture(model: DiffusionGemma, seed: int, rows: int = 4, columns: int = 5) -> Picture:
    """A picture of rows x columns soft tokens."""
    assert model.config.vision is not None
    return Picture(random_picture(model.config.vision, rows, columns, seed))


@dataclass
class Work:
    """What a backend did: the digests of the images that went through the tower, and the tokens of the pieces."""

    seen: list[bytes] = field(default_factory=list)
    pieces: list[list[int]] = field(default_factory=list)


@contextmanager
def watching(model: DiffusionGemma) -> Iterator[Work]:
    """The work of the model's backend in this context."""
    backend, work = model.backend, Work()
    see, encode = backend.see, backend.encode

    def watched_see(images: Sequence[Patches]) -> list[Features]:
        work.seen += [image.digest for image in images]
        return see(images)

    def watched_encode(pieces: Sequence[Piece]) -> None:
        work.pieces += [piece.tokens.tolist() for piece in pieces]
        encode(pieces)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "see", watched_see)
        patch.setattr(backend, "encode", watched_encode)
        yield work


class Compared:
    """A conversation each of whose replies is compared with that of a fresh conversation without a cache.

    Attributes:
        seen: the digests of the images that went through the tower for this conversation.
    """

    def __init__(self, model: DiffusionGemma, mode: str, kept: PrefixCache | None = None) -> None:
        self.talk, self.mode = Conversation(model, kept=kept), mode
        self.seen: list[bytes] = []

    def turn(self, text: str, *images: Any, seed: int = 0) -> Reply:
        model, options = self.talk.model, {"mode": self.mode, "seed": seed, "max_new_tokens": 9}
        alone = Conversation(model, system=self.talk.system, kept=PrefixCache(0))
        alone.messages = [dict(message) for message in self.talk.messages]
        with watching(model) as warm:
            events = self.talk.send(text, images=images, **options)
            next(events)  # the prompt is encoded
            new = list(warm.pieces)
            *_, reply = events
        with watching(model) as cold:
            events = alone.send(text, images=images, **options)
            next(events)
            whole = list(cold.pieces)
            *_, expected = events
        assert isinstance(reply, Reply)
        assert isinstance(expected, Reply)
        assert expected.cached_tokens == 0
        assert whole[len(whole) - len(new) :] == new, "other pieces than without a cache"
        assert sum(map(len, new)) == reply.statistics.prompt_tokens - reply.cached_tokens
        assert reply.statistics.prompt_tokens == expected.statistics.prompt_tokens
        assert (reply.tokens, reply.content) == (expected.tokens, expected.content), f"after {text!r}"
        self.seen += warm.seen
        return reply


@pytest.mark.parametrize("mode", ["diffusion", "causal"])
def test_twelve_turns_with_six_pictures_edits_and_forks(model: DiffusionGemma, mode: str) -> None:
    pictures = [picture(model, seed, 3 + seed % 3, 4 + seed % 2) for seed in range(6)]
    shown = {0: pictures[:1], 1: [pictures[1]], 4: pictures[2:4], 7: [pictures[4]], 10: [pictures[0], pictures[5]]}
    chat = Compared(model, mode)
    kept, messages = chat.talk.kept, chat.talk.messages
    replies: list[Reply] = []
    for turn in range(12):
        if turn == 6:  # between the pictures
            messages[4]["content"] = "What else is there?"
        elif turn == 8:  # before all pictures
            chat.talk.system = "Answer briefly."
        elif turn == 9:  # a picture in the middle is replaced
            messages[2]["content"][0] = {"type": "image", "image": picture(model, 7)}  # of the same size
            unchanged = len(run(model.prompt_steps(chat.talk._all()[:3], add_generation_prompt=False)))
        elif turn == 11:  # a turn is taken out
            del messages[6:8]
        replies.append(chat.turn(f"Question {turn}?", *shown.get(turn, ()), seed=turn))
    print(f"cached tokens: {[reply.cached_tokens for reply in replies]}")
    for turn, (before, reply) in enumerate(pairwise(replies), 1):
        least = {8: 0, **dict.fromkeys((6, 9, 11), 1)}.get(turn, before.statistics.prompt_tokens)
        assert reply.cached_tokens >= least, f"turn {turn}"
    assert replies[9].cached_tokens <= unchanged

    forked = Compared(model, mode, kept)
    forked.talk.system, forked.talk.messages = chat.talk.system, [dict(message) for message in messages[:10]]
    for turn in range(3):
        assert forked.turn(f"Other question {turn}?", *([picture(model, 8)] if turn == 1 else []), seed=turn).cached_tokens > 0
        assert chat.turn(f"Question {12 + turn}?", pictures[turn], seed=turn).cached_tokens > 0
    seen = [*chat.seen, *forked.seen]
    assert len(set(seen)) == 6 + 2
    assert len(seen) == len(set(seen)), "a picture went through the tower twice"


def last(events: Iterator[Any]) -> Reply:
    *_, reply = events
    assert isinstance(reply, Reply)
    return reply


def film(model: DiffusionGemma, *seeds: int) -> Film:
    """A video of one frame every 1.5 seconds."""
    return Film(tuple((1.5 * place, picture(model, seed, 2, 3).patches) for place, seed in enumerate(seeds)))


def test_a_reply_depends_on_the_picture(model: DiffusionGemma) -> None:
    """Also with one cache for texts that differ in the picture alone. If it did not, the comparisons here would show nothing."""
    kept = PrefixCache()
    talks = [Conversation(model, kept=kept) for _ in range(4)]
    replies = [last(talk.send("What is it?", images=[picture(model, seed)], seed=1)) for seed, talk in enumerate(talks)]
    assert len({tuple(reply.tokens) for reply in replies}) == 4
    assert [reply.cached_tokens for reply in replies] == [0] * 4


def test_pictures_in_parts_and_as_an_argument_are_the_same(model: DiffusionGemma) -> None:
    shown = [picture(model, 1), picture(model, 2)]
    parts = [*({"type": "image", "image": each} for each in shown), {"type": "text", "text": "Why?"}]
    first, second = Conversation(model), Conversation(model)
    replies = [
        last(first.send("Why?", images=shown, seed=3)),
        last(second.send({"role": "user", "content": parts}, seed=3)),
        last(Conversation(model).send([{"role": "user", "content": parts[1:]}], images=shown[:1], seed=3)),
    ]
    assert replies[0].tokens == replies[1].tokens == replies[2].tokens
    assert replies[0].tokens == model.generate("Why?", images=shown, seed=3).tokens
    assert first.messages == second.messages


def test_a_file_is_read_once(model: DiffusionGemma, tmp_path: Path) -> None:
    """What becomes of the file later changes nothing, also where a caller put it into the messages."""
    files = [tmp_path / "a.png", tmp_path / "b.png"]

    def write(first: int) -> None:
        for seed, file in enumerate(files, first):
            Pillow.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 60, 3), np.uint8)).save(file)

    def talk(conversation: Conversation, meanwhile: Callable[[], object]) -> list[Reply]:
        options = {"seed": 3, "max_new_tokens": 9}
        replies = [last(conversation.send("Why?", images=[Image(files[0], 70)], **options))]
        conversation.messages[0]["content"].insert(0, {"type": "image", "image": files[1], "detail": "low"})
        replies.append(last(conversation.send("And?", **options)))
        meanwhile()
        replies.append(last(conversation.send("So?", **options)))
        return replies

    write(0)
    expected = talk(Conversation(model), lambda: None)
    for meanwhile in (lambda: write(2), lambda: [file.unlink() for file in files]):
        write(0)
        conversation = Conversation(model)
        actual = talk(conversation, meanwhile)
        assert [reply.tokens for reply in actual] == [reply.tokens for reply in expected]
        assert actual[2].cached_tokens == expected[2].cached_tokens > 0
    conversation.save(tmp_path / "chat.json")


def test_what_cannot_be_read_leaves_the_conversation_as_it_was(model: DiffusionGemma, tmp_path: Path) -> None:
    conversation, shown = Conversation(model), picture(model, 1)
    last(conversation.send("Why?", images=[shown], seed=3, max_new_tokens=9))
    before = [dict(message) for message in conversation.messages]
    nowhere = tmp_path / "nowhere.png"
    tool = {"role": "tool", "tool_call_id": "0", "content": "x"}
    with watching(model) as work:
        for message, images, refusal in (
            ("And?", [nowhere], str(nowhere)),
            ("And?", [shown, b"GIF89a"], "messages"),
            ({"role": "user", "content": [{"type": "image", "image": nowhere}]}, [], str(nowhere)),
            ({"role": "user", "content": [{"type": "image"}]}, [], "no source"),
            (tool, [shown], "images need a message of the user"),
            ("And?", [picture(model, seed, 20, 50) for seed in range(5)], "soft tokens, but only 4,096 fit"),
            ("And?", [picture(model, seed, 7, 145) for seed in range(4)], "exceed the model's context"),
        ):
            with pytest.raises(InputError, match=refusal):
                last(conversation.send(message, images=images, seed=3, max_new_tokens=9))
            assert conversation.messages == before
    assert work.seen == work.pieces == []
    with pytest.raises(InputError, match="images must be a list"):
        conversation.send("And?", images=nowhere)  # type: ignore[arg-type]


def test_features_that_are_no_numbers_are_not_kept(model: DiffusionGemma, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation, shown, see = Conversation(model), [picture(model, 1)], model.backend.see
    with monkeypatch.context() as patch:
        patch.setattr(model.backend, "see", lambda images: [features * float("nan") for features in see(images)])
        with pytest.raises(ComputationError):
            last(conversation.send("Why?", images=shown, seed=3))
    assert conversation.messages == []
    assert last(conversation.send("Why?", images=shown, seed=3)).tokens == model.generate("Why?", images=shown, seed=3).tokens


def test_the_prompt_for_people_has_a_place_for_each_picture(model: DiffusionGemma) -> None:
    conversation = Conversation(model)
    last(conversation.send("Why?", images=[picture(model, 1), picture(model, 2)], seed=3))
    assert "<|turn>user\n<|image|><|image|>Why?<turn|>" in conversation.prompt()
    conversation.messages.append(
        {"role": "user", "content": [{"type": "video", "video": film(model, 3, 4)}, {"type": "text", "text": "And?"}]}
    )
    assert "<|turn>user\n<|video|>And?<turn|>" in conversation.prompt()


def test_saved_and_loaded(model: DiffusionGemma, tmp_path: Path) -> None:
    """Images are the same after loading, and so are replies."""
    conversation = Conversation(model)
    shown = [picture(model, 1, 6, 11), picture(model, 2)]
    last(conversation.send("Which?", images=shown, seed=1, max_new_tokens=9))
    video = film(model, 5, 6, 5)
    parts = [{"type": "text", "text": "And here?"}, {"type": "video", "video": video}]
    last(conversation.send({"role": "user", "content": parts}, seed=1, max_new_tokens=9))
    conversation.save(tmp_path / "chat.json")
    loaded = Conversation.load(model, tmp_path / "chat.json", kept=conversation.kept)

    content = [message["content"] for message in loaded.messages]
    assert [part["type"] for part in content[0]] == ["image", "image", "text"]
    for part, each in zip(content[0], shown, strict=False):
        read = part["image"].patches
        assert (read.digest, read.rows, read.columns) == (each.patches.digest, each.patches.rows, each.patches.columns)
        assert read.soft_tokens == each.patches.soft_tokens
    assert [(seconds, each.digest) for seconds, each in content[2][1]["video"].frames] == [
        (seconds, each.digest) for seconds, each in video.frames
    ]
    with watching(model) as work:
        expected, actual = (last(one.send("And?", seed=2, max_new_tokens=9)) for one in (conversation, loaded))
    assert actual.tokens == expected.tokens
    assert actual.cached_tokens >= expected.cached_tokens > 0
    assert work.seen == [], "the pictures are found in the cache"
    loaded.save(tmp_path / "again.json")
    conversation.save(tmp_path / "chat.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "chat.json").read_text()


def test_a_damaged_picture_in_a_saved_conversation(model: DiffusionGemma, tmp_path: Path) -> None:
    conversation = Conversation(model)
    conversation.messages = [
        {"role": "user", "content": [{"type": kind, kind: media}, {"type": "text", "text": "Why?"}]}
        for kind, media in (("image", picture(model, 1)), ("video", film(model, 2)))
    ]
    file = tmp_path / "chat.json"
    conversation.save(file)
    whole = json.loads(file.read_text())
    image = whole["messages"][0]["content"][0]["image"]
    png = base64.b64decode(image["png"])
    huge = struct.pack(">II", 40_000, 40_000)  # 4.8 GB of pixels
    second_header = png[8:16] + huge + png[24:29]
    bomb = png[:33] + second_header + struct.pack(">I", zlib.crc32(second_header[4:])) + png[33:]

    def refused(place: int, value: Any, message: str, **more: Any) -> None:
        kind = ("image", "video")[place]
        content = [{"type": kind, kind: value, **more}]
        file.write_text(json.dumps({**whole, "messages": [{"role": "user", "content": content}]}))
        with pytest.raises(InputError, match=message) as refusal:
            Conversation.load(model, file)
        assert str(refusal.value).startswith(f"{file}: messages[0]")
        assert len(str(refusal.value)) < len(str(file)) + 200

    damaged = "image is damaged or for another model: png must be an RGB image of 240 x 192 pixels"
    for content in (b"", png[:100], png[:-50], b"GIF89a" + png[6:], png[:16] + huge + png[24:], bomb, png[:33] + png[-12:]):
        refused(0, {**image, "png": base64.b64encode(content).decode()}, damaged)
    for wrong in ("é", image["png"][:-1] + "!", 7, None, [image["png"]]):
        refused(0, {**image, "png": wrong}, damaged)
    refused(0, {**image, "rows": image["rows"] + 3}, "image is damaged or for another model: png must be")
    for wrong in (0, -3, 1.0, "3", None, 2**40, True):
        refused(0, {**image, "rows": wrong}, "image: rows must be an integer from 1 to 3360")
    for size in ({"rows": 4}, {"rows": 3360, "columns": 6}):
        refused(0, {**image, **size}, "do not fit the model")
    for wrong in ("/etc/hostname", "data:image/png;base64," + image["png"], ["x"], None):
        refused(0, wrong, "image must be a JSON object")
        refused(1, wrong, "video must be a JSON object")
    refused(0, image, "is damaged: each part must be a text, or a saved image or video", detail="high")
    for frames in ([], {}, None, 7):
        refused(1, {"frames": frames}, "video: frames must be a list of images")
    [frame] = whole["messages"][1]["content"][0]["video"]["frames"]
    for seconds in (-1, None, "1", 1e12, float("nan")):
        refused(1, {"frames": [{**frame, "seconds": seconds}]}, "seconds must be a number from 0 to 1e")
    most = model.config.max_position_embeddings // 6
    refused(1, {"frames": [frame] * (most + 1)}, "more soft tokens than the model's context, which is 4096")

    for part in ({"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}, {"type": "image"}, "text", {"text": "Hi"}):
        file.write_text(json.dumps({**whole, "messages": [{"role": "user", "content": [part]}]}))
        with pytest.raises(InputError, match="is damaged: each part must be a text, or a saved image or video"):
            Conversation.load(model, file)


def test_a_model_that_reads_text_only(model: DiffusionGemma, tmp_path: Path) -> None:
    conversation = Conversation(model)
    conversation.messages = [{"role": "user", "content": [{"type": "image", "image": picture(model, 1)}]}]
    conversation.save(tmp_path / "chat.json")
    text_only = load("sudoku", backend=model.backend.name)
    with pytest.raises(InputError, match="image: this model reads text only; load the conversation with a model that reads im"):
        Conversation.load(text_only, tmp_path / "chat.json")
    talk = Conversation(text_only)
    with pytest.raises(InputError, match="reads text only"):
        last(talk.send("Why?", images=[picture(model, 1)]))
    assert talk.messages == []
