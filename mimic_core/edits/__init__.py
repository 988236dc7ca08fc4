"""Edits: put functions at the sites of a model, and remove them."""

from .entry import SiteEdit
from .install import Installation, installed
from .prompts import Given

__all__ = ["Given", "Installation", "SiteEdit", "installed"]
