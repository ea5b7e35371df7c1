"""Kept caches: a cached prefix equals a freshly encoded one, the total size is bounded, and keeping a cache costs nothing."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlx_diffgemma.backends import Backend, Piece, Row
from mlx_diffgemma.prefix_cache import Context, PrefixCache, hashes, read, settle
from mlx_diffgemma.prompts import PieceRule, PromptTokens
from support.fake import FakeBackend, FakeCache

LoadBackend = Callable[..., Backend]

#: The token that ends a turn, and the token before a reply.
END, START = 9, 8
CANVAS = 4
RULE = PieceRule(CANVAS, (END,), ((START,),))


def ids_of(tokens: Sequence[int]) -> NDArray[np.int32]:
    return np.array(tokens, np.int32)


def prompt_of(tokens: Sequence[int]) -> PromptTokens:
    return PromptTokens(ids_of(tokens))


# --- on real backends


def random_tokens(backend: Backend, count: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(10, backend.config.vocab_size, count).astype(np.int32)


def after(backend: Backend, cache: Any, canvas: NDArray[np.int32]) -> list[NDArray[np.float32]]:
    """Logits of a canvas after a cache, and of the next token."""
    return [backend.logits([Row(canvas, cache, 1.0)])[0], backend.next_logits([cache])[0]]


@pytest.mark.parametrize("place", [1, 3, 20], ids=["shorter than the window", "at its edge", "longer"])
def test_a_fork_goes_on_as_a_new_cache(backend: LoadBackend, backend_name: str, place: int) -> None:
    """The same pieces give the same bits, whether or not other texts have continued the same prefix."""
    loaded = backend(backend_name, "window_below_canvas")
    tokens, canvas = random_tokens(loaded, 40), random_tokens(loaded, 6, seed=1)
    beginning, rest, other = tokens[:place], tokens[place:], random_tokens(loaded, 30, seed=2)

    def fresh(*pieces: NDArray[np.int32]) -> list[NDArray[np.float32]]:
        cache = loaded.new_cache()
        for piece in pieces:
            loaded.encode([Piece(piece, cache)])
        return after(loaded, cache, canvas)

    cache = loaded.new_cache()
    loaded.encode([Piece(beginning, cache)])
    fork = cache.fork()
    loaded.encode([Piece(rest, cache)])
    assert (len(cache), len(fork)) == (40, place)
    np.testing.assert_array_equal(after(loaded, fork, canvas)[0], fresh(beginning)[0], "a canvas behind the fork")
    np.testing.assert_array_equal(after(loaded, fork, canvas)[1], fresh(beginning)[1], "what comes next")
    loaded.encode([Piece(other, fork)])
    for actual, expected in zip(after(loaded, fork, canvas), fresh(beginning, other), strict=True):
        np.testing.assert_array_equal(actual, expected, "behind other tokens")
    for actual, expected in zip(after(loaded, cache, canvas), fresh(beginning, rest), strict=True):
        np.testing.assert_array_equal(actual, expected, "behind the cache that was forked")


def test_forks_share_what_is_committed(backend: LoadBackend, backend_name: str) -> None:
    loaded = backend(backend_name, "window_below_canvas")
    cache = loaded.new_cache()
    loaded.encode([Piece(random_tokens(loaded, 12), cache)])
    fork = cache.fork()
    assert fork.buffers() == cache.buffers()
    assert sum(cache.buffers().values()) == cache.nbytes > 0
    kept = PrefixCache(buffer_bytes=7)
    for place in (1, 2):
        kept.keep([bytes([part]) for part in range(place)], cache)
    assert (len(kept), kept.nbytes) == (2, cache.nbytes + 2 * 7 * len(cache.buffers())), "what places share counts once"


def test_what_is_found_is_what_encoding_afresh_gives(backend: LoadBackend, backend_name: str) -> None:
    """Warm and cold results are equal to the bit, in a conversation of three turns committed canvas by canvas."""
    loaded = backend(backend_name, "window_below_canvas")
    length = loaded.config.canvas_length
    rule, kept = PieceRule(length, (END,), ((START,),)), PrefixCache()
    canvas, text = random_tokens(loaded, length, seed=1), [2]
    for turn, count in enumerate((2 * length + 1, 3 * length, length - 1)):
        text += [*random_tokens(loaded, 15, seed=10 + turn).tolist(), END, START]
        warm, cold = read(loaded, prompt_of(text), rule, kept), read(loaded, prompt_of(text), rule)
        assert (warm.cached_tokens > 0) == (turn > 0)
        assert cold.cached_tokens == 0
        for actual, expected in zip(after(loaded, warm.cache, canvas), after(loaded, cold.cache, canvas), strict=True):
            np.testing.assert_array_equal(actual, expected, f"turn {turn}")
        reply = [*random_tokens(loaded, count, seed=20 + turn).tolist(), END]
        for start in range(0, count // length * length, length):
            loaded.encode([Piece(ids_of(reply[start : start + length]), warm.cache)])
        settle(loaded, warm, reply, rule, kept, step=length)
        text += reply


# --- finding prefixes, on a backend that records its calls


class Pieces(FakeCache):
    """Records the pieces of its tokens. Two caches with the same pieces are equal, bit for bit."""

    def __init__(self, tokens: Sequence[int] = (), pieces: Sequence[Sequence[int]] = ()) -> None:
        super().__init__(tokens)
        self.pieces = list(pieces)

    def extend(self, tokens: Any) -> None:
        self.pieces.append(list(tokens))
        super().extend(tokens)

    def fork(self) -> "Pieces":
        return Pieces(self, self.pieces)


class PieceBackend(FakeBackend):
    def new_cache(self) -> Pieces:
        return Pieces()

    @property
    def encoded(self) -> list[list[int]]:
        """The pieces that were encoded."""
        return [piece for pieces in self.tokens_of("encode") for piece in pieces]


def read_ids(kept: PrefixCache, ids: Sequence[int]) -> tuple[Context, list[list[int]]]:
    """The context of a prompt and the pieces encoded for it. Asserts that reading it without a cache gives the same."""
    backend = PieceBackend()
    context = read(backend, prompt_of(ids), RULE, kept)
    cold = read(PieceBackend(), prompt_of(ids), RULE)
    assert list(context.cache) == list(ids), "the cache holds the prompt"
    assert context.cache.pieces == cold.cache.pieces, "in other pieces than those of reading afresh"
    assert (context.cuts, cold.cached_tokens) == (cold.cuts, 0)
    assert sum(map(len, backend.encoded)) == len(ids) - context.cached_tokens
    return context, backend.encoded


def write(
    kept: PrefixCache, context: Context, reply: Sequence[int], step: int = CANVAS, *, scored: bool = False
) -> list[list[int]]:
    """Continue the context's cache with a reply as the samplers do, and keep it. Returns the pieces encoded to keep it.

    Args:
        step: tokens committed at a time.
        scored: whether the last part is committed too, as scoring does.
    """
    sampler, backend = PieceBackend(), PieceBackend()
    parts = [reply[start : start + step] for start in range(0, len(reply), step)]
    for part in parts if scored else parts[:-1]:
        sampler.encode([Piece(ids_of(part), context.cache)])
    settle(backend, context, reply, RULE, kept, step=step)
    return backend.encoded


def test_what_was_read_is_found_again_by_its_pieces() -> None:
    kept = PrefixCache()
    assert read_ids(kept, [1, 2, 3])[1] == [[1, 2, 3]]
    assert read_ids(kept, [1, 2, 3])[1] == [], "the same prompt"
    assert read_ids(kept, [1, 2, 3, 4])[1] == [[1, 2, 3, 4]], "a prompt that goes on within the piece"
    assert read_ids(kept, [1, 2, 5])[1] == [[1, 2, 5]], "one that is another from within the piece on"
    assert len(kept) == 3

    assert read_ids(kept, [1, END, 2, 3])[1] == [[1, END], [2, 3]]
    assert read_ids(kept, [1, END, 4])[1] == [[4]], "behind the piece that both begin with"
    assert read_ids(kept, [2, 3])[1] == [[2, 3]], "a piece that followed another one"
    assert read_ids(kept, [1, END])[1] == [], "a text that ends where another one's piece did"


def test_the_first_turn_is_a_place_to_begin_from() -> None:
    kept = PrefixCache()
    assert read_ids(kept, [1, 2, END, 3, END, START])[1] == [[1, 2, END], [3, END], [START]]
    context, encoded = read_ids(kept, [1, 2, END, 4, END, START])
    assert context.cached_tokens == 3
    assert encoded == [[4, END], [START]]


def test_a_prompt_is_a_place_to_go_on_from() -> None:
    """The next prompt begins with this prompt, whatever the template does with the reply."""
    kept, prompt = PrefixCache(), [1, END, 2, END, START]
    read_ids(kept, prompt)
    for reply in ([3, 4, END], [5, 6, 7, 5, 6, 7, END]):
        context, encoded = read_ids(kept, [*prompt, *reply, 2, END, START])
        assert context.cached_tokens == len(prompt)
        assert [token for piece in encoded for token in piece] == [*reply, 2, END, START]


REPLY = [1, 2, 3, 4, 5, 6, 7, 1, 2, END]


@pytest.mark.parametrize(
    ("reply", "step", "scored", "encoded"),
    [
        (REPLY, 4, False, [[2, END]]),
        (REPLY, 4, True, []),
        (REPLY[:8], 4, False, [[5, 6, 7, 1]]),
        (REPLY[:9], 4, False, []),
        (REPLY[-2:], 4, False, [[2, END]]),
        (REPLY[:2], 4, False, []),
        (REPLY, 3, False, [[1, 2, 3, 4], [5, 6, 7, 1], [2, END]]),
        (REPLY, 2, False, [[1, 2, 3, 4], [5, 6, 7, 1], [2, END]]),
        (REPLY[:9], 1, False, [[1, 2, 3, 4], [5, 6, 7, 1]]),
        ([1, 2, END], 2, True, [[1, 2, END]]),
        ([1, END, 3, 4, 5, END], 4, False, [[1, END], [3, 4, 5, END]]),
    ],
    ids=[
        "whole canvases and a shortened one",
        "scored to the end",
        "cut off behind a canvas",
        "cut off within a canvas",
        "less than a canvas",
        "less than a canvas, cut off",
        "shorter canvases",
        "half canvases, that end where whole ones do",
        "single tokens, as many as two canvases",
        "short canvases, scored to the end",
        "an end within",
    ],
)
def test_of_a_reply_only_what_was_committed_otherwise_is_encoded(
    reply: list[int], step: int, scored: bool, encoded: list[list[int]]
) -> None:
    """Canvases committed at the cuts of a later text stay. The others are encoded, up to the last certain boundary."""
    kept, prompt = PrefixCache(), [1, END, START]
    context, _ = read_ids(kept, prompt)
    pieces = write(kept, context, reply, step, scored=scored)
    assert [token for piece in pieces for token in piece] == [token for piece in encoded for token in piece]
    assert pieces == encoded
    again, _ = read_ids(kept, [*prompt, *reply, 5, END, START])
    sure = [cut for cut in RULE.boundaries(again.tokens) if cut <= len(prompt) + len(reply)][-1]
    assert again.cached_tokens == sure
    assert write(kept, again, []) == [], "nothing was written"


@pytest.mark.parametrize("max_bytes", [0, 129])
def test_nothing_is_encoded_that_cannot_be_kept(max_bytes: int) -> None:
    """3 tokens of a prompt and 10 of a reply, 10 bytes each, that were not committed at the cuts of a later text."""
    kept = PrefixCache(max_bytes, buffer_bytes=0)
    context, _ = read_ids(kept, [1, END, START])
    assert write(kept, context, REPLY, 1, scored=True) == []


def test_a_conversation_keeps_some_places() -> None:
    """They include the ends of its first prompt, its last prompt and its last reply."""
    kept, ids = PrefixCache(), [1, 2, END, START]
    places = [len(ids)]
    for turn in range(6):
        context, _ = read_ids(kept, ids)
        assert context.cached_tokens == (len(ids) - 3 if turn else 0), "all but what is new"
        reply = [turn] * (CANVAS + 2) + [END]
        assert write(kept, context, reply) == [reply[CANVAS:]]
        assert len(kept) <= 4
        places += [len(ids), len(ids) + len(reply)]
        ids += [*reply, turn, END, START]
    for place in (places[0], *places[-2:]):
        assert read_ids(kept, ids[:place])[1] == []


def test_a_turn_that_is_written_another_way_begins_behind_its_prompt() -> None:
    """This happens when a template leaves out a thought from an earlier turn."""
    kept, ids = PrefixCache(), [1, 2, END, START]
    for turn in range(5):
        context, _ = read_ids(kept, ids)
        reply = [7, 7, turn, END]
        write(kept, context, reply)
        assert read_ids(kept, [*ids, *reply])[1] == [], "the reply as it was"
        again, encoded = read_ids(kept, [*ids, *reply[2:], turn, END, START])
        assert again.cached_tokens == len(ids), f"turn {turn}"
        assert encoded == [reply[2:], [turn, END], [START]]
        ids += [*reply[2:], turn, END, START]


turns = st.lists(
    st.fixed_dictionaries(
        {
            "asked": st.lists(st.integers(0, 7), max_size=6),
            "reply": st.lists(st.sampled_from([0, 1, 2, 3, END]), min_size=1, max_size=14),
            "ended": st.booleans(),
            "step": st.sampled_from([1, 2, 3, CANVAS, CANVAS, CANVAS]),
            "scored": st.booleans(),
            "left_out": st.integers(0, 3),
            "anew": st.sampled_from([False, False, False, True]),
        }
    ),
    min_size=1,
    max_size=5,
)


@given(conversations=st.lists(turns, min_size=1, max_size=4), max_bytes=st.sampled_from([0, 150, 400, 1 << 20]))
@settings(max_examples=200, deadline=None)
def test_whatever_was_read_and_written_nothing_else_is_found(conversations: Any, max_bytes: int) -> None:
    """Conversations that share prefixes: reading gives the same pieces as without a cache, and kept bytes stay within bounds."""
    kept = PrefixCache(max_bytes, buffer_bytes=0)
    for conversation in conversations:
        ids = [1, 2, END]
        for turn in conversation:
            ids = [*([1, 2, END] if turn["anew"] else ids), *turn["asked"], END, START]
            context, _ = read_ids(kept, ids)  # asserts that its pieces are right
            reply = [*turn["reply"], END] if turn["ended"] else turn["reply"]
            write(kept, context, reply, turn["step"], scored=turn["scored"])
            assert kept.nbytes <= max_bytes
            ids += reply[turn["left_out"] :]


# --- bounds and bookkeeping


@dataclass(eq=False)
class Shared:
    """A cache of shared buffers, which grow for all caches. Counts the calls of ``buffers`` on it and its forks.

    Attributes:
        names: names of its buffers.
        sizes: bytes of all existing buffers, by name.
    """

    names: tuple[int, ...]
    sizes: dict[int, int]
    asked: Counter[str] = field(default_factory=Counter)
    owner: str = ""

    def __len__(self) -> int:
        return 1

    def fork(self) -> "Shared":
        return Shared(self.names, self.sizes, self.asked, self.owner)

    def buffers(self) -> dict[int, int]:
        self.asked[self.owner] += 1
        return {name: self.sizes[name] for name in self.names}

    @property
    def nbytes(self) -> int:
        return sum(self.sizes[name] for name in self.names)


def single(number: int, size: int = 10) -> Shared:
    """A cache of one buffer that nothing else shares."""
    return Shared((number,), {number: size})


def chain(*tokens: int) -> list[bytes]:
    """Hashes of a text with one token per piece."""
    return hashes(prompt_of(tokens), range(1, len(tokens) + 1))


def test_hashes_tell_texts_and_their_pieces_apart() -> None:
    texts = [([1, 2, 3], [3]), ([1, 2, 3], [1, 3]), ([1, 2, 3], [2, 3]), ([1, 2, 3], [1, 2, 3]), ([1, 2], [2]), ([0, 1, 2], [3])]
    ends = [hashes(prompt_of(tokens), cuts)[-1] for tokens, cuts in texts]
    assert len(set(ends)) == len(texts)
    assert chain(1, 2, 3)[:2] == chain(1, 2, 4)[:2]
    assert hashes(prompt_of([]), []) == []


def test_what_is_kept_is_bounded() -> None:
    kept = PrefixCache(max_bytes=100, buffer_bytes=0)
    for first in range(8):
        read_ids(kept, [first, 1, 2])
        assert kept.nbytes <= 100
    assert len(kept) == 3
    assert read_ids(kept, [7, 1, 2])[1] == []
    assert read_ids(kept, [5, 1, 2])[1] == []
    read_ids(kept, [0, 1, 2])
    assert read_ids(kept, [5, 1, 2])[1] == [], "used lately, and so kept"
    assert read_ids(kept, [6, 1, 2])[1] == [[6, 1, 2]], "dropped for the new one"
    read_ids(kept, [1] * 20)
    assert kept.nbytes <= 100, "a text that is too long is not kept"
    assert read_ids(kept, [5, 1, 2])[1] == [], "and takes no other's place"
    kept.clear()
    assert kept.nbytes == len(kept) == 0
    assert read_ids(kept, [5, 1, 2])[1] == [[5, 1, 2]]


def taken(kept: PrefixCache, text: Sequence[bytes]) -> tuple[int, tuple[int, ...]] | None:
    """The number of pieces found, and the names of their buffers."""
    found = kept.take(text)
    assert found is None or isinstance(found[1], Shared)
    return None if found is None else (found[0], found[1].names)  # type: ignore[attr-defined]


def test_the_least_recently_used_goes_first() -> None:
    """Using a longer text also counts as using its prefixes."""
    kept = PrefixCache(max_bytes=40, buffer_bytes=0)
    for number, text in enumerate((chain(1), chain(1, 2), chain(3), chain(4))):
        kept.keep(text, single(number))
    assert taken(kept, chain(1, 2, 9)) == (2, (1,))
    kept.keep(chain(5), single(4))
    assert (taken(kept, chain(3)), len(kept)) == (None, 4)
    kept.keep(chain(6), single(5))
    assert (taken(kept, chain(4)), len(kept)) == (None, 4)
    for text in (chain(1), chain(1, 2), chain(5), chain(6)):
        assert kept.take(text) is not None


def test_the_most_pieces_that_can_be_had_are_taken() -> None:
    kept = PrefixCache()
    kept.keep(chain(1), single(1))
    kept.keep(chain(1, 2, 3), single(3))
    assert taken(kept, chain(1, 2)) == (1, (1,))
    assert taken(kept, chain(1, 2, 3)) == taken(kept, chain(1, 2, 3, 4)) == (3, (3,))
    assert taken(kept, chain(2, 3)) is None
    assert taken(kept, []) is None


def test_what_is_taken_is_a_fork() -> None:
    kept, cache = PrefixCache(), single(1)
    kept.keep(chain(1), cache)
    first, second = kept.take(chain(1)), kept.take(chain(1))
    assert first is not None
    assert second is not None
    assert len({id(cache), id(first[1]), id(second[1])}) == 3


def test_what_places_share_counts_once_and_until_the_last_of_them_goes() -> None:
    kept, sizes = PrefixCache(max_bytes=100, buffer_bytes=0), {1: 40, 2: 10, 3: 10, 4: 45, 5: 20}
    kept.keep(chain(1), Shared((1, 2), sizes))
    kept.keep(chain(1, 2), Shared((1, 3), sizes))
    assert kept.nbytes == 60
    kept.keep(chain(7), Shared((4,), sizes))
    assert (kept.nbytes, len(kept)) == (95, 2), "the first is gone, and what it shared is not"
    kept.keep(chain(8), Shared((5,), sizes))
    assert (kept.nbytes, len(kept)) == (65, 2), "now that is too"


def test_another_cache_in_the_place_of_one() -> None:
    kept = PrefixCache(buffer_bytes=0)
    kept.keep(chain(1), single(1, 40))
    kept.keep(chain(1), single(2, 30))
    assert (kept.nbytes, len(kept)) == (30, 1)
    kept.keep(chain(1, 2), single(3, 20), instead=chain(1)[0])
    assert (kept.nbytes, len(kept)) == (20, 1)
    kept.keep(chain(5), single(4, 20), instead=chain(1, 2)[-1])
    assert len(kept) == 2, "only an earlier place of the same text is dropped"


def test_buffers_that_grow_are_followed() -> None:
    kept, sizes = PrefixCache(max_bytes=200, buffer_bytes=0), {1: 40, 2: 10, 3: 10, 5: 1000, 6: 5}
    kept.keep(chain(1), Shared((1, 2), sizes))
    kept.keep(chain(1, 2), Shared((1, 3), sizes))
    sizes[1] = 70
    kept.recount(Shared((1, 5), sizes))
    assert kept.nbytes == 90, "what is shared with kept places, and nothing else"
    sizes[1] = 80
    kept.keep(chain(1, 2, 3), Shared((1, 6), sizes))
    assert kept.nbytes == 105, "whatever is kept tells what has grown"
    kept.clear()
    assert kept.nbytes == 0


def test_what_grows_beyond_the_bound_is_dropped() -> None:
    kept, sizes = PrefixCache(max_bytes=100, buffer_bytes=0), {1: 40, 2: 40}
    kept.keep(chain(1), Shared((1,), sizes))
    kept.keep(chain(2), Shared((2,), sizes))
    sizes[1] = 90
    kept.recount(Shared((1,), sizes))
    assert (kept.nbytes, len(kept)) == (40, 1)
    sizes[2] = 130
    kept.keep(chain(2, 3), Shared((2,), sizes))
    assert (kept.nbytes, len(kept)) == (0, 0), "it is too large to be kept, and now so is what shares it"


@dataclass
class Plain:
    """A plain prefix cache that recomputes all counts every time."""

    max_bytes: int
    sizes: dict[int, int]
    entries: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)  # texts and buffers; the newest last

    @property
    def nbytes(self) -> int:
        return sum(self.sizes[name] for name in {name for _, names in self.entries for name in names})

    def fit(self) -> None:
        while self.nbytes > self.max_bytes:
            del self.entries[0]

    def take(self, text: tuple[int, ...]) -> tuple[int, tuple[int, ...]] | None:
        used = sorted((each for each in self.entries if text[: len(each[0])] == each[0]), key=lambda each: len(each[0]))
        self.entries = [*(each for each in self.entries if each not in used), *used]
        return (len(used[-1][0]), used[-1][1]) if used else None

    def keep(self, text: tuple[int, ...], names: tuple[int, ...]) -> None:
        if sum(self.sizes[name] for name in names) <= self.max_bytes:
            before = sorted((each[0] for each in self.entries if text[: len(each[0])] == each[0] != text), key=len)
            self.entries = [each for each in self.entries if each[0] not in (*before[1:-2], text)]
            self.entries.append((text, names))
        self.fit()


short_texts = st.lists(st.integers(1, 2), min_size=1, max_size=6).map(tuple)
some_buffers = st.lists(st.integers(0, 5), max_size=3, unique=True).map(tuple)
deeds = st.lists(
    st.tuples(st.just("keep"), short_texts, some_buffers)
    | st.tuples(st.just("take"), short_texts)
    | st.tuples(st.just("grow"), st.integers(0, 5), st.integers(1, 40))
    | st.tuples(st.just("clear")),
    max_size=30,
)


@given(deeds=deeds, max_bytes=st.sampled_from([0, 60, 100, 1000]))
@settings(max_examples=300, deadline=None)
def test_the_books_are_those_of_counting_everything_anew(deeds: Any, max_bytes: int) -> None:
    sizes = dict.fromkeys(range(6), 20)
    kept, plain = PrefixCache(max_bytes, buffer_bytes=0), Plain(max_bytes, sizes)
    for deed, *what in deeds:
        match deed:
            case "keep":
                kept.keep(chain(*what[0]), Shared(what[1], sizes))
                plain.keep(*what)
            case "take":
                assert taken(kept, chain(*what[0])) == plain.take(what[0])
            case "grow":
                sizes[what[0]] += what[1]
                kept.recount(Shared((what[0],), sizes))
                plain.fit()
            case "clear":
                kept.clear()
                plain.entries.clear()
        assert (kept.nbytes, len(kept)) == (plain.nbytes, len(plain.entries))


@pytest.mark.parametrize("count", [5, 500])
def test_keeping_and_taking_touch_no_other_cache(count: int) -> None:
    """The bookkeeping cost does not grow with the number of caches: it reads no other cache's buffers, its own a few times."""
    asked: Counter[str] = Counter()
    sizes = dict.fromkeys(range(-1, count), 10)
    kept, mine = PrefixCache(max_bytes=10 * count, buffer_bytes=0), Shared((-1,), sizes, asked, "mine")
    for number in range(count):
        kept.keep(chain(100 + number), Shared((number,), sizes, asked, "other"))
    asked.clear()
    kept.keep(chain(1), mine)
    assert asked == {"mine": 2}, "it takes the place of another one"
    assert len(kept) == count
    assert taken(kept, chain(1, 2)) == (1, (-1,))
    assert taken(kept, chain(100 + count - 1)) == (1, (count - 1,))
    assert taken(kept, chain(2)) is None
    assert asked == {"mine": 2}
    kept.recount(mine)
    kept.clear()
    assert asked == {"mine": 3}


