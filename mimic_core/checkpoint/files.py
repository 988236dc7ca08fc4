"""Save and load stacks: the tensors as safetensors, the description as JSON. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as in_tensors
from safetensors.torch import save as in_bytes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..adapters import Handed, locate
from ..build import place
from ..errors import CheckpointError, MimicError
from ..heads import ComposedStack, ShiftStack, head_class
from ..heads.composed import check_count
from ..heads.stack import check_stack
from ..origins import Origin, origin_of
from ..types import LayerSpec, ModelSpec
from . import hub

FORMAT, VERSION = "mimic_core.shifts", 1
_TENSORS, _DESCRIPTION = hub.FILES
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The most bytes of a description, and of the header of the tensors.
_LONGEST, _HEADER = 16 << 20, 16 << 20


def save_shifts(
    shifts: ShiftStack | DistributedDataParallel, path: str | os.PathLike[str], push_to_hub: str | None = None
) -> None:
    """Write a stack to a directory: `shifts.safetensors` and `shifts.json`.

    Each file is replaced completely or not at all. A parameter that several heads share is written once, and is shared
    again after loading. The model is not saved. If the parameters are sharded, call this in
    all processes: it gathers them, and each process writes the same files.

    Args:
        shifts: The stack, or the DistributedDataParallel around it.
        path: The directory. It is created if it does not exist.
        push_to_hub: A hub repository ("user/name") for a copy of the two files. It is created if it does not exist.

    Raises:
        WrongTypeError: `shifts` is not a ShiftStack.
        PatchStateError: sharded parameters, and a hub repository: each process would push.
        CheckpointError: `load_shifts` could not read the files: two parameters lie in the same memory and are not one,
            a parametrization has changed the names, a number is NaN or infinite, a dtype is not a usual one. Nothing is
            written.
    """
    shifts = check_stack(shifts)
    if push_to_hub is not None:
        hub.check_one_pushes(shifts)
    head, config = ([part.name for part in shifts.parts], [part.config.to_dict() for part in shifts.parts])
    if shifts.parts == (shifts,):
        head, config = head[0], config[0]
    shared = _shared(shifts)
    tensors = {
        name: _whole(x.detach()).cpu().contiguous() for name, x in shifts.state_dict().items() if name not in shared
    }
    with torch.random.fork_rng(devices=[]):
        fresh = _stack_of(head, config, shifts.spec, None)
    if problems := _problems(fresh, tensors | {name: tensors[first] for name, first in shared.items()}):
        raise CheckpointError(f"these shifts are not saved, since they could not be loaded again: {problems}")
    target = Path(path)
    target.mkdir(parents=True, exist_ok=True)
    content = in_bytes(tensors, metadata={"format": "pt"})
    description = {
        "format": FORMAT,
        "version": VERSION,
        "head": head,
        "config": config,
        "model": _described(shifts.spec),
        "origin": None if shifts.origin is None else _without_empty(asdict(shifts.origin)),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    if shared:
        description["shared"] = shared
    with TemporaryDirectory(dir=target, prefix=".saving-") as folder:
        # Not save_file: its files are readable only by their owner, whatever the umask is.
        Path(folder, _TENSORS).write_bytes(content)
        Path(folder, _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        for name in (_TENSORS, _DESCRIPTION):
            os.replace(Path(folder, name), target / name)
    if push_to_hub is not None:
        hub.upload(target, push_to_hub)


def load_shifts(
    source: str | os.PathLike[str],
    model: nn.Module,
    revision: str | None = None,
    strict: bool = False,
    *,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    adapter: Handed = None,
) -> ShiftStack:
    """Load a stack that `save_shifts` wrote, for a model that it fits.

    Args:
        source: The directory, or a hub repository "user/name".
        revision: Branch, tag or commit of a hub repository. A directory has none.
        strict: Refuse another model than the one the shifts were made for. If False, it only warns, because a
            fine-tuned or quantised model of the same family may be what you want.
        token, cache_dir: As in `from_pretrained` of transformers, for a hub repository.
        adapter: See `adapter_for`.

    Returns:
        The stack, not yet patched into the model, in the dtypes it was saved in. Each head is on the device of its
        layer.

    Raises:
        CheckpointError: there is nothing at `source`; it is damaged or has another format or version; it needs a shift
            head that is not registered; it was made for a model of other sizes; or `strict` and for another model.
        UnsupportedModelError: no adapter fits the model.
    """
    found = locate(model, adapter)
    spec = found.spec
    folder = hub.folder_of(source, revision, token, cache_dir)
    description = read_description(folder / _DESCRIPTION)
    try:
        saved_spec = _spec_from_dict(description["model"])
        origin = None if description.get("origin") is None else Origin(**description["origin"])
        if misfit := saved_spec.misfit(spec):
            raise CheckpointError(f"shifts at {source} do not fit this model: they were made for {misfit}")
        stack = _stack_of(description["head"], description["config"], spec, origin)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, MimicError) as error:
        raise CheckpointError(
            f"{folder / _DESCRIPTION} does not describe shifts that this version can build: {error}; if the shift head "
            f"is from another package, import it first"
        ) from error
    path = folder / _TENSORS
    try:
        content = _read(path, _HEADER + sum(8 * x.numel() for x in stack.state_dict().values()))
        tensors = in_tensors(content)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}; the file is damaged or missing") from error
    tensors = _share(stack, tensors, description.get("shared", {}), folder / _DESCRIPTION)
    if problems := _problems(stack, tensors):
        raise CheckpointError(f"{path} does not fit its description: {problems}")
    if (wanted := description.get("sha256")) is not None and hashlib.sha256(content).hexdigest() != wanted:
        raise CheckpointError(
            f"{path} is not the file that {_DESCRIPTION} describes: it was changed, or both are being written now; "
            f"load again, or get both files anew"
        )
    for name, x in stack.state_dict(keep_vars=True).items():
        x.data = x.data.to(tensors[name].dtype)
    stack.load_state_dict(tensors)
    if origin is not None and (misfit := origin.misfit(origin_of(found))):
        problem = f"shifts at {source} were made for another model: {misfit}"
        if strict:
            raise CheckpointError(f"{problem}; load them with strict=False if that is what you want")
        warnings.warn(problem, stacklevel=2)
    return place(stack, found.model)


def _stack_of(head: Any, config: Any, spec: ModelSpec, origin: Origin | None) -> ShiftStack:
    """The stack of a description: of the name of a head and its options, or of a list of each."""
    if not isinstance(head, list):
        kind = head_class(head)
        return ShiftStack(kind, kind.config_class.from_dict(config), spec, origin)
    check_count(len(head))
    kinds = [head_class(name) for name in head]
    pairs = zip(kinds, config, strict=True)
    return ComposedStack([ShiftStack(kind, kind.config_class.from_dict(x), spec, origin) for kind, x in pairs])


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that hold NaN or infinity."""
    return [name for name, x in tensors.items() if not torch.isfinite(x.float()).all()]


