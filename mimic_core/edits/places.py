"""Whether the modules with edits still stand where they stood when the edits were put in."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..types import unwrapped


class Places:
    """The chains of children from a model to some of its modules.

    A site is the output of the module that stands at a place. If something else stands there later, such as PEFT's
    LoRA around a linear layer, edits of the old module would act before LoRA's share, or not at all.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        self._model = model
        parents: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is not None:
                    parents.setdefault(child, []).append((parent, name))
        # In columns, because they are compared at each decoded token.
        self._dicts: list[dict[str, nn.Module | None]] = []
        self._names: list[str] = []
        self._children: list[nn.Module | None] = []
        wanted = list(dict.fromkeys(modules))
        for child in wanted:  # it grows
            for parent, name in parents.get(child, ()):
                self._dicts.append(parent._modules)
                self._names.append(name)
                self._children.append(child)
                if parent not in wanted:
                    wanted.append(parent)

    @property
    def kept(self) -> bool:
        """Whether the same modules stand there, perhaps in wrappers with the same output.

        A loop over the links would take longer than this comparison.
        """
        now = [*map(dict.get, self._dicts, self._names)]
        if now == self._children:
            return True
        return all(unwrapped(a) is unwrapped(b) for a, b in zip(now, self._children, strict=True))

    def traced(self) -> None:
        """Let a graph of torch.compile check that the same objects stand there, as it does for the argument of `id`."""
        for children, name in zip(self._dicts, self._names, strict=True):
            id(children[name])

    def changes(self) -> str:
        """Say which modules were replaced, and by what."""
        paths = {id(module._modules): f"{path}." if path else "" for path, module in self._model.named_modules()}
        found = []
        for children, name, child in zip(self._dicts, self._names, self._children, strict=True):
            now = children.get(name)
            if unwrapped(now) is not unwrapped(child):
                by = "removed" if now is None else f"replaced by {type(now).__module__}.{type(now).__qualname__}"
                found.append(f"{paths.get(id(children), '')}{name}, a {type(child).__name__}, was {by}")
        return "; ".join(found[:2]) + (f"; and {len(found) - 2} more" if len(found) > 2 else "")
