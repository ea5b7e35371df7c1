"""Damaged weight files: each is opened as a user would, and must be refused with one line, or work where that is right."""

import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

from fuzz import damaged_files, damaged_tensors  # noqa: F401 (they register their kinds)
from fuzz.opening import Opened, opener
from fuzz.stored import KINDS, Bases, Harm

#: The longest line of a refusal. Some name many tensors.
_LONGEST = 20_000
#: Every so many cases, MLX opens the checkpoint instead of PyTorch.
_MLX_SHARE = 3


def run(seed: int, count: int | None, seconds: float) -> "Counter[str]":
    """Open ``count`` damaged checkpoints (None: as many as ``seconds`` allow), all different. Print the failures.

    Returns counts: cases, failures, and how they ended: works, refused, CRASH, HANG, wrong success, wrong refusal.
    """
    counts: Counter[str] = Counter(cases=0, failures=0)
    seen: set[str] = set()
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as scratch, opener() as opening:
        bases, case = Bases.make(Path(scratch) / "bases"), Path(scratch) / "case"
        sound = {(base, backend): opening.open(folder, backend) for base, folder in bases for backend in ("torch", "mlx")}
        for place, opened in sound.items():
            assert opened.kind == "works", (place, opened)
        attempt = 0
        while (count is None or counts["cases"] < count) and time.monotonic() < deadline:
            random, kind = Random(f"{seed} {attempt}"), list(KINDS)[attempt % len(KINDS)]
            backend = "mlx" if (attempt // len(KINDS)) % _MLX_SHARE == 0 else "torch"
            attempt += 1
            base, folder = bases.pick(kind, random)
            shutil.copytree(folder, case)
            harm = KINDS[kind](case, random)
            story = f"{backend}, {base}, {kind}: {harm.what}"
            if story not in seen:
                seen.add(story)
                opened = opening.open(case, backend)
                verdict = _judge(opened, harm, sound[base, backend])
                counts["cases"] += 1
                counts[verdict] += 1
                counts[f"by {backend}"] += 1
                if verdict not in ("works", "refused"):
                    counts["failures"] += 1
                    print(f"weights: seed {seed}, {story}: {verdict}: {opened.message[:300]} {opened.tokens}", file=sys.stderr)
            _remove(case)
    return counts


def _judge(opened: Opened, harm: Harm, sound: Opened) -> str:
    if opened.kind == "refused":
        plain = opened.message.isprintable() and len(opened.message) <= _LONGEST
        return "wrong refusal" if harm.expected in ("same", "works") or not plain else "refused"
    if opened.kind == "works":
        changed = opened.tokens != sound.tokens and harm.expected in ("same", "same or refused")
        return "wrong success" if harm.expected == "refused" or changed else "works"
    return opened.kind


def _remove(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_symlink() or not file.is_dir():
            file.unlink()
    shutil.rmtree(folder)
