"""Errors raised by mimic_core. Each one is also a matching builtin exception."""


class MimicError(Exception):
    """Base class of all errors of mimic_core."""

    # The formatting of KeyError would put the message in quotes.
    def __str__(self) -> str:
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class UnsupportedModelError(MimicError, LookupError):
    """No adapter fits the model, or the model lacks a site."""


class WrongTypeError(MimicError, TypeError):
    """An argument is of another type than the function takes."""


class UnknownNameError(MimicError, LookupError):
    """There is no site, head, adapter, backend or recipe of this name."""


class ShapeError(MimicError, ValueError):
    """The shape, dtype or device of a tensor does not fit the other arguments."""


class PatchStateError(MimicError, RuntimeError):
    """A patch, hook or capture was used in a state that does not allow it."""


class BackendUnavailableError(MimicError, RuntimeError):
    """A backend that was named cannot run this call."""


class CheckpointError(MimicError, ValueError):
    """A checkpoint is damaged, has another format, or does not fit the model."""
