"""transformers' continuous batching (`generate_batch`) of a model with edits.

It runs the model in a thread of its own, shares the keys and values of equal prompts between requests, and returns
empty answers where that thread raised an error.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar, copy_context
from functools import partial, wraps
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from ..errors import PatchStateError, ShapeError
from ..samples import Samples
from .prompts import EDITED, Given, generation_mixin
from .replaced import ReplacedMethod


@runtime_checkable
class Caller(Protocol):
    """Whose edits a caller can say something about."""

    watch: Any

    def at(self, given: Given) -> Any: ...


_in_batches: ContextVar[bool] = ContextVar("mimic_core_in_batches", default=False)


def _wrap_batches(original: Callable[..., Any], in_use: Callable[[], bool]) -> Callable[..., Any]:
    @wraps(original)
    def generate_batch(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not in_use() or not _is_edited(self):
            return original(self, inputs, *args, **kwargs)
        run = partial(_whole, original, self)
        given = [(one, found) for one in _callers(self) if (found := one.watch.given) is not None]
        if any(found.positions is not None or found.prompt is not None for _, found in given):
            raise PatchStateError("continuous batching can't follow `handle.at`: use model.generate, or leave it out")
        said = [(one, found.samples) for one, found in given if found.samples is not None]
        if not said:
            return run(inputs, *args, **kwargs)
        if kwargs.get("persistent_manager") or getattr(self, "_cached_continuous_batching_manager", None) is not None:
            raise PatchStateError(
                "continuous batching with a manager that stays (persistent_manager=True) can't follow `handle.using`: "
                "leave it out, and call model.destroy_cached_continuous_batching_manager() if there is one"
            )
        inputs, answers = list(inputs), {}
        for places, row in _groups(len(inputs), said):
            with ExitStack() as stack:
                for (one, _), samples in zip(said, row, strict=True):
                    stack.enter_context(one.at(Given(samples=samples)))
                stack.callback(_in_batches.reset, _in_batches.set(True))
                found = run([inputs[place] for place in places], *args, **kwargs)
            answers.update(_renamed(answer, places) for answer in found.items())
        return dict(sorted(answers.items(), key=lambda answer: _place(answer[0])))

    return generate_batch


def _whole(original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Call `generate_batch`.

    Raises:
        PatchStateError: answers are missing.
    """
    found = original(model, inputs, *args, **kwargs)
    errors = [error for answer in found.values() if (error := getattr(answer, "error", None))]
    if errors or len(found) < len(inputs):
        raise PatchStateError(
            f"continuous batching of this patched model failed for {len(errors) or len(inputs) - len(found)} "
            f"requests: {errors[0] if errors else 'see its log'}"
        )
    return found


def _is_edited(model: nn.Module) -> bool:
    return any(EDITED in module.__dict__ for module in model.modules())


def _callers(model: nn.Module) -> list[Caller]:
    edited = [module.__dict__[EDITED] for module in model.modules() if EDITED in module.__dict__]
    return list({id(one.owner): one.owner for forward in edited for one in forward.around}.values())


def _groups(n: int, said: list[tuple[Caller, Samples]]) -> list[tuple[list[int], list[Samples]]]:
    """The requests that get the same, and what they get of each caller.

    Raises:
        ShapeError: a caller said it for another number of requests.
    """
    columns = []
    for _, samples in said:
        if samples.count not in (None, n):
            raise ShapeError(
                f"`handle.using` got {samples.count} samples, but `generate_batch` got {n} requests; give one stack "
                f"and one strength for each request, or one for all"
            )
        stacks = (samples.stacks or [None]) * (n if samples.is_uniform or samples.stacks is None else 1)
        strength = samples.strength
        numbers = strength.tolist() if isinstance(strength, Tensor) and strength.ndim else [strength] * n
        columns.append([(samples.stacks is not None, *one) for one in zip(stacks, numbers, strict=True)])
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, row in enumerate(zip(*columns, strict=True)):
        groups.setdefault(row, []).append(place)
    return [
        (places, [Samples((stack,) if has_stacks else None, True, number) for has_stacks, stack, number in row])
        for row, places in groups.items()
    ]


def _place(request: str) -> int:
    """The number of a request: it is called `req_0`, or `req_0__child#1` if it is a copy."""
    return int(request.removeprefix("req_").split("__")[0])


def _renamed(answer: tuple[str, Any], places: list[int]) -> tuple[str, Any]:
    name, output = answer
    place = _place(name)
    output.request_id = name.replace(f"req_{place}", f"req_{places[place]}", 1)
    return output.request_id, output


def _wrap_start(original: Callable[..., Any], in_use: Callable[[], bool]) -> Callable[..., Any]:
    @wraps(original)
    def start(self: Any) -> Any:
        if in_use() and _in_batches.get():  # its thread sees what the caller said
            self._run_generation_loop = partial(copy_context().run, self._run_generation_loop)
        return original(self)

    return start


def _wrap_search(original: Callable[..., Any], in_use: Callable[[], bool]) -> Callable[..., Any]:
    @wraps(original)
    def search_prefix_match(self: Any, *args: Any, **kwargs: Any) -> int:
        if not in_use():
            return original(self, *args, **kwargs)
        # Keys and values in the cache may be of a model with other edits. Those to come must not be found later,
        # without these edits. A cache doesn't know its model, so this stops all that are asked while there are edits.
        self.use_prefix_sharing = self.allow_block_sharing = False
        return 0

    return search_prefix_match


def _continuous_mixin() -> type:
    return next(kind for kind in generation_mixin().__mro__ if "generate_batch" in vars(kind))


def _manager() -> type:
    from transformers.generation.continuous_batching import ContinuousBatchingManager

    return ContinuousBatchingManager


def _cache() -> type:
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    return PagedAttentionCache


WATCHED = (
    ReplacedMethod(_continuous_mixin, "generate_batch", _wrap_batches),
    ReplacedMethod(_manager, "start", _wrap_start),
    ReplacedMethod(_cache, "search_prefix_match", _wrap_search),
)
"""Methods that are replaced while a model has edits."""
