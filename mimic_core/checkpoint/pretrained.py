"""`ShiftStack.save_pretrained`, `push_to_hub` and `from_pretrained`: the files, and a model card beside them."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..heads import ShiftStack
from . import hub
from .files import load_shifts as load
from .files import save_shifts

__all__ = ["load", "push_to_hub", "save_pretrained"]


def save_pretrained(
    shifts: ShiftStack, path: str | os.PathLike[str], *, license: str | None, training: str | None
) -> None:
    """See `ShiftStack.save_pretrained`."""
    save_shifts(shifts, path)
    card = Path(path, hub.CARD)
    if not card.exists():
        card.write_text(hub.model_card(shifts, license=license, training=training))


def push_to_hub(shifts: ShiftStack, repo_id: str, *, license: str | None, training: str | None, **options: Any) -> str:
    """See `ShiftStack.push_to_hub`; `options` are those of `hub.upload`."""
    hub.check_one_pushes(shifts)
    with TemporaryDirectory() as folder:
        save_shifts(shifts, folder)
        Path(folder, hub.CARD).write_text(hub.model_card(shifts, repo_id, license, training))
        return hub.upload(Path(folder), repo_id, with_card=True, **options)
