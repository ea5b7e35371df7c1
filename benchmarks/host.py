"""Times what the host does between two denoising steps, at the released model's sizes: canvas 256, vocabulary 262,144.

    python benchmarks/host.py [--before FILE] [--json FILE]

The backend is a fake one. It returns results that were made before, so it costs nothing. A canvas settles from its front to its
end in 8 steps. The texts have 65 blocks (16,640 tokens): paragraphs, one line without a break, and a call of a tool with one long
string. They are written as in a chat: with the settled rule, the markup parser and the live view on a terminal of 100 x 40. Times
are in milliseconds: the median over the steps of one block in three rounds, or over the calls of a function.

The prefetch is measured on a device that takes 10 ms for a step, with a caller that takes 5 ms for its events.

``--before`` names an earlier result, which is shown beside the new one.
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import date
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from mlx_diffgemma import noise
from mlx_diffgemma.backends import Denoised, Piece, Row, check_rows, check_tokens
from mlx_diffgemma.backends.stream import Canvases, answers
from mlx_diffgemma.chat.markup import ReplyParser
from mlx_diffgemma.cli.chat import LiveReply
from mlx_diffgemma.config import FULL, GenerationConfig, LayerConfig, ModelConfig, RopeConfig
from mlx_diffgemma.prefix_cache import Context
from mlx_diffgemma.reports.speed import Machine
from mlx_diffgemma.sampler import Block, Canvas, Draft, Rules, Text, accept, block_diffusion, decide
from mlx_diffgemma.settling import Settled
from mlx_diffgemma.tokenizer import Tokenizer
from mlx_diffgemma.writing import Generation, Writing, write

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.tiny_tokenizer import write_tokenizer

L, V = 256, 262_144
BLOCKS, STEPS, ROUNDS, CALLS = 65, 8, 3, 500
SHOWN = (1, 8, 64)  # the blocks whose times are shown, from 1
MODEL = ModelConfig(
    vocab_size=V, hidden_size=8, intermediate_size=8, moe_intermediate_size=8, num_attention_heads=1, num_experts=1,
    top_k_experts=1, rms_norm_eps=1e-6, final_logit_softcapping=30.0, sliding_window=1024, max_position_embeddings=V,
    canvas_length=L, layers=(LayerConfig(FULL, 8, 1, RopeConfig("default", 1e4)),),
)  # fmt: skip
CONFIG = GenerationConfig(
    max_new_tokens=L * BLOCKS, max_denoising_steps=STEPS, eos_token_ids=(1,), confidence_threshold=1e-9, stability_threshold=1
)
SENTENCE = "Diffusion writes a whole canvas of tokens at once, naïve or not, and then denoises it until it holds still; {}. "


class FakeCache(list[int]):
    """The tokens that a cache would hold."""


@dataclass
class FakeBackend:
    """Returns results that were made before, one after the other. ``seconds``: what a step takes on the device."""

    made: Iterable[Denoised]
    seconds: float = 0.0
    config: ModelConfig = MODEL
    exact_rows: bool = True

    def __post_init__(self) -> None:
        self.made = iter(self.made)

    def new_cache(self) -> FakeCache:
        return FakeCache([2])

    def encode(self, pieces: list[Piece]) -> None:
        pass

    def launch(self, rows: list[Row]) -> Callable[[], list[Denoised]]:
        end = time.perf_counter() + self.seconds

        def wait() -> list[Denoised]:
            spin(end)
            return list(islice(self.made, len(rows)))

        return wait

    def denoise(self, rows: list[Row]) -> list[Denoised]:
        return self.launch(rows)()


def texts(tokenizer: Tokenizer) -> dict[str, NDArray[np.int32]]:
    """The tokens of each text, int32 [L * BLOCKS]."""
    sentences = [SENTENCE.format(number) for number in range(L * BLOCKS // 20)]
    line = "".join(sentences)
    paragraphs = "\n\n".join("".join(sentences[start : start + 5]) for start in range(0, len(sentences), 5))
    written = {"paragraphs": paragraphs, "one line": line, "a call": f'<|tool_call>call:write{{text:<|"|>{paragraphs}'}
    return {name: np.array(tokenizer.encode(text, markup=True)[: L * BLOCKS], np.int32) for name, text in written.items()}


def results(tokens: NDArray[np.int32]) -> list[Denoised]:
    """The results of all steps of a text. In each step, an eighth more of the canvas has its last token and a low entropy."""
    rng, made = np.random.default_rng(0), []
    for block in tokens.reshape(-1, L):
        for step in range(1, STEPS + 1):
            known = np.arange(L) < L * step // STEPS
            argmax = np.where(known, block, rng.integers(300, 800, L)).astype(np.int32)
            entropy = np.where(known, rng.random(L) / 1000, 1 + 2 * rng.random(L)).astype(np.float32)
            made.append(Denoised(argmax, argmax, entropy, None))
    return made


def sampler_times(made: list[Denoised]) -> dict[str, float]:
    """Milliseconds of each part of a step in the sampler, and of a whole one."""
    rules, cache = Rules(CONFIG, L, V), FakeCache([2])
    canvas = replace(Canvas.begin(Text(np.array([2], np.int32)), 0, rules), step=3, history=(made[2].argmax,))
    answer, free = made[3], np.ones(L, bool)
    row = canvas.row(cache, rules)
    signals = [np.zeros((L, 8), np.float32)]

    def backend_arrays() -> None:
        check_rows([row], MODEL)
        check_tokens(row.canvas, MODEL)
        Canvases.of([row])
        answers([answer.argmax, answer.sampled, answer.entropy], signals)

    parts: dict[str, Callable[[], Any]] = {
        "accept": lambda: accept(answer.entropy, free, 0.1),
        "fresh noise": lambda: noise.canvas_tokens(7, 3, 4, L, V),
        "decide (with accept and noise)": lambda: decide(canvas, answer, rules),
        "the next row": lambda: canvas.row(cache, rules),
        "a backend's arrays in NumPy": backend_arrays,
    }
    times = {name: median_of(call) for name, call in parts.items()}
    times["a whole step of the sampler, its Draft included"] = step_time(made, 0.0, 0.0, blocks=BLOCKS)
    times["a step of 10 ms, with 5 ms for its events"] = step_time(made, 0.01, 0.005, blocks=8)
    return times


def step_time(made: list[Denoised], device: float, caller: float, blocks: int) -> float:
    """The median of the steps in milliseconds, if a pass takes ``device`` seconds and the caller ``caller`` for its events."""
    config = CONFIG.replace(max_new_tokens=L * blocks)
    started, times = time.perf_counter(), []
    for event in block_diffusion(FakeBackend(cycle(made), device), Text(np.array([2], np.int32)), config):
        if isinstance(event, Draft):
            spin(time.perf_counter() + caller)
            times.append(time.perf_counter() - started)
            started = time.perf_counter()
    return 1e3 * statistics.median(times)


def spin(end: float) -> None:
    """Wait until ``end``. A short sleep is not exact everywhere."""
    while time.perf_counter() < end:
        pass


def median_of(call: Callable[[], Any]) -> float:
    """The median of many calls in milliseconds."""
    times = []
    for _ in range(CALLS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def stream_times(tokenizer: Tokenizer, made: list[Denoised]) -> dict[str, list[float]]:
    """Milliseconds of each part of writing a text, in each of the SHOWN blocks."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        follow(tokenizer, made, found)
    names = ("a step", "a block's end", "live view, a step", "live view, a block's end")
    return {name: [statistics.median(found[name, block]) for block in SHOWN] for name in names}


