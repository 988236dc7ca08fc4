"""Errors raised by mimic_core. Each also inherits the builtin a caller would expect to catch."""


class MimicError(Exception):
    """Base of every error mimic_core raises on purpose."""

    # KeyError's and LookupError's repr-like formatting would quote the message; keep it plain.
    def __str__(self) -> str:
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class UnsupportedModelError(MimicError, LookupError):
    """No adapter fits the model, or the model lacks the site that was asked for."""


class UnknownNameError(MimicError, LookupError):
    """A site, head, adapter, backend or recipe name that does not exist."""


class ShapeError(MimicError, ValueError):
    """The shape, dtype or device of a tensor does not fit the others of the call."""


class PatchStateError(MimicError, RuntimeError):
    """A patch, hook or capture was used in a state that does not allow it."""


class BackendUnavailableError(MimicError, RuntimeError):
    """A kernel backend asked for by name cannot run this call."""


class CheckpointError(MimicError, ValueError):
    """A checkpoint is damaged, foreign, or does not fit the model."""
