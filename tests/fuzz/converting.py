"""Interruptions of ``convert``: it is killed, or fails, and its unfinished work is damaged before it goes on.

Whatever happened, a conversion ends in one of two ways: with the bytes of an uninterrupted one, or with one line that says why
not, and without a target.
"""

import errno
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from fuzz.attempts import Attempt, Outcome, Runner, Sabotage, runner

_OPTIONS = ("--shard-size", "60000")
#: The operations on files in one run.
_OPERATIONS = 150

Bytes = dict[str, bytes]


class Wrong(Exception):
    """A conversion ended in a way in which it must not."""


def run(seed: int, count: int | None, seconds: float) -> "Counter[str]":
    """Run ``count`` cases (None: as many as ``seconds`` allow), each with one to three interruptions. Print the failures.

    Returns counts: cases, interruptions, failures, and how attempts ended.
    """
    counts: Counter[str] = Counter(cases=0, interruptions=0, failures=0)
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder, runner(Path(folder)) as running:
        sources = _Sources.make(Path(folder), running)
        while (count is None or counts["cases"] < count) and time.monotonic() < deadline:
            case = _Case(Path(folder) / "case", sources, running, Random(f"{seed} {counts['cases']}"), counts)
            try:
                case.run()
            except Wrong as wrong:
                counts["failures"] += 1
                story = "".join(f"\n  {event}" for event in case.story)
                print(f"converting: seed {seed}, case {counts['cases']}: {wrong}{story}", file=sys.stderr)
            finally:
                shutil.rmtree(case.folder, ignore_errors=True)
            counts["cases"] += 1
    return counts


@dataclass(frozen=True)
class _Sources:
    """A checkpoint, and one of other weights under the same name.

    Attributes:
        folder: the checkpoint.
        weights: the weight files of both.
        expected: for both, the files of an uninterrupted conversion.
        seconds: how long that takes.
    """

    folder: Path
    weights: tuple[Path, Path]
    expected: tuple[Bytes, Bytes]
    seconds: float

    @classmethod
    def make(cls, folder: Path, running: Runner) -> "_Sources":
        from support.converting import contents, make_source

        source = make_source(folder / "source")
        weights = folder / "source" / "model.safetensors", folder / "other.safetensors"
        numbers = bytearray(weights[0].read_bytes())
        for place in range(8 + int.from_bytes(numbers[:8], "little"), len(numbers), 2):  # the last bit of each number
            numbers[place] ^= 1
        weights[1].write_bytes(numbers)
        made: list[Bytes] = []
        for index, file in enumerate(weights):
            copy = Path(shutil.copytree(source, folder / f"made{index}" / "source"))
            shutil.copyfile(file, copy / "model.safetensors")
            [outcome] = running.run(Attempt(("convert", str(copy), str(copy.with_name("out")), *_OPTIONS)))
            if outcome.status:
                raise Wrong(f"an uninterrupted conversion fails: {outcome}")
            made.append(contents(copy.with_name("out")))
        assert made[0] != made[1]
        return cls(source, weights, (made[0], made[1]), outcome.seconds)


