"""NaN and infinity: what the model computes from them is an error of the text that it was computed for, and never a text."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from mlx_diffgemma import ComputationError, Conversation, DiffusionGemma, PrefixCache, infill, load, proofread, revise
from mlx_diffgemma.backends import Piece, Row, check_computed, load_backend, scored
from mlx_diffgemma.causal import causal
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.cli import main
from mlx_diffgemma.config import CausalConfig, GenerationConfig
from mlx_diffgemma.prefix_cache import hashes
from mlx_diffgemma.prompts import PromptTokens
from mlx_diffgemma.sampler import Block, Text, block_diffusion
from support.checkpoints import make_chat_checkpoint
from support.comparing import assert_close
from support.fake import Asked, FakeBackend, L, full
from support.scheduling import Bench, Inbox
from support.signals import times

NAN, INF = np.float32("nan"), np.float32("inf")
LINE = r"the model computed (NaN|infinity) in .*; the weights or the device are damaged: try `mlx-diffgemma verify MODEL`$"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_checkpoint(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def model(folder: Path, backend_name: str) -> DiffusionGemma:
    """A model of its own, which the test may damage."""
    return load(folder, backend=backend_name)


def joined(backend: Any, path: str, place: Any) -> tuple[str, Any]:
    """Where MLX's model has a weight's numbers: it joins the projections that have the same input."""
    config, layer = backend.config, backend.config.layers[0]
    queries = config.num_attention_heads * layer.head_dim * config.hidden_size
    keys = layer.num_key_value_heads * layer.head_dim * config.hidden_size
    wholes = {
        ".q_proj": (".qkv_proj.parts.0", 0),
        ".k_proj": (".qkv_proj.parts.0", queries),
        ".v_proj": (".qkv_proj.parts.0", queries + keys),
        ".mlp.gate_proj": (".mlp.gate_up_proj.parts.0", 0),
        ".mlp.up_proj": (".mlp.gate_up_proj.parts.0", config.intermediate_size * config.hidden_size),
    }
    for part, (whole, before) in wholes.items():
        if part in path:
            return path.replace(part, whole), slice(before, None) if isinstance(place, slice) else place + before
    return path, place


def poison(backend: Any, path: str, *, value: float = np.nan, place: Any = 0) -> None:
    """Put a value into a weight of a loaded model, where no check of the file can see it."""
    if backend.name == "mlx":
        path, place = joined(backend, path, place)
    *modules, name = path.split(".")
    module = backend.model
    for step in modules:
        module = module[int(step)] if step.isdecimal() else getattr(module, step)
    numbers = np.array(getattr(module, name).tolist(), np.float32)
    numbers.reshape(-1)[place] = value
    if backend.name == "mlx":
        import mlx.core as mx

        setattr(module, name, mx.array(numbers))
    else:
        import torch

        setattr(module, name, torch.nn.Parameter(torch.from_numpy(numbers), requires_grad=False))


#: What both passes use, whatever the text.
USED = {
    "embedding of one token": ("embed_tokens.weight", 7),
    "embedding of the last token": ("embed_tokens.weight", -1),
    "last norm": ("norm.weight", 3),
    "keys": ("layers.0.self_attn.k_proj.weight", 5),
    "queries": ("layers.1.self_attn.q_proj.weight", 5),
    "values": ("layers.0.self_attn.v_proj.weight", 0),
    "MLP": ("layers.1.mlp.down_proj.weight", 9),
    "router": ("layers.0.router.proj.weight", 2),
    "all experts": ("layers.0.experts.down_proj.weight", slice(None, None, 64)),
}


@pytest.mark.parametrize("where", USED)
def test_a_nan_in_the_weights_never_becomes_a_text(where: str, model: DiffusionGemma) -> None:
    path, place = USED[where]
    poison(model.backend, path, place=place)
    uses: dict[str, Callable[[], object]] = {
        "diffusion": lambda: model.generate("Why?", seed=0),
        "greedy": lambda: model.generate("Why?", seed=0, greedy=True),
        "all given": lambda: model.generate("Why?", seed=0, frozen=np.array([5, -1], np.int32), max_new_tokens=2),
        "causal": lambda: model.generate("Why?", seed=0, mode="causal"),
        "causal greedy": lambda: model.generate("Why?", seed=0, mode="causal", greedy=True),
        "score": lambda: model.score("The sky is blue."),
        "score raw": lambda: model.score("The sky is blue.", raw=True),
        "infill": lambda: infill(model, "The <hole:2> is", seed=0),
        "revise": lambda: revise(model, "The sky is blue.", 0.5, seed=0),
        "proofread": lambda: proofread(model, "The sky is blue."),
        "conversation": lambda: list(Conversation(model).send("Why?", seed=0)),
    }
    for name, use in uses.items():
        print(name)
        with pytest.raises(ComputationError, match=LINE):
            use()


def test_a_nan_that_only_the_causal_pass_computes(model: DiffusionGemma) -> None:
    """Keys of the prompt are then NaN, which every canvas sees. So do log-probabilities of a text that was written before."""
    result = model.generate("Why?", seed=0, logprobs=True)
    poison(model.backend, "layers.0.encoder_layer_scalar")
    for use in (
        lambda: model.generate("Why?", seed=0),
        lambda: model.score(result.tokens),
        lambda: proofread(model, "The sky is blue."),
        lambda: revise(model, "The sky is blue.", 1, seed=0),
    ):
        with pytest.raises(ComputationError, match=LINE):
            use()


def test_a_huge_number_that_overflows(model: DiffusionGemma) -> None:
    poison(model.backend, "layers.0.mlp.up_proj.weight", value=3e38, place=slice(None))
    poison(model.backend, "layers.0.mlp.gate_proj.weight", value=3e38, place=slice(None))
    with pytest.raises(ComputationError, match=LINE):
        model.generate("Why?", seed=0)


def test_the_other_rows_of_a_pass_go_on(folder: Path, backend_name: str) -> None:
    backend = load_backend(Checkpoint.open(folder), backend_name)
    caches = [backend.new_cache() for _ in range(3)]
    for cache, start in zip(caches, (3, 40, 70), strict=True):
        backend.encode([Piece(np.arange(start, start + 20, dtype=np.int32), cache)])
    rows = [Row(np.arange(8 * n, 8 * n + 8, dtype=np.int32), cache, 1.0) for n, cache in enumerate(caches)]
    rows = [replace(row, self_conditioning=backend.denoise([row])[0].self_conditioning) for row in rows]
    alone = [backend.denoise([row])[0] for row in rows]
    rows[1] = replace(rows[1], self_conditioning=times(rows[1].self_conditioning, float("nan")))
    together = backend.denoise(rows)
    with pytest.raises(ComputationError, match=LINE):
        check_computed(together[1].entropy, "a denoising step")
    for index in (0, 2):
        check_computed(together[index].entropy, "a denoising step")
        assert together[index].argmax.tolist() == alone[index].argmax.tolist()
        assert_close(together[index].entropy, alone[index].entropy, 1e-5, f"entropy of row {index}")
    assert np.isfinite(scored(backend, Piece(np.array([4, 5], np.int32), caches[0]))).all()


def poisonous(asked: Asked) -> Any:
    """The canvas unchanged, and NaN in the third step of the text whose first token is 2."""
    entropy = np.zeros(len(asked.canvas), np.float32)
    if asked.canvas[0] == 2 and asked.step == 3:
        entropy[-1] = NAN
    return full(asked.canvas, entropy, width=len(asked.canvas))


def test_the_other_requests_of_an_engine_go_on(bench: Callable[..., Bench]) -> None:
    made = bench(parallel=3)
    made.backend.script = poisonous
    config = GenerationConfig(max_denoising_steps=5, stability_threshold=5, max_new_tokens=L)

    def work(token: int) -> Any:
        text = Text(np.array([token], np.int32), frozen=np.array([token, -1], np.int32))
        return block_diffusion(made.engine.model.backend, text, config)

    inboxes = [Inbox() for _ in range(4)]
    for token, inbox in enumerate(inboxes):
        made.engine.submit(lambda token=token: work(token), inbox, client="a")
    made.engine.start()
    errors = [inbox.error for inbox in inboxes]
    assert [type(error) for error in errors] == [type(None), type(None), ComputationError, type(None)]
    assert [len(inbox.events) for inbox in inboxes] == [7, 7, 3, 7], "five drafts, a block and the end, or two drafts and the end"
    assert not any(isinstance(event, Block) for event in inboxes[2].events)


@pytest.mark.parametrize("bad", [[NAN, 0], [0, NAN], [INF, NAN], [INF, 0], [-INF, -INF]])
def test_what_is_no_number(bad: list[float]) -> None:
    with pytest.raises(ComputationError, match=LINE):
        check_computed(np.array(bad, np.float32), "a pass")


@pytest.mark.parametrize("good", [[], [0], [-INF, 0], [3, -INF, 1e38]])
def test_what_a_mask_makes_is_legitimate(good: list[float]) -> None:
    check_computed(np.array(good, np.float32), "a pass")


class Logits(FakeBackend):
    """A fake whose next logits are given."""

    def __init__(self, logits: NDArray[np.float32]) -> None:
        super().__init__()
        self.given = logits

    def next_logits(self, caches: Any) -> NDArray[np.float32]:
        return self.given[None]


def test_logits_of_the_causal_mode() -> None:
    logits = np.full(50, -INF)
    logits[7] = 0
    text = Text(np.array([3], np.int32))
    for options in ({"greedy": True}, {}, {"top_k": 3, "top_p": 0.5}):
        config = CausalConfig(max_new_tokens=3, **options)
        assert [token.token for token in causal(Logits(logits), text, config)] == [7, 7, 7]
        for bad in (NAN, INF):
            changed = logits.copy()
            changed[30] = bad
            with pytest.raises(ComputationError, match=LINE):
                list(causal(Logits(changed), text, config))


def test_a_text_begins_with_a_token_that_has_no_probability() -> None:
    backend = FakeBackend(causal=lambda tokens: np.where(np.arange(len(tokens)) == 0, NAN, -1))
    assert np.isnan(scored(backend, Piece(np.array([4], np.int32), backend.new_cache()))[0])
    cache = backend.new_cache()
    assert scored(backend, Piece(np.array([4, 5, 6], np.int32), cache))[1:].tolist() == [-1, -1]
    with pytest.raises(ComputationError, match="NaN in the causal pass"):
        scored(backend, Piece(np.array([7], np.int32), cache))


def test_nothing_of_it_stays_in_the_prefix_cache(model: DiffusionGemma, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device computes NaN for a while. Then the same prompt gives what a new conversation gives."""
    kept, options = PrefixCache(), {"seed": 1, "max_new_tokens": 8}
    conversation = Conversation(model, kept=kept)
    before = list(conversation.send("Hi", seed=0, max_new_tokens=8))[-1]
    messages, places = [*conversation.messages], len(kept)
    backend: Any = model.backend
    sound = backend.model
    broken = load(model.checkpoint.folder, backend=backend.name)
    poison(broken.backend, "layers.0.encoder_layer_scalar")
    backend.model = broken.backend.model  # type: ignore[attr-defined]
    with pytest.raises(ComputationError, match=LINE):
        list(conversation.send("Why?", **options))
    assert conversation.messages == messages, "the turn is removed"
    prompt = model.tokenizer.chat([*messages, {"role": "user", "content": "Why?"}])
    ids = np.array(prompt, np.int32)
    assert kept.take(hashes(PromptTokens(ids), model.piece_rule.boundaries(ids))) is None
    assert len(kept) <= places
    backend.model = sound
    after = list(conversation.send("Why?", **options))[-1]
    other = Conversation(model)
    assert list(other.send("Hi", seed=0, max_new_tokens=8))[-1].tokens == before.tokens  # type: ignore[union-attr]
    assert list(other.send("Why?", **options))[-1].tokens == after.tokens  # type: ignore[union-attr]


@pytest.mark.parametrize("command", [["generate", "Hi"], ["infill", "a <hole:2>"], ["revise", "Hi there", "--strength", "1"]])
def test_on_the_command_line_it_is_one_line(
    command: list[str], folder: Path, backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = load(folder, backend=backend_name)
    poison(broken.backend, "norm.weight")
    monkeypatch.setattr("mlx_diffgemma.pipeline.load_backend", lambda *_, **__: broken.backend)
    name, *rest = command
    result = CliRunner().invoke(main, [name, str(folder), *rest, "--backend", backend_name])
    assert result.exit_code == 2, result.exception
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "mlx-diffgemma: error: the model computed NaN in " in result.stderr
