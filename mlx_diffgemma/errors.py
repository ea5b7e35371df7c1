"""The exceptions of the package.

Every error that a user can cause is a :class:`DiffGemmaError`. Its message is one line that says what is wrong and what to do.
The command line prints that line and exits with status 2. Any other exception is a bug and keeps its traceback.
"""


class DiffGemmaError(Exception):
    """Base of all errors that come from the input, a file or the machine."""


class InputError(DiffGemmaError, ValueError):
    """An argument is out of range or of the wrong form."""


class CheckpointError(DiffGemmaError):
    """A checkpoint is missing, incomplete or damaged, or is not a DiffusionGemma."""


class BackendError(DiffGemmaError):
    """A requested framework or device is not available, or does not support what was requested."""
