"""What can go wrong, in words a person can act on.

Every error that a user can cause is a :class:`DiffGemmaError` whose message is one line: what is wrong, and what to do.
The command line prints that line and exits with status 2; anything else is a bug and keeps its traceback.
"""


class DiffGemmaError(Exception):
    """Base of all errors that name a mistake of input, of a file or of the machine."""


class InputError(DiffGemmaError, ValueError):
    """An argument is out of range or of the wrong form."""


class CheckpointError(DiffGemmaError):
    """A checkpoint is missing, incomplete, damaged, or of another model."""


class BackendError(DiffGemmaError):
    """A framework or device that was asked for is not there, or cannot do what was asked."""