def _whole(x: Tensor) -> Tensor:
    """All of a tensor that may be sharded (a DTensor)."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # pyright: ignore[reportAttributeAccessIssue]


def _shared(shifts: ShiftStack) -> dict[str, str]:
    """The names of parameters and buffers that are the same as one before, with the name of that.

    Raises:
        CheckpointError: two of them are different, in the same memory: after loading from a file they would be apart.
    """
    first: dict[int, tuple[str, Tensor]] = {}
    shared: dict[str, str] = {}
    for name, x in shifts.state_dict(keep_vars=True).items():
        own = x.to_local() if hasattr(x, "to_local") else x
        other, before = first.setdefault(own.data_ptr(), (name, x)) if own.data_ptr() else (name, x)
        if before is not x:
            raise CheckpointError(
                f"{other} and {name} share their memory, but after loading from a file they would be separate: let "
                f"both be the same torch.nn.Parameter, or give each its own (`torch.nn.Parameter(x.detach().clone())`)"
            )
        if other != name:
            shared[name] = other
    return shared


def _share(stack: ShiftStack, tensors: dict[str, Tensor], shared: Any, path: Path) -> dict[str, Tensor]:
    """Let a stack share what a description says, and return the tensors under all names.

    Raises:
        CheckpointError: it says something else.
    """
    own, whole = stack.state_dict(keep_vars=True), dict(tensors)
    said: dict[str, Any] = shared if isinstance(shared, dict) else {str(shared): None}
    for name, first in said.items():
        fits = isinstance(first, str) and first in tensors and first in own and name in own and name not in tensors
        if not fits or own[name].shape != own[first].shape or type(own[name]) is not type(own[first]):
            raise CheckpointError(f"{path} says that {name!r} and {first!r} are shared, which they can't be")
        (to, _, to_name), (of, _, of_name) = name.rpartition("."), first.rpartition(".")
        kind = "_parameters" if of_name in stack.get_submodule(of)._parameters else "_buffers"
        vars(stack.get_submodule(to))[kind][to_name] = own[first]
        whole[name] = tensors[first]
    return whole


def _read(path: Path, most: int) -> bytes:
    """A regular file of a sane size, read once.

    Raises:
        OSError: it can't be read.
        ValueError: it is something else, such as a link to a device, or too large.
    """
    if not path.is_file():
        raise ValueError("there is no such file" if not path.exists() else "it is not a regular file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is larger than the {most} bytes that it may have")
    return content


def read_description(path: Path) -> dict[str, Any]:
    """What the file beside the tensors says.

    Raises:
        CheckpointError: it can't be read, or does not describe shifts of this version.
    """
    try:
        found = json.loads(_read(path, _LONGEST).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise CheckpointError(f"{path} does not describe shifts: expected an object with format {FORMAT!r}")
    if found.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {found.get('version')!r}, this mimic_core reads version {VERSION}; update mimic_core"
        )
    return found


def _described(spec: ModelSpec) -> dict[str, Any]:
    """The sizes and sites, without the reasons for missing sites, and without the pass where it is the first."""
    data = asdict(spec)
    for layer in data["layers"]:
        del layer["missing"]
        if not layer["run"]:
            del layer["run"]
    return data


def _without_empty(origin: dict[str, Any]) -> dict[str, Any]:
    """Without the adapter, where the model says by its type where its sites are."""
    return {key: x for key, x in origin.items() if key != "adapter" or x}


def _spec_from_dict(data: Mapping[str, Any]) -> ModelSpec:
    layers = tuple(LayerSpec(**{**layer, "sites": tuple(layer["sites"])}) for layer in data["layers"])
    return ModelSpec(data["model_type"], data["hidden_size"], layers)


def _problems(stack: ShiftStack, tensors: Mapping[str, Tensor]) -> str:
    """Why tensors are not those of a stack, in words; empty: they are."""
    own = stack.state_dict()
    problems = [f"{name} is missing" for name in own if name not in tensors]
    problems += [f"{name} is not known" for name in tensors if name not in own]
    problems += [
        f"{name} is {list(tensors[name].shape)}, not {list(x.shape)}"
        for name, x in own.items()
        if name in tensors and tensors[name].shape != x.shape
    ]
    problems += [
        f"{name} is {x.dtype}"
        for name, x in tensors.items()
        if x.dtype not in _DTYPES and (name not in own or x.dtype != own[name].dtype)
    ]
    problems += [f"{name} holds NaN or infinity" for name in not_finite(tensors)]
    more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
    return f"{'; '.join(problems[:4])}{more}"
