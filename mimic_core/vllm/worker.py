"""In the process with the model: the stacks, the edits of the model's modules, and what each token of a step gets."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import load_shifts
from ..errors import CheckpointError, PatchStateError, UnsupportedModelError
from ..heads import HyperICLHead, IA3Head, MimICHead, ShiftHead, ShiftStack, VirtualKVHead
from ..heads.stack_set import Kind, by_kind, kinds
from ..types import Site
from . import kernels, paged
from .batch import Heads, Step, Tokens
from .models import edit_module, known_to_transformers, layers_of, origin
from .places import FOUND
from .sources import SHIFTS, digest_of

log = logging.getLogger(__name__)

# Of their `At`, these read what there is here: the query, the LSE and the scale.
_READ_ATTENTION = (HyperICLHead, MimICHead, VirtualKVHead)
_IN_ATTENTION: tuple[Site, ...] = ("query", "attn_heads")
_IN_CACHE: tuple[Site, ...] = ("key", "value")


class Served:
    """The stacks that a model runner can give to its requests, by their digest.

    Args:
        runner: vLLM's, with its model and key cache.

    Raises:
        UnsupportedModelError: the model is none of those that were tried.
    """

    def __init__(self, vllm_config: Any, runner: Any) -> None:
        self._found = known_to_transformers(vllm_config)
        self._layers = layers_of(runner.get_model(), self._found)
        self._origin = origin(vllm_config.model_config, self._found)
        self._runner = runner
        self._most = runner.max_num_tokens
        self._stacks: dict[str, ShiftStack] = {}
        self._tokens: dict[Kind, Tokens] = {}
        self._rows: dict[str, dict[Kind, int]] = {}  # of each part of a stack
        self._heads: dict[tuple[int, Site], list[Heads]] = {}
        self._edited: set[tuple[int, Site]] = set()
        self._active: dict[tuple[int, Site], list[Heads]] = {}  # in a step; outside one, no token has a stack
        self._in_step: dict[tuple[int, Site], list[Heads]] | None = None  # those of the last step
        self._ids: list[str] = []
        self._of_ids: dict[Kind, tuple[np.ndarray, np.ndarray]] = {}
        self._pending = 0
        runner._prepare_inputs = partial(self._prepare, runner._prepare_inputs)
        runner.execute_model = partial(self._execute, runner.execute_model)

    def add(self, name: str, folder: str, digest: str) -> None:
        """Load a stack. It is then found by its digest.

        Raises:
            CheckpointError: it is not the one with the digest, is damaged, or does not fit the model.
            UnsupportedModelError, BackendUnavailableError: its heads can't be served exactly.
            PatchStateError: it composes the heads of another stack in another order.
        """
        if digest in self._stacks:
            return
        began = time.perf_counter()
        stack = load_shifts(folder, self._found.model).requires_grad_(False).to(self._runner.device)
        if digest_of(folder) != digest:
            raise CheckpointError(f"the stack {name!r} at {folder} was changed while it was loaded; load it again")
        if stack.origin is not None and (misfit := stack.origin.misfit(self._origin)):
            log.warning("the stack %r at %s was made for another model: %s", name, folder, misfit)
        kinds([*self._stacks.values(), stack])
        for head in stack:
            self._check(name, head)
        for head in stack:
            for site in head.edits():
                self._edit(head.layer.index, site)
        self._stacks[digest] = stack
        self._arrange()
        log.info("stack %r loaded from %s in %.2f s", name, folder, time.perf_counter() - began)

    def _check(self, name: str, head: ShiftHead) -> None:
        index = head.layer.index
        reads = head.needs_at and not isinstance(head, _READ_ATTENTION)
        all_keys = getattr(head.config, "log_z2", "") == "all_keys"
        problems = {
            "reads more than its site, or than query, LSE and scale": reads or head.needs_prompt_end,
            "has no takes_samples, or modules of its own": not head.takes_samples or bool(head._modules),
            "has log_z2='all_keys', and masked keys are not there: pass log_z2='attended'": all_keys,
        }
        sites = self._layers[index].sites
        if not isinstance(head, IA3Head) or head.config.positions != "all":
            for site in _IN_CACHE:
                problems[f"edits {site} by another formula than IA3's, or not of all tokens"] = site in head.edits()
        problems |= {f"edits {site}, and vLLM has only {', '.join(sites)}": site not in sites for site in head.edits()}
        found = [problem for problem, is_so in problems.items() if is_so]
        if found:
            raise UnsupportedModelError(
                f"stack {name!r} can't be served: its {type(head).__name__} in layer {index} {'; '.join(found)}"
            )
        if head.needs_lse:
            paged.check(self._layers[index].attn, f"stack {name!r}, layer {index}")

    def _arrange(self) -> None:
        """Stack the parameters of each kind anew."""
        of_kinds = kinds(self._stacks.values())
        rows = {kind: count() for kind in of_kinds}
        self._rows = {
            digest: {kind: next(rows[kind]) for kind in by_kind(stack)} for digest, stack in self._stacks.items()
        }
        self._tokens = {
            kind: self._tokens.get(kind) or Tokens(self._most, one.config.positions, self._runner.device)
            for kind, (one, *_) in of_kinds.items()
        }
        self._heads = {key: [] for key in self._edited}
        for kind, stacks in of_kinds.items():
            for layer in sorted({layer for stack in stacks for layer in stack.layers}):
                head = next(stack[layer] for stack in stacks if layer in stack.layers)
                for site in head.edits():
                    module = self._layers[layer].sites[site]
                    self._heads[layer, site].append(Heads(stacks, layer, site, module, self._tokens[kind]))
        self._ids, self._in_step = [], None

    def _edit(self, layer: int, site: Site) -> None:
        if (layer, site) in self._edited:
            return
        mine, impl = self._layers[layer], self._layers[layer].attn.impl
        if site in _IN_ATTENTION:
            if not any((layer, other) in self._edited for other in _IN_ATTENTION):
                impl.forward = partial(self._attend, layer, impl, impl.forward)
        elif site in _IN_CACHE:
            if not any((layer, other) in self._edited for other in _IN_CACHE):
                impl.do_kv_cache_update = partial(self._cache, layer, impl.do_kv_cache_update)
        else:
            edit_module(mine.sites[site], site, partial(self._output, layer, site))
        self._edited.add((layer, site))

    def _output(self, layer: int, site: Site, value: Tensor) -> Tensor:
        return self._run(self._active.get((layer, site), ()), value)

    def _run(self, some: Sequence[Heads], value: Tensor, attention: paged.Attention | None = None) -> Tensor:
        for heads in some:
            value = heads(value, attention)
            self._pending -= 1
        return value

    def _cache(self, layer: int, inner: Callable[..., Any], module: Any, key: Tensor, value: Tensor, *args: Any) -> Any:
        edited = (
            self._run(self._active.get((layer, site), ()), x) for site, x in zip(_IN_CACHE, (key, value), strict=True)
        )
        return inner(module, *edited, *args)

    def _attend(
        self,
        layer: int,
        impl: Any,
        inner: Callable[..., Any],
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: Tensor,
        meta: Any,
        output: Tensor,
        *more: Any,
        **kwargs: Any,
    ) -> Any:
        of_query, of_heads = self._active.get((layer, "query"), ()), self._active.get((layer, "attn_heads"), ())
        if of_query:
            n = meta.num_actual_tokens
            edited = self._run(of_query, query[:n], paged.Attention(impl, query[:n], cache, meta))
            query = torch.cat([edited, query[n:]])
        if not of_heads:
            return inner(module, query, key, value, cache, meta, output, *more, **kwargs)
        with kernels.keeping(impl) as kept:
            result = inner(module, query, key, value, cache, meta, output, *more, **kwargs)
        n = meta.num_actual_tokens
        # Two views of all tokens would take 2 us of a layer.
        before, query = (output, query) if len(output) == len(query) == n else (output[:n], query[:n])
        edited = self._run(of_heads, before, paged.Attention(impl, query, cache, meta, kept))
        if edited is not before:
            before.copy_(edited)
        return result

    def _prepare(self, inner: Callable[..., Any], scheduled: Any, counts: np.ndarray) -> Any:
        """vLLM has chosen the requests of a step: say which tokens have which stack."""
        batch = self._runner.input_batch
        ids = batch.req_ids
        if ids != self._ids or scheduled.scheduled_new_reqs:
            self._look_up(ids)
        step = Step(counts, batch.num_computed_tokens_cpu[: len(ids)], batch.num_prompt_tokens[: len(ids)])
        differs = [tokens.begin(*self._of_ids[kind], step) for kind, tokens in self._tokens.items()]
        if any(differs) or self._in_step is None:
            found = {key: [one for one in some if one.is_active] for key, some in self._heads.items()}
            self._in_step = {key: some for key, some in found.items() if some}
        self._active = self._in_step
        self._pending = sum(map(len, self._active.values()))
        return inner(scheduled, counts)

    def _look_up(self, ids: list[str]) -> None:
        """The batch has other requests than in the step before, or in another order. Steps that decode skip this."""
        found = [self._asked(self._runner.requests[one].sampling_params) for one in ids]
        strengths = np.array([strength for _, strength in found], dtype=np.float32)
        for kind in self._tokens:
            rows = np.array([of_kinds.get(kind, -1) for of_kinds, _ in found])
            self._of_ids[kind] = (rows, strengths)
        self._ids = list(ids)

    def _asked(self, params: Any) -> tuple[Mapping[Kind, int], float]:
        extra = (None if params is None else params.extra_args) or {}
        if SHIFTS in extra:
            raise PatchStateError("a request for a stack came past vLLM's input processor, so nothing has checked it")
        if FOUND not in extra:
            return {}, 0.0
        digest, strength, _ = extra[FOUND]
        if digest not in self._rows:
            raise PatchStateError(f"a request asks for a stack with the digest {digest}, which was not loaded here")
        return self._rows[digest], strength

    def _execute(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            result = inner(*args, **kwargs)
        finally:
            pending, self._pending, self._active = self._pending, 0, {}
        if pending:
            raise PatchStateError(f"a step ended with {pending} edits that did not run: answers would not be shifted")
        return result
