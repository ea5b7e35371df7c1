"""Arguments and options that more than one command takes."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import click

from mlx_diffgemma.backends import DTYPES, NAMES
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.presets import PRESETS
from mlx_diffgemma.vision.sources import FRAME_TOKENS, FRAMES, MAX_SEEN, Image, Video
from mlx_diffgemma.vision_config import BUDGETS

Function = TypeVar("Function", bound=Callable[..., Any])

#: ``model`` and ``revision``: the arguments of :meth:`mlx_diffgemma.checkpoint.Checkpoint.open`.
_REVISION = click.option("--revision", metavar="NAME", help="Branch, tag or commit of MODEL on the hub.  [default: main]")
_SOURCE = (click.argument("model"), _REVISION)

#: How the prompt is read, and the seed.
_PROMPT = (
    click.option("--system", metavar="TEXT", help="System message to put before the prompt."),
    click.option("--raw", is_flag=True, help="Use the text as it is, without the chat template."),
    click.option("--markup", is_flag=True, help="Read markup such as <|turn> in the text as control tokens, not as plain text."),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**64 - 1),
        metavar="N",
        help="Seed of the random numbers; the same seed gives the same text.  [default: a new one each time]",
    ),
)

#: ``backend``, ``device``, ``dtype`` and ``force``: the arguments of :func:`mlx_diffgemma.backends.load_backend`.
_BACKEND = (
    click.option(
        "--backend",
        type=click.Choice(NAMES),
        help="Framework that runs the model.  [default: mlx on Apple silicon; elsewhere torch if installed, else mlx]",
    ),
    click.option(
        "--device",
        metavar="NAME",
        help="Device to run on: cpu or gpu with mlx, cpu or cuda[:N] with torch.  [default: gpu or cuda if available, else cpu]",
    ),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="Number type for computing and for unquantized weights.  [default: bfloat16 on gpu and cuda, float32 on cpu]",
    ),
    click.option("--force", is_flag=True, help="Load MODEL even if it needs more memory than is free."),
)

#: A preset, and fields of :class:`mlx_diffgemma.config.GenerationConfig`, which checks the values. None when not given.
_DENOISING = (
    click.option(
        "--preset",
        metavar="NAME",
        help=f"Trade quality for fewer denoising steps: {', '.join(PRESETS)}. Options given beside it win.  "
        "[default: exact, which keeps MODEL's own values]",
    ),
    click.option(
        "--max-denoising-steps",
        type=int,
        metavar="N",
        help="Maximum number of denoising steps per canvas.  [default: MODEL's own]",
    ),
    click.option("--t-min", type=float, metavar="T", help="Temperature that the schedule falls towards.  [default: MODEL's own]"),
    click.option("--t-max", type=float, metavar="T", help="Temperature of the first denoising step.  [default: MODEL's own]"),
    click.option(
        "--entropy-bound",
        type=float,
        metavar="NATS",
        help="In each step, accept the surest positions until their entropies add up to this.  [default: MODEL's own]",
    ),
    click.option(
        "--stability-threshold",
        type=int,
        metavar="K",
        help="End a canvas early only if its most likely tokens equal those of the K steps before.  [default: MODEL's own]",
    ),
    click.option(
        "--confidence-threshold",
        type=float,
        metavar="NATS",
        help="End a canvas early only if its mean entropy per token is below this.  [default: MODEL's own]",
    ),
    click.option(
        "--canvas-length",
        type=int,
        metavar="N",
        help="Tokens per canvas, at most MODEL's; a short canvas suits short answers.  [default: MODEL's own]",
    ),
    click.option("--greedy", is_flag=True, default=None, help="Take the most likely tokens instead of sampled ones."),
)
_SAMPLER = (
    click.option("--max-new-tokens", type=int, metavar="N", help="Maximum number of tokens to write.  [default: MODEL's own]"),
    *_DENOISING,
)


#: Fields of :class:`mlx_diffgemma.config.CausalConfig` that are not among the sampler's options.
_CAUSAL = (
    click.option(
        "--temperature",
        type=float,
        metavar="T",
        help="Divide the logits by this before sampling; causal mode only.  [default: 1]",
    ),
    click.option(
        "--top-k",
        type=int,
        metavar="K",
        help="Sample from the K most likely tokens only; causal mode only.  [default: all tokens]",
    ),
    click.option(
        "--top-p",
        type=float,
        metavar="P",
        help="Sample from the fewest most likely tokens with a total probability of P; causal mode only.  [default: all tokens]",
    ),
)

#: Images and videos of the prompt.
_MEDIA = (
    click.option(
        "--image",
        type=click.Path(path_type=Path),
        multiple=True,
        metavar="FILE",
        help="Image to put before the prompt. May be repeated.",
    ),
    click.option(
        "--video",
        type=click.Path(path_type=Path),
        multiple=True,
        metavar="FILE",
        help="Video to put before the prompt, after the images. May be repeated.",
    ),
)

#: How finely the model sees them: the fields of :class:`Detail`.
_DETAIL = (
    click.option(
        "--image-tokens",
        type=click.Choice(list(map(str, BUDGETS))),
        metavar="N",
        help=f"Maximum number of tokens of an image, {', '.join(map(str, BUDGETS[:-1]))} or {BUDGETS[-1]}; more show finer "
        "detail.  [default: MODEL's own]",
    ),
    click.option(
        "--video-frames",
        type=click.IntRange(1, MAX_SEEN),
        metavar="N",
        help=f"Number of frames of a video that the model sees, each of at most {FRAME_TOKENS} tokens.  [default: {FRAMES}]",
    ),
    click.option(
        "--video-fps",
        type=click.FloatRange(1e-3, 1e3),
        metavar="F",
        help="Frames per second of a video that the model sees, instead of --video-frames.",
    ),
)


@dataclass(frozen=True)
class Detail:
    """How finely the model sees the images and videos of a command. None is the default."""

    image_tokens: int | None = None
    video_frames: int | None = None
    video_fps: float | None = None

    @classmethod
    def of(cls, given: dict[str, Any]) -> Self:
        """Take the options out of a command's arguments. Raises InputError if two of them exclude each other."""
        tokens, frames, fps = (given.pop(name) for name in ("image_tokens", "video_frames", "video_fps"))
        if frames is not None and fps is not None:
            raise InputError("--video-frames and --video-fps exclude each other; leave out one of them")
        return cls(None if tokens is None else int(tokens), frames, fps)

    def image(self, file: Path) -> Image:
        return Image(file, self.image_tokens)

    def video(self, file: Path) -> Video:
        return Video(file, FRAMES if self.video_frames is None else self.video_frames, self.video_fps)