@dataclass
class _Case:
    """One conversion with its interruptions.

    Attributes:
        folder: an empty folder, for the source and the target.
        story: what was done, for the report of a failure.
        versions: which of the two sources the source was at any time during the present attempt.
    """

    folder: Path
    sources: _Sources
    running: Runner
    random: Random
    counts: "Counter[str]"
    story: list[str] = field(default_factory=list)
    versions: set[int] = field(default_factory=lambda: {0})

    def __post_init__(self) -> None:
        self.source, self.target, self.partial = (self.folder / name for name in ("source", "out", "out.partial"))
        self.model, self.record = self.partial / "model", self.partial / "record.json"
        shutil.copytree(self.sources.folder, self.source)

    def run(self) -> None:
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            self.counts["interruptions"] += 1
            self.attempt(self.interruption())
            if self.target.exists():
                self.counts["complete"] += 1
                return
            if self.random.random() < 0.6:
                self.damage()
        outcomes = self.attempt(*[Sabotage()] * self.random.choice((1,) * 9 + (2,)))
        if not self.target.exists():
            self.after_refusal([outcome.stderr for outcome in outcomes])
        else:
            self.counts["resumed"] += 1
        if not self.target.exists():
            raise Wrong("there is no target in the end")

    def attempt(self, *sabotages: Sabotage, restart: bool = False) -> list[Outcome]:
        """Run the command, at the same time for each sabotage, and check how it ends."""
        from support.converting import contents

        arguments = ("convert", str(self.source), str(self.target), *_OPTIONS, *(["--restart"] if restart else []))
        outcomes = self.running.run(*[Attempt(arguments, str(self.target), sabotage) for sabotage in sabotages])
        for sabotage, outcome in zip(sabotages, outcomes, strict=True):
            self.story.append(f"{'--restart ' * restart}{sabotage} -> {outcome.status} {outcome.stderr.strip()!r}")
            self.counts[f"exit {outcome.status}"] += 1
            _check_end(sabotage, outcome)
            if outcome.status == 0 and not (self.target.exists() and not self.partial.exists()):
                raise Wrong("it succeeded without a target, or left its unfinished work")
        if self.target.exists() and contents(self.target) not in [self.sources.expected[index] for index in self.versions]:
            raise Wrong("the target has other bytes")
        weights = (self.source / "model.safetensors").read_bytes()
        self.versions = {index for index, file in enumerate(self.sources.weights) if file.read_bytes() == weights}
        return outcomes

    def interruption(self) -> Sabotage:
        """A random way to interrupt a run."""
        moment = self.random.uniform(0, self.sources.seconds)
        number = self.random.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        operation = self.random.randint(1, _OPERATIONS)
        kind = self.random.random()
        if kind < 0.4:
            return Sabotage(after=moment, signal=number)
        if kind < 0.6:
            return Sabotage(operation=operation, signal=number)
        if kind < 0.9:
            return Sabotage(operation=operation, error=self.random.choice((errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES)))
        self.versions.add(1)
        return Sabotage(after=moment, replace=(str(self.source / "model.safetensors"), str(self.sources.weights[1])))

    def damage(self) -> None:
        """Change the unfinished work, or the source."""
        kind = self.random.choice(_DAMAGES)
        self.story.append(kind.__name__)
        self.counts["damages"] += 1
        kind(self)

    def after_refusal(self, errors: list[str]) -> None:
        """Do what the errors say, after which the conversion must succeed."""
        self.counts["refused"] += 1
        if any("discard it with --restart" in error for error in errors):
            outcomes = self.attempt(Sabotage(), restart=True)
        elif any("move it away" in error for error in errors):
            self.partial.unlink() if self.partial.is_file() else shutil.rmtree(self.partial)
            outcomes = self.attempt(Sabotage())
        else:
            raise Wrong("it failed for no reason")
        if outcomes[0].status:
            raise Wrong("it failed again")

    # --- damages ---

    def file(self, pattern: str) -> Path | None:
        """A random file of the unfinished work."""
        files = [file for file in sorted(self.partial.rglob(pattern)) if file.is_file() and file.stat().st_size]
        return self.random.choice(files) if files else None

    def flipped_shard(self) -> None:
        self._flip("*.safetensors")

    def flipped_record(self) -> None:
        self._flip("record.json")

    def flipped_leftover(self) -> None:
        self._flip("*.unfinished")

    def _flip(self, pattern: str) -> None:
        if file := self.file(pattern):
            content = bytearray(file.read_bytes())
            content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
            file.write_bytes(content)

    def cut(self) -> None:
        if file := self.file("*"):
            os.truncate(file, self.random.randrange(file.stat().st_size))

    def longer(self) -> None:
        if file := self.file("*"):
            with file.open("ab") as opened:
                opened.write(self.random.randbytes(self.random.randint(1, 100)))

    def removed(self) -> None:
        if file := self.file("*"):
            file.unlink()

    def swapped(self) -> None:
        if (one := self.file("*.safetensors")) and (other := self.file("*.safetensors")):
            contents = one.read_bytes(), other.read_bytes()
            one.write_bytes(contents[1])
            other.write_bytes(contents[0])

    def other_record(self) -> None:
        """A shard of other weights, with a record that claims it."""
        if (file := self.file("*.safetensors")) and self.file("record.json"):
            file.write_bytes(self.sources.expected[1].get(file.name, b""))

    def stray(self) -> None:
        """Files of other names, which must not reach the target."""
        if self.model.is_dir():
            for name in ("model-00099-of-00099.safetensors", "tokenizer.json", "note"):
                (self.model / name).write_bytes(b"stray")
            (self.model / "folder").mkdir(exist_ok=True)

    def no_model(self) -> None:
        shutil.rmtree(self.model, ignore_errors=True)

    def link(self) -> None:
        if file := self.file("*.safetensors"):
            elsewhere = self.folder / f"elsewhere-{len(self.story)}"
            file.rename(elsewhere)
            file.symlink_to(elsewhere)

    def other_source(self) -> None:
        shutil.copyfile(self.sources.weights[1], self.source / "model.safetensors")
        self.versions = {1}

    def touched_source(self) -> None:
        os.utime(self.source / "model.safetensors")


_DAMAGES: tuple[Callable[[_Case], None], ...] = (
    *(_Case.flipped_shard, _Case.flipped_record, _Case.flipped_leftover, _Case.cut, _Case.longer, _Case.removed, _Case.swapped),
    *(_Case.other_record, _Case.stray, _Case.no_model, _Case.link, _Case.other_source, _Case.touched_source),
)


def _check_end(sabotage: Sabotage, outcome: Outcome) -> None:
    """Raise Wrong unless an attempt ended in success, with one line, or by the signal that it got."""
    lines = [line for line in outcome.stderr.splitlines() if line and not line.startswith("shard ")]
    if outcome.status == 0:
        return
    if outcome.status == 2 and len(lines) == 1 and lines[0].startswith("mlx-diffgemma: error: "):
        return
    signalled = sabotage.error == 0 and (sabotage.after is not None or sabotage.operation) and sabotage.replace is None
    if signalled and outcome.status == -sabotage.signal:
        return
    if signalled and sabotage.signal == signal.SIGINT and outcome.status in (1, 130) and "Traceback" not in outcome.stderr:
        return
    raise Wrong(f"it ended with status {outcome.status} and {outcome.stderr!r}")
