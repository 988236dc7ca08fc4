"""Put a stack into the model's own parameters, where this gives the same outputs."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .adapters import locate
from .adapters.base import is_of_transformers
from .adapters.probe import run_on_text
from .edits import installed
from .errors import PatchStateError, UnsupportedModelError
from .handle import check_new
from .heads import ShiftHead, ShiftStack
from .heads.stack import single
from .parallel import is_sharded
from .patch import hook
from .samples import check_strength
from .types import At, Located, Site

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SITES: tuple[Site, ...] = ("attn_heads", "attn_out", "mlp_out")
_MERGEABLE = ("MimICConfig(gate=False)", "AttnBiasConfig()", "MlpBiasConfig()", "M2IVConfig()")
Place = tuple[int, Site]
"""A site of a decoder layer."""
_INSTEAD = "Keep the stack as a patch, and save it with mimic_core.save_shifts"


@torch.inference_mode(False)  # new biases are parameters like others
@torch.no_grad()
def merge(model: nn.Module, shifts: ShiftStack, strength: float | Float[Tensor, ""] = 1.0) -> None:
    """Put a stack into the biases of a model, which then gives the outputs of the patched model without this library.

    This is possible for heads that only add vectors. At the attention heads, `MimICConfig(gate=False)`: with the output
    projection W, its bias b becomes b + W v. At the output of attention or of the MLP (`"attn_bias"`, `"mlp_bias"`,
    `"m2iv"`): the bias of the last linear layer becomes b + v. `save_pretrained` of the model then saves it, and
    `from_pretrained` of transformers loads it. If the model has no bias there, it gets one, and the option of its
    config that says so is set (`attention_bias`, `mlp_bias`). This option can stand for other biases too; these are
    zero. In training mode, a model that drops out the output of that layer drops the vector out too. If this raises an
    error, the model is unchanged.

    The model should have no patch, hook or capture. Edits at `attn_heads` that come later act before the merged vector,
    and don't see it; those at an output see it. To undo a merge, merge again with `strength=-1.0`; this is exact up to
    rounding.

    Args:
        shifts: The stack. It stays as it is.
        strength: See `Handle.strength`.

    Raises:
        WrongTypeError: `shifts` is no stack, or composed of several: merge its parts one after another.
        ShapeError: the strength is no number, or the stack was built for a model of other sizes.
        PatchStateError: the model has a patch, hook or capture.
        UnsupportedModelError: no adapter fits the model, or the merged model would not be equal to the patched one, or
            not after saving and loading. The message says what is in the way.

    The result is computed in fp64 and rounded once, to the dtype of the model.
    """
    stack, factor = single(shifts, "mimic_core.merge"), check_strength(strength)
    found = locate(model)
    if found.model is not model or any(type(m).__module__.startswith("peft.") for m in model.modules()):
        raise _cannot("the model is wrapped, or has adapters of PEFT: merge or unload these, and give the model itself")
    if not is_of_transformers(model):
        raise _cannot(f"{type(model).__name__} is no transformers model, so it is not known how it would be saved")
    if isinstance(factor, Tensor) and factor.requires_grad:
        raise _cannot("the strength is trained, but a merged model has none: give `strength.detach()`")
    if found.parallel is not None or is_sharded(model) or any(x.is_meta for x in model.parameters()):
        raise _cannot("the parameters of the model are not all here: they are split among processes, or not in memory")
    if installed(*model.modules()):
        raise PatchStateError("the model has a patch, hook or capture: remove its handle, merge, and patch again")
    check_new(found, [stack])
    vectors: dict[Place, Tensor] = {(head.layer.index, site): x for head in stack for site, x in _vectors(head).items()}
    linears = _Marked(found, stack, vectors).linears()
    needed = [{f"{name}.bias" for (_, at), (name, _) in linears.items() if at == site} for site in _SITES]
    options, added = _biases_of_class(model, needed)
    biases: dict[str, Tensor] = {path: _zeros(model.get_submodule(path.rpartition(".")[0])) for path in added}
    for place, (name, module) in linears.items():
        vector = (factor * vectors[place].to(module.weight.device).double()).flatten()
        if place[1] == "attn_heads":
            vector = (module.weight if type(module) is nn.Linear else module.weight.T).double() @ vector
        old = biases.get(f"{name}.bias", module.bias)
        biases[f"{name}.bias"] = (old.double() + vector).to(old.dtype)
    # From here on nothing can fail.
    for path, bias in biases.items():
        changed: Any = model.get_submodule(path.rpartition(".")[0])
        if changed.bias is None:
            changed.bias = nn.Parameter(bias, requires_grad=changed.weight.requires_grad)
        else:
            changed.bias.copy_(bias)
    for option in options:
        setattr(_decoders(model.config), option, True)


def _cannot(why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"this stack can't be merged into the model: {why}")


def _vectors(head: ShiftHead) -> Mapping[Site, Tensor]:
    vectors = head.constant()
    if vectors is None or head.config.positions != "all" or not set(head.edits()) == set(vectors) <= set(_SITES):
        raise _cannot(
            f"{type(head).__name__} with {head.config} does more than add one vector to {', '.join(_SITES)} of every "
            f"token, so no bias can do the same. Heads that can be merged: {', '.join(_MERGEABLE)}. {_INSTEAD}"
        )
    return vectors


class _Marked:
    """Find the linear layer of each place, by random marks that are put into a small forward.

    At the attention heads, marks are put in their place, and the layer that gets them is the output projection. With
    its output held at fixed numbers, the outputs of the decoder layers must be the same whatever the marks are: then
    nothing else reads them. At an output, the layer is the one that gives the very numbers of the site. Marks are put
    in place of its output: the site must get them as they are, and with the site held at fixed numbers, nothing else
    may depend on them.
    """

    def __init__(self, found: Located, stack: ShiftStack, vectors: dict[Place, Tensor]) -> None:
        self._found, self._stack, self._vectors = found, stack, vectors
        self._names = {module: name for name, module in found.model.named_modules()}
        self._marks: dict[Place, Tensor] = {}
        self._takers: list[tuple[Place, nn.Module, Tensor, Any]] = []
        self._makers: dict[Place, nn.Module] = {}
        self._linear: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._made: dict[nn.Module, Tensor] = {}
        self._ran: Counter[nn.Module] = Counter()
        self._outputs: list[Tensor] = []
        self._wrong = ""

    def linears(self) -> dict[Place, tuple[str, Any]]:
        """Name and module of the linear layer whose bias stands for the vector of each place.

        Raises:
            UnsupportedModelError: there is none.
        """
        self._run(None)
        for place in self._vectors:
            if place[1] != "attn_heads":
                self._makers[place] = maker = self._maker(place)
                if maker is not self._found.module(*place):
                    self._made[maker] = self._linear[maker][1]
        runs = [self._run(seed) for seed in range(2)]
        chosen = {place: self._checked(self._makers.get(place) or self._taker(place)) for place in self._vectors}
        if self._wrong:
            raise _cannot(f"{self._wrong}. {_INSTEAD}")
        if not all(map(torch.equal, *runs)):
            raise _cannot(
                f"the attention heads are read beside the output projection, or its output or that of the MLP's last "
                f"linear layer before the site. {_INSTEAD}"
            )
        return chosen

    def _run(self, seed: int | None) -> list[Tensor]:
        """The outputs of the decoder layers. Without a seed there are no marks: makers are looked for."""
        model = self._found.model
        try:
            run_on_text(model, self._found.adapter.decoder(model), partial(self._watch, seed))
        except UnsupportedModelError as error:
            raise _cannot(f"the linear layers are found in a forward on text, but {error}") from error
        return self._outputs

    def _taker(self, place: Place) -> nn.Module:
        takers = {module: (given, output) for i, module, given, output in self._takers if i == place}
        linear = [m for m in takers if is_linear(m)]
        if len(linear) != 1 or not all(linear[0] in m.modules() for m in takers):
            raise self._not_one(place, "gets the output of the attention heads as it is", list(takers))
        self._linear[linear[0]] = takers[linear[0]]
        return linear[0]

    def _maker(self, place: Place) -> nn.Module:
        whole = self._found.module(*place)
        if is_linear(whole):
            return whole
        gave = {m: self._linear[m][1] for m in whole.modules() if m in self._linear}
        inside = [m for m, output in gave.items() if _same_numbers(output, self._marks[place])]
        if len(inside) != 1:
            raise self._not_one(place, f"gives the output of {self._names[whole]} as it is", inside)
        return inside[0]

    def _not_one(self, place: Place, does: str, found: list[nn.Module]) -> UnsupportedModelError:
        kinds = ", ".join(type(m).__name__ for m in found) or "no module"
        return _cannot(
            f"in layer {place[0]}, what {does} should be one torch.nn.Linear (or Conv1D), but it is {kinds}. {_INSTEAD}"
        )

    def _checked(self, module: nn.Module) -> tuple[str, Any]:
        name = self._names[module]
        if problem := _problem(self._found.model, name):
            raise _cannot(f"{name} {problem}")
        if self._ran[module] > 1:
            raise _cannot(f"{name} runs {self._ran[module]} times in a forward. {_INSTEAD}")
        given, output = self._linear[module]
        if not torch.equal(type(module).forward(module, given), output):
            raise _cannot(f"a hook or a replaced forward changes the output of {name}: remove it")
        return name, module

    @contextmanager
    def _watch(self, seed: int | None) -> Iterator[None]:
        self._takers, self._outputs, self._marks = [], [], {}
        self._ran.clear()
        self._random = None if seed is None else torch.Generator().manual_seed(seed)
        layers = [self._found.model.get_submodule(layer.path) for layer in self._found.spec.layers]
        hooks = [m.register_forward_hook(self._module_ran) for m in self._names]
        # Before the hooks of others, which may read the output.
        hooks += [m.register_forward_hook(self._put_marks, prepend=True) for m in self._made]
        hooks += [m.register_forward_hook(self._layer_ran) for m in dict.fromkeys(layers)]
        try:
            with ExitStack() as put:
                for site in dict.fromkeys(site for _, site in self._vectors):
                    put.enter_context(hook(self._found.model, site, self._at_site, self._stack.layers))
                yield
        finally:
            for one in hooks:
                one.remove()

    def _at_site(self, value: Tensor, at: At) -> Tensor:
        place = at.layer, at.site
        if self._random is None:
            self._marks[place] = value.clone()
            return value
        maker = self._makers.get(place)
        if maker is None:
            self._marks[place] = value = torch.randn(value.shape, generator=self._random).to(value)
        elif maker in self._made and not _same_numbers(value, self._made[maker]):
            self._wrong = f"{self._names[at.module]} does something to the output of {self._names[maker]}"
        vector = self._vectors[place].to(value.device)
        if not torch.equal(self._stack[at.layer].edits()[at.site](value, at), (value + vector).to(value.dtype)):
            name = type(self._stack[at.layer]).__name__
            self._wrong = f"{name} does something else than to add what its `constant` gives"
        return value if maker is None else _fixed(value)

    def _module_ran(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        self._ran[module] += 1
        if self._random is None:
            if is_linear(module):
                self._linear[module] = args[0], output.clone()
            return None
        given = args[0] if args and isinstance(args[0], Tensor) else torch.empty(0)
        place = next((p for p, x in self._marks.items() if p[1] == "attn_heads" and _same_numbers(given, x)), None)
        if place is not None:
            self._takers.append((place, module, given, output))
        return _fixed(output) if place is not None and is_linear(module) and module not in self._made else None

    def _put_marks(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # Larger than the model's own numbers: something might cut off those that are.
        marks = torch.randn(output.shape, generator=self._random) * (4 * output.abs().max().item() + 1)
        self._made[module] = marks.to(output)
        return self._made[module].clone()

    def _layer_ran(self, module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor):
            self._outputs.append(first)


def _fixed(value: Tensor) -> Tensor:
    """Fixed numbers in place of a value. Not zero: something else might be multiplied with them."""
    return torch.linspace(-1, 1, value.numel()).to(value).view_as(value)


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


def _biases_of_class(model: Any, groups: list[set[str]]) -> tuple[list[str], set[str]]:
    """How the model's class makes these biases: the options of its config to set, and all biases that it then adds.

    Raises:
        UnsupportedModelError: it never makes them, so `from_pretrained` would drop them.
    """
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    plain = _made(model)
    options: list[str] = []
    for needed in groups:  # those of a site come with one option
        if needed <= plain & own:
            continue
        ways = []
        for option, value in vars(_decoders(model.config)).items():
            if "bias" not in option or value is not False:
                continue
            made = _made(model, option)
            fits = all(p.endswith(".bias") and not _problem(model, p.rpartition(".")[0]) for p in made - own)
            if needed | plain <= made and fits:
                ways.append((len(made), option))
        if not ways:
            raise _cannot(
                f"{type(model).__name__} makes no bias there ({min(needed)}), whatever its config says, so a saved "
                f"model would lose it when it is loaded. {_INSTEAD}"
            )
        options.append(min(ways)[1])
    return options, _made(model, *options) - own


def _made(model: Any, *options: str) -> set[str]:
    """The names of the parameters that the model's class makes, with options of the decoder's config set."""
    config = copy.deepcopy(model.config)
    for option in options:
        setattr(_decoders(config), option, True)
    with torch.device("meta"):
        return {name for name, _ in type(model)(config).named_parameters(remove_duplicate=False)}


def _decoders(config: Any) -> Any:
    return config.get_text_config(decoder=True)


def _zeros(linear: Any) -> Tensor:
    return linear.weight.new_zeros(linear.out_features)  # A Conv1D always has a bias.
