"""Inputs for the laws: the caller's or random text, and the same samples alone, padded or made longer."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import is_of_transformers, text_config
from ..adapters.probe import token_names

_SPECIAL = re.compile(r"_ids?$|_index$|_token$")
_TO_IMAGES = re.compile(r"^(cross|image)_attention_mask$")
_WINDOW = re.compile(r"window|chunk_size|topk$")
_LENGTH = 12
_LONGEST = 96


class Batches:
    """Inputs of a model without wrappers.

    Without `given`, there are two samples of random text. The second is shorter and is padded on the right.
    """

    def __init__(self, model: nn.Module, given: Mapping[str, Any] | None) -> None:
        self._model = model
        described: Any = getattr(getattr(model, "config", None), "to_dict", dict)
        self._config = config = described()
        self.special = sorted({i for key, x in _entries(config) if _SPECIAL.search(key) for i in _ids(x)})
        parameters = inspect.signature(model.forward).parameters
        self._names = set(parameters)
        own = "input_ids" in parameters or is_of_transformers(model)
        # Elsewhere, other code gets what has no name, and not all names of transformers.
        self._anything = own and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        ids = token_names({name: given[name] for name in parameters if name in given}) if given else []
        self.tokens = "input_ids" if own else next(iter((*ids, *parameters)), "input_ids")
        """The name of the argument with the token ids."""
        self.given = self.text() if given is None else {k: x for k, x in given.items() if k != "labels"}

    def accepts(self, name: str) -> bool:
        return name in self._names or (self._anything and name != "position_ids")

    @property
    def vocabulary(self) -> int:
        try:
            weight = self._model.get_input_embeddings().weight  # pyright: ignore[reportCallIssue]
        except (AttributeError, NotImplementedError):
            weight = None
        found = [weight.shape[0]] if isinstance(weight, Tensor) else []
        size = getattr(text_config(self._model), "vocab_size", None)
        return min(found + ([size] if isinstance(size, int) else [])) if found or isinstance(size, int) else 8

    def text(self) -> dict[str, Any]:
        """Random text without special ids, longer than the windows of the config if those are short."""
        windows = [x for key, x in _entries(self._config) if _WINDOW.search(key) and isinstance(x, int)]
        length = max([_LENGTH, *(x + _LENGTH // 2 for x in windows if 0 < x <= _LONGEST)])
        device = next((p.device for p in self._model.parameters() if p.device.type != "meta"), torch.device("cpu"))
        allowed = self._ordinary
        picks = torch.randint(len(allowed), (2, length), generator=torch.Generator().manual_seed(7))
        ids = torch.tensor(allowed)[picks].to(device)
        mask = torch.ones_like(ids)
        mask[1, -3:] = 0
        ids[1, -3:] = self.padding
        if not self.accepts("attention_mask"):
            ids[1, -3:] = ids[0, -3:]  # nothing would say that this is padding
        text = {self.tokens: ids, "attention_mask": mask}
        return {name: x for name, x in text.items() if self.accepts(name)}

    def reworded(self, ids: Tensor) -> Tensor:
        """The ids [b t] with other tokens instead of the ordinary ones."""
        special = torch.tensor([*self.special, self.padding], device=ids.device)
        ordinary = ~torch.isin(ids, special)
        others = torch.where(ids == self._ordinary[0], self._ordinary[-1], self._ordinary[0])
        return torch.where(ordinary, others, ids)

    @property
    def _ordinary(self) -> list[int]:
        return [i for i in range(3, min(self.vocabulary, 5000)) if i not in self.special] or [0]

    @property
    def padding(self) -> int:
        found = [x for key, x in _entries(self._config) if key == "pad_token_id" and isinstance(x, int)]
        return found[0] if found and 0 <= found[0] < self.vocabulary else 0

    def real(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Which tokens are not padding [b t]. None means that this is not known."""
        mask = inputs.get("attention_mask")
        return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def samples(self, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Each sample alone, without padding. If no sample is padded, the last one is shortened by three tokens."""
        ids = inputs[self.tokens]
        real = self.real(inputs)
        real = torch.ones_like(ids, dtype=torch.bool) if real is None else real.clone()
        if real.all():
            real[-1, -3:] = False
        found = []
        for i in range(ids.shape[0]):
            alone = {k: self._sample(k, x, i, real[i], inputs) for k, x in inputs.items() if k != "position_ids"}
            found.append(alone)
        return found

    def _sample(self, name: str, x: Any, i: int, keep: Tensor, inputs: Mapping[str, Any]) -> Any:
        if not self._by_sample(x, inputs):
            return x
        row = x[i : i + 1]
        return row[:, keep] if self._by_token(name, x, inputs) else row

    def together(self, samples: list[dict[str, Any]], side: str, positions: bool) -> dict[str, Any]:
        """The samples in one batch, padded on one side. With `positions`, it has position ids without padding."""
        first = samples[0]
        longest = max(s[self.tokens].shape[1] for s in samples)
        batch: dict[str, Any] = {}
        for name, x in first.items():
            if not self._by_sample(x, first):
                batch[name] = x
            elif self._by_token(name, x, first):
                fill = self.padding if name == self.tokens else 0
                batch[name] = torch.cat([_pad(s[name], longest, side, fill) for s in samples])
            else:
                batch[name] = torch.cat([s[name] for s in samples])
        ones = [torch.ones_like(s[self.tokens]) for s in samples]
        batch["attention_mask"] = torch.cat([_pad(x, longest, side, 0) for x in ones])
        if positions:
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return batch

    def longer(self, inputs: Mapping[str, Any], new: Tensor) -> dict[str, Any]:
        """The batch with the tokens [b n] appended. Other inputs with a token axis repeat their last entry."""
        batch: dict[str, Any] = {}
        for name, x in inputs.items():
            if name == "position_ids":
                continue
            if name == self.tokens:
                batch[name] = torch.cat([x, new], dim=1)
            elif name == "attention_mask" and isinstance(x, Tensor) and x.ndim == 2:
                batch[name] = torch.cat([x, torch.ones_like(new, dtype=x.dtype)], dim=1)
            elif self._by_token(name, x, inputs):
                batch[name] = torch.cat([x, x[:, -1:].expand(-1, new.shape[1], *x.shape[2:])], dim=1)
            else:
                batch[name] = x
        return batch

    def has_ids(self, inputs: Mapping[str, Any]) -> bool:
        """Whether there are token ids [b t] among the inputs."""
        ids = inputs.get(self.tokens)
        return isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point()

    def _by_sample(self, x: Any, inputs: Mapping[str, Any]) -> bool:
        return isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == inputs[self.tokens].shape[0]

    def _by_token(self, name: str, x: Any, inputs: Mapping[str, Any]) -> bool:
        """Whether x is [b t ...]. Of four axes only masks from text to images: other tensors of four are the images."""
        most = 4 if _TO_IMAGES.search(name) else 3
        return self._by_sample(x, inputs) and 1 < x.ndim <= most and x.shape[1] == inputs[self.tokens].shape[1]


def copied(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with tensors of their own, for one forward: some models write into what they are given.

    XGLM of transformers 5.1 adds 2 to `position_ids` in place, so a second forward on the same tensor has other logits.
    """
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}


def _pad(x: Tensor, length: int, side: str, fill: int) -> Tensor:
    missing = x.new_full((x.shape[0], length - x.shape[1], *x.shape[2:]), fill)
    return torch.cat([x, missing] if side == "right" else [missing, x], dim=1)


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All entries of a config and of the configs inside it."""
    for key, x in config.items():
        yield key, x
        if isinstance(x, Mapping):
            yield from _entries({str(k): v for k, v in x.items()})


def _ids(x: Any) -> list[int]:
    items = x if isinstance(x, list | tuple) else [x]
    return [i for i in items if isinstance(i, int) and i >= 0]
