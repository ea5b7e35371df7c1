"""The same bits, whatever is cached: warm and cold conversations, with edits, forks and evictions.

A warm conversation has a prefix cache that has seen everything before; a cold one has none. Both encode the same pieces, so
tokens and logits are the same by construction. They are compared bit for bit. The suite runs :data:`COUNT` conversations of each
template and backend, and ``pytest -m long tests/test_same_bits.py`` runs :data:`ALL` of each.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_diffgemma import Conversation, DiffusionGemma, PrefixCache, Reply, load
from mlx_diffgemma.backends import Row
from mlx_diffgemma.prefix_cache import Context, read
from mlx_diffgemma.prompts import PromptTokens
from support.checkpoints import CANVAS, CONTEXT, make_chat_checkpoint
from support.tiny_tokenizer import OLDER_CHAT_TEMPLATE

COUNT, ALL = 6, 150

WORDS = (
    "sky",
    "blue",
    "why",
    "because",
    "café",
    "light",
    "x[i] = {y: z}",
    "🌊",
    "\n\n",
    "The user asks",
    "<|turn>model\n",
    "0123",
)
TOOL = {"type": "function", "function": {"name": "weather", "description": "Look it up", "parameters": {}}}
CALL = {"id": "call_0", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}


@pytest.fixture(scope="session", params=["newer", "older"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, backend_name: str) -> DiffusionGemma:
    folder = make_chat_checkpoint(tmp_path_factory.mktemp("same_bits"))
    if request.param == "older":
        folder = Path(shutil.copytree(folder, tmp_path_factory.mktemp("older") / "model"))
        (folder / "chat_template.jinja").write_text(OLDER_CHAT_TEMPLATE)
    return load(folder, backend=backend_name, device="cpu", dtype="float32")


@dataclass
class Warmth:
    """The number of positions found in a cache, and of all positions read."""

    cached: int = 0
    read: int = 0
    conversations: int = 0
    turns: int = 0


def random_text(random: np.random.Generator) -> str:
    return " ".join(random.choice(WORDS, int(random.integers(1, 9)))) + "?"


def options(random: np.random.Generator) -> dict[str, Any]:
    """Options for a turn. Most commit tokens at the cuts of later turns, some do not."""
    chosen: dict[str, Any] = {"seed": int(random.integers(1 << 20)), "max_new_tokens": int(random.integers(1, 3 * CANVAS))}
    kind = random.random()
    if kind < 0.15:
        return {**chosen, "mode": "causal", "max_new_tokens": int(random.integers(1, CANVAS))}
    if kind < 0.3:
        return {**chosen, "canvas_length": 3, "max_denoising_steps": 2}
    return {**chosen, "max_denoising_steps": int(random.integers(1, 4)), "logprobs": bool(random.random() < 0.15)}


def assert_same_bits(model: DiffusionGemma, warm: Context, cold: Context, canvas: NDArray[np.int32]) -> None:
    one, other = (model.backend.logits([Row(canvas, context.cache.fork(), 1.0)])[0] for context in (warm, cold))
    assert one.tobytes() == other.tobytes(), f"{warm.cached_tokens} of {len(warm.tokens)} tokens cached: logits differ"
    assert model.backend.next_logits([warm.cache]).tobytes() == model.backend.next_logits([cold.cache]).tobytes()


def last(events: Any) -> Reply:
    *_, reply = events
    assert isinstance(reply, Reply)
    return reply


def edit(chat: Conversation, random: np.random.Generator) -> None:
    """Edit the conversation: an earlier user message, the last reply, or everything after a turn."""
    places = [index for index, message in enumerate(chat.messages) if message["role"] == "user"]
    if not places:
        return
    place, kind = int(random.choice(places)), random.random()
    if kind < 0.4:
        chat.messages[place] = {"role": "user", "content": random_text(random)}
    elif kind < 0.7:
        del chat.messages[place:]
    else:
        chat.messages[-1] = {"role": "assistant", "content": random_text(random)}


def converse(model: DiffusionGemma, seed: int, kept: PrefixCache, seen: Warmth) -> None:
    """One conversation of up to four turns, each read and written warm and cold."""
    random = np.random.default_rng(seed)
    system = None if random.random() < 0.3 else f"Answer {random.choice(WORDS)}."
    tools = [TOOL] if random.random() < 0.4 else None
    chat = Conversation(model, system=system, tools=tools, thinking=bool(random.random() < 0.4), kept=kept)
    seen.conversations += 1
    for _ in range(random.integers(1, 5)):
        if random.random() < 0.3:
            edit(chat, random)
        message: Any = random_text(random)
        if tools and random.random() < 0.3:
            chat.messages += [{"role": "user", "content": message}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
            message = {"role": "tool", "tool_call_id": "call_0", "content": random_text(random)}
        given = options(random)
        ids = PromptTokens(
            model.prompt_ids(
                chat.model.tokenizer.chat([*chat._all(), *as_messages(message)], tools=tools, enable_thinking=chat.thinking)
            )
        )
        if len(ids) > CONTEXT - 4 * CANVAS:
            return
        warm, cold = read(model.backend, ids, model.piece_rule, kept), read(model.backend, ids, model.piece_rule)
        seen.cached, seen.read, seen.turns = seen.cached + warm.cached_tokens, seen.read + len(ids), seen.turns + 1
        canvas = random.integers(0, model.backend.config.vocab_size, CANVAS).astype(np.int32)
        assert_same_bits(model, warm, cold, canvas)
        alone = Conversation(model, system=system, tools=tools, thinking=chat.thinking, kept=PrefixCache(0))
        alone.messages = [dict(each) for each in chat.messages]
        replies = [last(each.send(message, **given)) for each in (chat, alone)]
        assert replies[0].tokens == replies[1].tokens
        assert replies[0].statistics.denoising_steps == replies[1].statistics.denoising_steps
        assert replies[0].logprobs == replies[1].logprobs
        if random.random() < 0.2:
            kept.max_bytes = int(random.integers(1, 1 << 20))  # evicts the least recently used
            kept.keep([b"nothing"], model.backend.new_cache())


def as_messages(message: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": message} if isinstance(message, str) else message]


def run(model: DiffusionGemma, seeds: range) -> None:
    kept, seen = PrefixCache(1 << 20), Warmth()
    for seed in seeds:
        converse(model, seed, kept, seen)
    print(f"{model.backend.name}: {seen}")
    assert seen.turns > 1.5 * seen.conversations
    assert 0.2 < seen.cached / seen.read < 0.95, "hardly anything was found, or everything"


def test_warm_is_cold(model: DiffusionGemma) -> None:
    run(model, range(COUNT))


@pytest.mark.long
def test_warm_is_cold_in_all_conversations(model: DiffusionGemma) -> None:
    run(model, range(ALL))
