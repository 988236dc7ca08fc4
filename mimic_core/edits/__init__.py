"""Edits: put functions at the sites of a model, and remove them."""

from .entry import SiteEdit
from .install import Installation, installed

__all__ = ["Installation", "SiteEdit", "installed"]