class Size(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes: 512MiB and 4GiB count in powers of 1,024; 500MB, 4GB and plain numbers in powers of 1,000."""

    name = "size"

    def __init__(self, least: int = 0) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        name = param.opts[0] if param else "the value"
        written = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*(?:([KMGT])(i?)B?|B)?", value.strip(), re.ASCII | re.IGNORECASE)
        if not written:
            raise InputError(
                f"{name} {value!r} is not a size; write a number of bytes, or a size such as 4GiB (powers of 1,024) or 5GB "
                f"(powers of 1,000)"
            )
        size = int(float(written[1]) * (1024 if written[3] else 1000) ** (" KMGT".index((written[2] or " ").upper())))
        if size < self.least:
            raise InputError(f"{name} must be at least {self.least} bytes, got {value!r}")
        return size


def size_text(size: int) -> str:
    """A size in the largest unit that divides it, such as 4GiB, else in bytes."""
    for unit, letter in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if size and size % unit == 0:
            return f"{size // unit}{letter}iB"
    return str(size)


def _apply(options: tuple[Callable[[Function], Function], ...], function: Function) -> Function:
    for option in reversed(options):
        function = option(function)
    return function


def source_options(function: Function) -> Function:
    """The argument MODEL, and ``--revision``."""
    return _apply(_SOURCE, function)


def optional_source_options(function: Function) -> Function:
    """As :func:`source_options`, where ``model`` is None if it is not given."""
    return _apply((click.argument("model", required=False), _REVISION), function)


def prompt_options(function: Function) -> Function:
    """``--system``, ``--raw``, ``--markup`` and ``--seed``."""
    return _apply(_PROMPT, function)


def backend_options(function: Function) -> Function:
    """``--backend``, ``--device``, ``--dtype`` and ``--force``."""
    return _apply(_BACKEND, function)


def sampler_options(function: Function) -> Function:
    """The sampler's options, with the names of the reference implementation. None leaves the checkpoint's value."""
    return _apply(_SAMPLER, function)


def denoising_options(function: Function) -> Function:
    """As :func:`sampler_options`, without ``--max-new-tokens``: an edited text has its own length."""
    return _apply(_DENOISING, function)


def causal_options(function: Function) -> Function:
    """``--temperature``, ``--top-k`` and ``--top-p``; None when not given."""
    return _apply(_CAUSAL, function)


def media_options(function: Function) -> Function:
    """``--image``, ``--video`` and the options of :func:`detail_options`, as one parameter.

    The parameter is ``images``, a list of :class:`~mlx_diffgemma.vision.sources.Image` and
    :class:`~mlx_diffgemma.vision.sources.Video`.
    """

    @functools.wraps(function)
    def command(*arguments: Any, image: tuple[Path, ...], video: tuple[Path, ...], **others: Any) -> Any:
        detail = Detail.of(others)
        for given, option, needed in (
            (detail.image_tokens is not None and not image, "--image-tokens", "--image"),
            (detail.video_frames is not None and not video, "--video-frames", "--video"),
            (detail.video_fps is not None and not video, "--video-fps", "--video"),
        ):
            if given:
                raise InputError(f"{option} has no effect without {needed}; give {needed}, or leave it out")
        return function(*arguments, images=[*map(detail.image, image), *map(detail.video, video)], **others)

    return _apply((*_MEDIA, *_DETAIL), cast(Function, command))


def detail_options(function: Function) -> Function:
    """``--image-tokens``, ``--video-frames`` and ``--video-fps``, as one parameter ``detail``."""

    @functools.wraps(function)
    def command(*arguments: Any, **others: Any) -> Any:
        detail = Detail.of(others)
        return function(*arguments, detail=detail, **others)

    return _apply(_DETAIL, cast(Function, command))
