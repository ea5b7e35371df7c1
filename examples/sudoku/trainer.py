"""The training loop of a tiny model. A language plugs in as a subclass that makes batches and measures the model.

``OUT/curve.jsonl`` gets a line at every log step. ``OUT/checkpoint`` is a complete checkpoint, rewritten at every evaluation.
``OUT/state.pt`` holds the state for ``--resume``. All random numbers of step s come from a generator seeded with (seed, s), so a
resumed run gives the same curve as an uninterrupted one.
"""

import argparse
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from architecture import new_model, new_vision, parameter_groups, write_checkpoint
from objective import Batch, losses
from torch import nn

from mlx_diffgemma.backends import Backend
from mlx_diffgemma.backends.torch.backend import TorchBackend
from mlx_diffgemma.backends.torch.model import TextModel
from mlx_diffgemma.config import GenerationConfig, ModelConfig
from mlx_diffgemma.errors import InputError


@dataclass(frozen=True)
class RunOptions:
    """The options of a run in any language. On one machine, the same options give the same curve."""

    steps: int = 6000
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.01
    seed: int = 0
    device: str = "cpu"
    log_every: int = 50
    evaluate_every: int = 500
    held_out: int = 100

    def __post_init__(self) -> None:
        if self.evaluate_every % self.log_every:
            raise InputError(f"evaluate_every {self.evaluate_every} must be a multiple of log_every {self.log_every}")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of ``step`` (from 0): linear warmup, then half a cosine down to zero."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        return self.learning_rate * (0.5 + 0.5 * math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))


class BaseTrainer(ABC):
    """A run: the model, its optimizer and its progress. A subclass defines the language. Its only argument is its options.

    Attributes:
        options_type: class of the options.
        metric: name of the result of :meth:`evaluate` in the curve.
        reads_images: whether the model has a vision tower, as ``vision_config`` describes it.
        generation: content of generation_config.json.
        pace: numbers that a subclass changes in :meth:`follow`. They are part of the curve and of the saved state.
        step: number of steps done.
        seconds: wall time of the training, including the time before it was resumed.
    """

    options_type: ClassVar[type[RunOptions]]
    metric: ClassVar[str]
    reads_images: ClassVar[bool] = False

    def __init__(self, options: RunOptions, raw_config: dict[str, Any], generation: Mapping[str, Any]) -> None:
        self.options, self.raw_config = options, raw_config
        self.generation = {**generation, "max_new_tokens": raw_config["canvas_length"]}
        config = ModelConfig.from_dict(raw_config)
        self.model = new_model(config, options.seed).to(options.device)
        self.vision = new_vision(config, options.seed).to(options.device) if self.reads_images else None
        self.parts: list[nn.Module] = [self.model] if self.vision is None else [self.model, self.vision]
        self.parameters = [weight for part in self.parts for weight in part.parameters()]
        self.optimizer = torch.optim.AdamW(parameter_groups(self.parameters, options.weight_decay), betas=(0.9, 0.98), fused=True)
        self.step, self.seconds = 0, 0.0
        self.pace: dict[str, float] = {}

    @abstractmethod
    def make_batch(self, rng: np.random.Generator) -> Batch:
        """A new batch for one step."""

    @abstractmethod
    def evaluate(self, backend: Backend, config: GenerationConfig) -> float:
        """The current quality of the model on held-out data, 0 to 1."""

    @abstractmethod
    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files into the existing ``folder``."""

    def follow(self, diffusion: float, causal: float) -> None:  # noqa: B027 (few curricula depend on anything)
        """Take note of the losses of a step. A curriculum can depend on them."""

    def train_step(self) -> tuple[float, float]:
        """Do one step of gradient descent. Returns its diffusion loss and its causal loss."""
        batch = self.make_batch(np.random.default_rng([self.options.seed, self.step]))
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate_at(self.step)
        both = losses(self.model, batch, self.vision)
        (both.diffusion + both.causal).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        diffusion, causal = both.diffusion.item(), both.causal.item()
        self.follow(diffusion, causal)
        return diffusion, causal

    def run(self) -> Iterator[dict[str, float]]:
        """Train to the end. Yields the lines of the curve; losses are means over the steps since the line before."""
        options, recent, started = self.options, [], time.perf_counter() - self.seconds
        while self.step < options.steps:
            recent.append(self.train_step())
            last = self.step == options.steps
            if self.step % options.log_every and not last:
                continue
            diffusion, causal = np.mean(recent, axis=0)
            line = {"step": self.step, "diffusion_loss": float(diffusion), "causal_loss": float(causal), **self.pace}
            if self.step % options.evaluate_every == 0 or last:
                backend = TorchBackend(self.model, self.vision, torch.device(options.device), "float32")
                line[self.metric] = self.evaluate(backend, GenerationConfig.from_dict(self.generation))
            recent, self.seconds = [], time.perf_counter() - started
            yield {**line, "seconds": round(self.seconds, 1)}

    def save(self, folder: Path) -> None:
        """Write ``state.pt`` and ``checkpoint`` into ``folder``."""
        state = {
            "model": {name: weight for part in self.parts for name, weight in part.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "pace": self.pace,
            "seconds": self.seconds,
            "options": asdict(self.options),
        }
        unfinished = folder / "state.pt.unfinished"
        torch.save(state, unfinished)
        os.replace(unfinished, folder / "state.pt")
        write_checkpoint(folder / "checkpoint", self.parts, self.raw_config, self.generation)
        self.write_tokenizer(folder / "checkpoint")

    @classmethod
    def resumed(cls, folder: Path) -> Self:
        """The trainer that :meth:`save` wrote, with its original options."""
        state = torch.load(folder / "state.pt", weights_only=True)
        trainer = cls(cls.options_type(**state["options"]))  # type: ignore[call-arg,arg-type]
        for part in trainer.parts:
            part.load_state_dict({name: state["model"][name] for name in part.state_dict()})
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.step, trainer.seconds, trainer.pace = state["step"], state["seconds"], state["pace"]
        return trainer


def train(folder: Path, trainer: BaseTrainer) -> TextModel:
    """Train to the end. Lines of an interrupted run after the trainer's step are removed from the curve and written again."""
    folder.mkdir(parents=True, exist_ok=True)
    curve = folder / "curve.jsonl"
    before = curve.read_text().splitlines() if curve.exists() and trainer.step else []
    kept = [line for line in before if json.loads(line)["step"] <= trainer.step]
    curve.write_text("".join(f"{line}\n" for line in kept))
    for line in trainer.run():
        with curve.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        if trainer.metric in line:
            trainer.save(folder)
    return trainer.model


def from_command_line(kind: type[BaseTrainer], description: str) -> tuple[Path, BaseTrainer]:
    """The output folder and the trainer, new or resumed. Every field of the options is an option of the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--resume", action="store_true", help="continue from OUT/state.pt with its original options")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; more help little with so small a model (default %(default)s)"
    )
    for name, default in asdict(kind.options_type()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"default {default}")
    arguments = vars(parser.parse_args())
    folder, resume = arguments.pop("out"), arguments.pop("resume")
    torch.set_num_threads(arguments.pop("threads"))
    return folder, kind.resumed(folder) if resume else kind(kind.options_type(**arguments))  # type: ignore[call-arg,arg-type]
