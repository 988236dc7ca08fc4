"""Put a stack into the model's own parameters, where this gives the same outputs."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .adapters import locate
from .adapters.probe import run_on_text
from .edits import installed
from .errors import PatchStateError, UnsupportedModelError
from .handle import check_new
from .heads import ShiftHead, ShiftStack
from .heads.stack import check_stack
from .parallel import is_sharded
from .patch import hook
from .samples import check_strength
from .types import At, Located

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INSTEAD = "Keep the stack as a patch, and save it with mimic_core.save_shifts"


@torch.inference_mode(False)  # new biases are parameters like others
@torch.no_grad()
def merge(model: nn.Module, shifts: ShiftStack, strength: float | Float[Tensor, ""] = 1.0) -> None:
    """Put a stack into the biases of a model, which then gives the outputs of the patched model without this library.

    This is possible for heads that only add a vector to the attention heads, `MimICConfig(gate=False)`: with the output
    projection W, the bias b becomes b + W v. `save_pretrained` of the model then saves it, and `from_pretrained` of
    transformers loads it. If the model has no bias there, it gets one, and the option of its config that says so is set
    (`attention_bias`). This option can stand for other biases too; these are zero. If this raises an error, the model
    is unchanged.

    The model should have no patch, hook or capture. Edits at `attn_heads` that come later act before the merged vector,
    and don't see it. To undo a merge, merge again with `strength=-1.0`; this is exact up to rounding.

    Args:
        shifts: The stack. It stays as it is.
        strength: See `Handle.strength`.

    Raises:
        WrongTypeError: `shifts` is no stack.
        ShapeError: the strength is no number, or the stack was built for a model of other sizes.
        PatchStateError: the model has a patch, hook or capture.
        UnsupportedModelError: no adapter fits the model, or the merged model would not be equal to the patched one, or
            not after saving and loading. The message says what is in the way.

    The result is computed in fp64 and rounded once, to the dtype of the model.
    """
    stack, factor = check_stack(shifts), check_strength(strength)
    found = locate(model)
    if found.model is not model or any(type(m).__module__.startswith("peft.") for m in model.modules()):
        raise _cannot("the model is wrapped, or has adapters of PEFT: merge or unload these, and give the model itself")
    if isinstance(factor, Tensor) and factor.requires_grad:
        raise _cannot("the strength is trained, but a merged model has none: give `strength.detach()`")
    if found.parallel is not None or is_sharded(model) or any(x.is_meta for x in model.parameters()):
        raise _cannot("the parameters of the model are not all here: they are split among processes, or not in memory")
    if installed(*model.modules()):
        raise PatchStateError("the model has a patch, hook or capture: remove its handle, merge, and patch again")
    check_new(found, [stack])
    vectors = {head.layer.index: _vector(head) for head in stack}
    projections = _Marked(found, stack, vectors).projections()
    option, added = _biases_of_class(model, {f"{name}.bias" for name, _ in projections.values()})
    biases: dict[str, Tensor] = {path: _zeros(model.get_submodule(path.rpartition(".")[0])) for path in added}
    for layer, (name, module) in projections.items():
        weight = module.weight.double() if type(module) is nn.Linear else module.weight.double().T
        old = biases[f"{name}.bias"] if module.bias is None else module.bias
        more = weight @ (factor * vectors[layer].to(weight)).flatten()
        biases[f"{name}.bias"] = (old.double() + more).to(old.dtype)
    # From here on nothing can fail.
    for path, bias in biases.items():
        changed: Any = model.get_submodule(path.rpartition(".")[0])
        if changed.bias is None:
            changed.bias = nn.Parameter(bias, requires_grad=changed.weight.requires_grad)
        else:
            changed.bias.copy_(bias)
    if option is not None:
        setattr(_decoders(model.config), option, True)


def _cannot(why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"this stack can't be merged into the model: {why}")


def _vector(head: ShiftHead) -> Tensor:
    vector = head.constant()
    if vector is None or head.config.positions != "all" or set(head.edits()) != {"attn_heads"}:
        raise _cannot(
            f"{type(head).__name__} with {head.config} does more than add one vector to the attention heads of every "
            f"token, so no bias can do the same. A head that can be merged is MimICConfig(gate=False). {_INSTEAD}"
        )
    return vector


class _Marked:
    """Find the output projections: random marks are put in place of the attention heads, and who gets them is seen."""

    def __init__(self, found: Located, stack: ShiftStack, vectors: dict[int, Tensor]) -> None:
        self._found, self._stack, self._vectors = found, stack, vectors
        self._names = {module: name for name, module in found.model.named_modules()}
        self._marks: dict[int, Tensor] = {}
        self._takers: list[tuple[int, nn.Module, Tensor, Any]] = []
        self._ran: Counter[nn.Module] = Counter()
        self._outputs: list[Tensor] = []
        self._wrong = ""

    def projections(self) -> dict[int, tuple[str, Any]]:
        """Name and module of each layer's projection.

        It gets the marks as they are. Nothing else does, which is seen so: with its output held at fixed numbers, the
        outputs of the layers are the same whatever the marks are.

        Raises:
            UnsupportedModelError: it is not so.
        """
        model = self._found.model
        decoder = self._found.adapter.decoder(model)
        runs: list[list[Tensor]] = []
        for seed in range(2):
            try:
                run_on_text(model, decoder, partial(self._watch, seed))
            except UnsupportedModelError as error:
                raise _cannot(f"the output projections are found in a forward on text, but {error}") from error
            runs.append(self._outputs)
        chosen = {layer: self._projection(layer) for layer in self._stack.layers}
        if self._wrong:
            raise _cannot(f"{self._wrong} does something else than to add what its `constant` gives. {_INSTEAD}")
        if not all(map(torch.equal, *runs)):
            raise _cannot(f"the attention heads are read beside the output projection. {_INSTEAD}")
        return chosen

    def _projection(self, layer: int) -> tuple[str, Any]:
        takers = {module: seen for i, module, *seen in self._takers if i == layer}
        linear = [m for m in takers if is_linear(m)]
        if len(linear) != 1 or not all(linear[0] in m.modules() for m in takers):
            kinds = ", ".join(type(m).__name__ for m in takers) or "no module"
            raise _cannot(
                f"in layer {layer}, what gets the output of the attention heads as it is should be one torch.nn.Linear "
                f"(or Conv1D), but it is {kinds}. {_INSTEAD}"
            )
        module, name = linear[0], self._names[linear[0]]
        if problem := _problem(self._found.model, name):
            raise _cannot(f"{name} {problem}")
        if self._ran[module] > 1:
            raise _cannot(f"{name} runs {self._ran[module]} times in a forward. {_INSTEAD}")
        given, output = takers[module]
        if not torch.equal(type(module).forward(module, given), output):
            raise _cannot(f"a hook or a replaced forward changes the output of {name}: remove it")
        return name, module

    @contextmanager
    def _watch(self, seed: int) -> Iterator[None]:
        self._takers, self._outputs = [], []
        self._ran.clear()
        generator = torch.Generator().manual_seed(seed)
        layers = [self._found.model.get_submodule(layer.path) for layer in self._found.spec.layers]
        hooks = [m.register_forward_hook(self._module_ran) for m in self._names]
        hooks += [m.register_forward_hook(self._layer_ran) for m in dict.fromkeys(layers)]
        try:
            with hook(self._found.model, "attn_heads", partial(self._mark, generator), self._stack.layers):
                yield
        finally:
            for one in hooks:
                one.remove()

    def _mark(self, generator: torch.Generator, value: Tensor, at: At) -> Tensor:
        marks = self._marks[at.layer] = torch.randn(value.shape, generator=generator).to(value)
        head, vector = self._stack[at.layer], self._vectors[at.layer].to(marks.device)
        if not torch.equal(head.edits()["attn_heads"](marks, at), (marks + vector).to(marks.dtype)):
            self._wrong = type(head).__name__
        return marks

    def _module_ran(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        self._ran[module] += 1
        given = args[0] if args and isinstance(args[0], Tensor) else torch.empty(0)
        layer = next((i for i, x in self._marks.items() if _same_numbers(given, x)), None)
        if layer is None:
            return None
        self._takers.append((layer, module, given, output))
        # Fixed numbers, but not zero: something else might be multiplied with them.
        fixed = torch.linspace(-1, 1, output.numel()) if is_linear(module) else None
        return None if fixed is None else fixed.to(output).view_as(output)

    def _layer_ran(self, module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor):
            self._outputs.append(first)


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    alike = (one.numel(), one.dtype, one.device) == (other.numel(), other.dtype, other.device)
    return alike and torch.equal(one.reshape(-1), other.reshape(-1))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is just W x + b."""
    # Conv1D by name, because only some parts of this package import transformers.
    kind = type(module)
    return kind is nn.Linear or (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def _problem(model: nn.Module, path: str) -> str | None:
    """Why the bias of a module can't be changed or added."""
    module = dict(model.named_modules()).get(path)
    if module is None or not is_linear(module):
        return f"is a {type(module).__name__}, not a torch.nn.Linear. {_INSTEAD}"
    for x in module.parameters(recurse=False):
        if type(x) is not nn.Parameter or x.dtype not in _DTYPES or x.is_inference():
            return f"has a {type(x).__name__} of {x.dtype}, which is quantised or can't be changed. {_INSTEAD}"
    sharing = {name for name, m in model.named_modules(remove_duplicate=False) if m is module}
    sharing |= {
        name.rpartition(".")[0] for name, x in model.named_parameters(remove_duplicate=False) if x is module.bias
    }
    others = ", ".join(sorted(sharing - {path}))
    return f"shares its bias with {others}: give each one of its own" if others else None


def _biases_of_class(model: Any, needed: set[str]) -> tuple[str | None, set[str]]:
    """How the model's class makes these biases: the option of its config to set, and all biases that it then adds.

    Raises:
        UnsupportedModelError: it never makes them, so `from_pretrained` would drop them.
    """
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    plain = _made(model)
    if needed <= plain & own:
        return None, set()
    ways = []
    for option in [name for name, value in vars(_decoders(model.config)).items() if "bias" in name and value is False]:
        made = _made(model, option)
        added = made - own
        fits = all(path.endswith(".bias") and not _problem(model, path.rpartition(".")[0]) for path in added)
        if needed | plain <= made and fits:
            ways.append((option, added))
    if not ways:
        raise _cannot(
            f"{type(model).__name__} makes no bias there ({min(needed)}), whatever its config says, so a saved model "
            f"would lose it when it is loaded. {_INSTEAD}"
        )
    return min(ways, key=lambda way: len(way[1]))


def _made(model: Any, option: str | None = None) -> set[str]:
    """The names of the parameters that the model's class makes, with an option of the decoder's config set."""
    config = copy.deepcopy(model.config)
    if option is not None:
        setattr(_decoders(config), option, True)
    with torch.device("meta"):
        return {name for name, _ in type(model)(config).named_parameters(remove_duplicate=False)}


def _decoders(config: Any) -> Any:
    return config.get_text_config(decoder=True)


def _zeros(linear: Any) -> Tensor:
    return linear.weight.new_zeros(linear.out_features)  # A Conv1D always has a bias.
