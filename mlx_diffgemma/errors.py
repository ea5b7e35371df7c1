"""The exceptions of the package.

Every error that a user can cause is a :class:`DiffGemmaError`. Its message is one line that says what is wrong and what to do.
The command line prints that line and exits with status 2. Any other exception is a bug and keeps its traceback.
"""


class DiffGemmaError(Exception):
    """Base of all errors that come from the input, a file or the machine."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class InputError(DiffGemmaError, ValueError):
    """An argument is out of range or of the wrong form."""


class CheckpointError(DiffGemmaError):
    """A checkpoint is missing, incomplete or damaged, or is not a DiffusionGemma."""


class BackendError(DiffGemmaError):
    """A requested framework or device is not available, or does not support what was requested."""


class ComputationError(DiffGemmaError):
    """The model computed something that is no number: the weights or the device are damaged."""


def one_line(text: str) -> str:
    r"""The text with line breaks, terminal escapes and other characters that do not print shown as ``\n``, ``\x1b``, ``\u202e``.

    Names and values in a message come from files and strangers: shown raw, they could hide the message or add lines to it.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
