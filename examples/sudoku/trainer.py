"""The training loop of a tiny model: any language that makes batches and says how well it is known.

``OUT/curve.jsonl`` grows as it trains; ``OUT/checkpoint`` is a whole checkpoint, renewed at every evaluation; ``OUT/state.pt``
holds what ``--resume`` needs. Whatever is random in step s is drawn from a generator of (seed, s): a run that was resumed
gives the curve of one that was not.
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
from architecture import new_model, parameter_groups, write_checkpoint
from objective import Batch, losses

from mlx_diffgemma.backends import Backend
from mlx_diffgemma.backends.torch.backend import TorchBackend
from mlx_diffgemma.backends.torch.model import TextModel
from mlx_diffgemma.config import GenerationConfig, ModelConfig
from mlx_diffgemma.errors import InputError


@dataclass(frozen=True)
class RunOptions:
    """What a run depends on, whatever the language; two runs with the same options give the same curve on one machine."""

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
        """Linear warmup, then half a cosine down to zero; ``step`` from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        return self.learning_rate * (0.5 + 0.5 * math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))


class BaseTrainer(ABC):
    """A run: the model, its optimizer, and how far it is. A subclass names its language; it is made of its options alone.

    Attributes:
        options_type: the class of its options.
        metric: the curve's name of what :meth:`evaluate` returns.
        generation: what goes into generation_config.json.
        step: steps taken.
        seconds: wall time spent training, over all resumptions.
    """

    options_type: ClassVar[type[RunOptions]]
    metric: ClassVar[str]

    def __init__(self, options: RunOptions, raw_config: dict[str, Any], generation: Mapping[str, Any]) -> None:
        self.options, self.raw_config = options, raw_config
        self.generation = {**generation, "max_new_tokens": raw_config["canvas_length"]}
        self.model = new_model(ModelConfig.from_dict(raw_config), options.seed).to(options.device)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, options.weight_decay), betas=(0.9, 0.98), fused=True)
        self.step, self.seconds = 0, 0.0

    @abstractmethod
    def make_batch(self, rng: np.random.Generator) -> Batch:
        """What one step trains on."""

    @abstractmethod
    def evaluate(self, backend: Backend, config: GenerationConfig) -> float:
        """How well the model knows held-out data now."""

    @abstractmethod
    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files into ``folder``, which exists."""

    def train_step(self) -> tuple[float, float]:
        """One step of gradient descent; its diffusion and its causal loss."""
        batch = self.make_batch(np.random.default_rng([self.options.seed, self.step]))
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate_at(self.step)
        both = losses(self.model, batch)
        (both.diffusion + both.causal).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return both.diffusion.item(), both.causal.item()

    def run(self) -> Iterator[dict[str, float]]:
        """Train to the end; yields the lines of the curve. Mean losses are those since the line before."""
        options, recent, started = self.options, [], time.perf_counter() - self.seconds
        while self.step < options.steps:
            recent.append(self.train_step())
            last = self.step == options.steps
            if self.step % options.log_every and not last:
                continue
            diffusion, causal = np.mean(recent, axis=0)
            line = {"step": self.step, "diffusion_loss": float(diffusion), "causal_loss": float(causal)}
            if self.step % options.evaluate_every == 0 or last:
                backend = TorchBackend(self.model, torch.device(options.device), "float32")
                line[self.metric] = self.evaluate(backend, GenerationConfig.from_dict(self.generation))
            recent, self.seconds = [], time.perf_counter() - started
            yield {**line, "seconds": round(self.seconds, 1)}

    def save(self, folder: Path) -> None:
        """Write ``state.pt`` and ``checkpoint`` into ``folder``."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "options": asdict(self.options),
        }
        unfinished = folder / "state.pt.unfinished"
        torch.save(state, unfinished)
        os.replace(unfinished, folder / "state.pt")
        write_checkpoint(folder / "checkpoint", self.model, self.raw_config, self.generation)
        self.write_tokenizer(folder / "checkpoint")

    @classmethod
    def resumed(cls, folder: Path) -> Self:
        """As :meth:`save` left it; the options are those it began with."""
        state = torch.load(folder / "state.pt", weights_only=True)
        trainer = cls(cls.options_type(**state["options"]))  # type: ignore[call-arg,arg-type]
        trainer.model.load_state_dict(state["model"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.step, trainer.seconds = state["step"], state["seconds"]
        return trainer


def train(folder: Path, trainer: BaseTrainer) -> TextModel:
    """Run to the end. Lines of the curve that lie after the trainer's step, of a run that was cut off, are written anew."""
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
    """The folder to write into, and the trainer, new or resumed: a script's command line has every field of its options."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pt, with the options it began with")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; so small a model gains little from more")
    for name, default in asdict(kind.options_type()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    arguments = vars(parser.parse_args())
    folder, resume = arguments.pop("out"), arguments.pop("resume")
    torch.set_num_threads(arguments.pop("threads"))
    return folder, kind.resumed(folder) if resume else kind(kind.options_type(**arguments))  # type: ignore[call-arg,arg-type]
