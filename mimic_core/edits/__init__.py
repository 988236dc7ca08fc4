"""Edits: how a function gets to a site of a running model, and out again."""

from .entry import SiteEdit
from .install import Installation, installed

__all__ = ["Installation", "SiteEdit", "installed"]
