"""Save and load stacks: our own format, and state dicts of the published code."""

from ..heads import stack
from . import pretrained
from .files import load_shifts, save_shifts
from .published import shifts_from_reference

stack.files = pretrained

__all__ = ["load_shifts", "save_shifts", "shifts_from_reference"]