def follow(tokenizer: Tokenizer, made: list[Denoised], found: dict[tuple[str, int], list[float]]) -> None:
    """Write a text and show it, and add the milliseconds of each step and each block's end to ``found``."""
    context = Context(np.array([2], np.int32), FakeCache([2]), ())
    writing = Writing(CONFIG, 0, settled=Settled(1))
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=40, color_system="256", _environ={})
    block, kind = 0, "a block's end"
    with LiveReply(console, tokenizer.utf8, CONFIG.max_new_tokens) as view:
        started = time.perf_counter()
        for event in write(FakeBackend(made), tokenizer, context, writing, reader=ReplyParser):
            worked = 1e3 * (time.perf_counter() - started)
            if isinstance(event, Generation):
                break
            begins = isinstance(event, Draft) and event.step == 1
            if begins and block:  # most of it is what was left of the block before
                found[kind, block][-1] += worked
            if isinstance(event, Draft | Block):
                block = (event.block if isinstance(event, Draft) else event.index) + 1
                kind = "a block's end" if isinstance(event, Block) else "the first step" if begins else "a step"
                for name in (kind, f"live view, {kind}"):
                    found[name, block].append(0.0)
            found[kind, block][-1] += 0.0 if begins else worked  # the text that a step makes certain comes after its Draft
            started = time.perf_counter()
            if block in SHOWN or not isinstance(event, Draft):
                view(event)
            found[f"live view, {kind}", block][-1] += 1e3 * (time.perf_counter() - started)
            started = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="an earlier result, to show beside this one")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), V)
        tokenizer = Tokenizer.from_folder(Path(folder))
    made = {name: results(tokens) for name, tokens in texts(tokenizer).items()}
    times: dict[str, Any] = {"sampler": sampler_times(made["paragraphs"])}
    times |= {name: stream_times(tokenizer, each) for name, each in made.items()}
    before = json.loads(arguments.before.read_text())["milliseconds"] if arguments.before else {}
    for part, figures in times.items():
        print(f"\n{part}" + ("" if part == "sampler" else f", in blocks {', '.join(map(str, SHOWN))}"))
        for name, figure in figures.items():
            earlier = shown(before[part][name]) + "  ->" if before else ""
            print(f"  {name:48} {earlier:>32} {shown(figure):>28}")
    if arguments.json:
        result = {
            "command": "python benchmarks/host.py",
            "date": date.today().isoformat(),
            "machine": vars(Machine.this()),
            "milliseconds": times,
        }
        if before:
            result["milliseconds_before"] = before
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def shown(figure: float | list[float]) -> str:
    return "  ".join(f"{each:8.3f}" for each in (figure if isinstance(figure, list) else [figure]))


if __name__ == "__main__":
    main()
