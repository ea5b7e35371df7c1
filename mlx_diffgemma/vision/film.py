"""Images and videos as they stand in a prompt: their patches, and the text that takes their place."""

from dataclasses import dataclass

from mlx_diffgemma.prompts import IMAGE, IMAGE_BEGIN, IMAGE_END, VIDEO
from mlx_diffgemma.vision.patches import Patches


@dataclass(frozen=True, eq=False)
class Picture:
    """An image that was read."""

    patches: Patches

    @property
    def images(self) -> tuple[Patches, ...]:
        """The one image."""
        return (self.patches,)

    @property
    def markup(self) -> str:
        """The text that takes the place of ``<|image|>`` in a rendered prompt."""
        return IMAGE_BEGIN + IMAGE * self.patches.soft_tokens + IMAGE_END


@dataclass(frozen=True, eq=False)
class Film:
    """A video that was read.

    Attributes:
        frames: the frames that the model sees, in order, each with its time in seconds from the start.
    """

    frames: tuple[tuple[float, Patches], ...]

    @property
    def images(self) -> tuple[Patches, ...]:
        """The frames."""
        return tuple(patches for _, patches in self.frames)

    @property
    def markup(self) -> str:
        """The text that takes the place of ``<|video|>`` in a rendered prompt: each frame after its time in ``mm:ss``."""
        return " ".join(
            f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d} {IMAGE_BEGIN}{VIDEO * patches.soft_tokens}{IMAGE_END}"
            for seconds, patches in self.frames
        )


Media = Picture | Film
