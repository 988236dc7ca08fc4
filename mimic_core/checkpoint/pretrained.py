"""`ShiftStack.save_pretrained`, `push_to_hub` and `from_pretrained`: the files, and a model card beside them."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from ..heads import ShiftStack, stack
from . import hub
from .files import load_shifts, save_shifts


class _Pretrained:
    def save_pretrained(
        self,
        shifts: ShiftStack,
        path: str | os.PathLike[str],
        *,
        license: str | None = None,
        training: str | None = None,
    ) -> None:
        save_shifts(shifts, path)
        card = Path(path, hub.CARD)
        if not card.exists():
            card.write_text(hub.model_card(shifts, license=license, training=training))

    def push_to_hub(
        self,
        shifts: ShiftStack,
        repo_id: str,
        *,
        license: str | None = None,
        training: str | None = None,
        token: str | bool | None = None,
        **options: Any,
    ) -> str:
        with TemporaryDirectory() as folder:
            save_shifts(shifts, folder)
            Path(folder, hub.CARD).write_text(hub.model_card(shifts, repo_id, license, training))
            return hub.upload(Path(folder), repo_id, with_card=True, token=token, **options)

    def load(self, source: str | os.PathLike[str], model: nn.Module, **options: Any) -> ShiftStack:
        return load_shifts(source, model, **options)


stack.files = _Pretrained()