def test_another_salt_finds_nothing() -> None:
    """Whoever sees how much of a prompt was cached learns nothing about prompts with another salt."""
    backend, kept, tokens = FakeBackend(), PrefixCache(), prompt_of([1, 2, 3, END, 4, 5])
    for salt in ("", "a", "b"):
        assert read(backend, tokens, RULE, kept, salt=salt).cached_tokens == 0, salt
        context = read(backend, tokens, RULE, kept, salt=salt)
        assert (context.cached_tokens, context.salt) == (6, salt)
        backend.encode([Piece(ids_of([6, END]), context.cache)])
        settle(backend, context, [6, END], RULE, kept, step=2)
        assert read(backend, prompt_of([1, 2, 3, END, 4, 5, 6, END, 7]), RULE, kept, salt=salt).cached_tokens > 6, salt
    assert len(set(map(tuple, (hashes(tokens, [6], salt) for salt in ("", "a", "b"))))) == 3


def test_a_text_whose_keys_may_be_wrong_is_forgotten() -> None:
    backend, kept, good, bad = FakeBackend(), PrefixCache(), prompt_of([1, 2, END, 3]), prompt_of([4, 5, END, 6])
    contexts = [read(backend, tokens, RULE, kept) for tokens in (good, bad)]
    places, size = len(kept), kept.nbytes
    kept.forget(contexts[1])
    assert (len(kept), kept.nbytes) == (places // 2, size // 2)
    assert [read(backend, tokens, RULE, kept).cached_tokens for tokens in (good, bad)] == [4, 0]
