"""Save and load stacks: the tensors as safetensors, the description as JSON. Nothing is unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as in_bytes
from torch import Tensor, nn

from ..adapters import locate
from ..build import place
from ..errors import CheckpointError, MimicError
from ..heads import ShiftStack, head_class
from ..heads.stack import check_stack
from ..types import LayerSpec, ModelSpec

# The base class of the HTTP client's errors: httpx in huggingface_hub 1.x, httpx2 in 2.x.
_HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]
FORMAT, VERSION = "mimic_core.shifts", 1
_TENSORS, _DESCRIPTION = "shifts.safetensors", "shifts.json"


def save_shifts(shifts: ShiftStack, path: str | os.PathLike[str], push_to_hub: str | None = None) -> None:
    """Write a stack to a directory: `shifts.safetensors` and `shifts.json`.

    Each file is replaced completely or not at all. The model is not saved.

    Args:
        path: The directory. It is created if it does not exist.
        push_to_hub: A hub repository ("user/name") for a copy of the two files. It is created if it does not exist.

    Raises:
        WrongTypeError: `shifts` is not a ShiftStack.
        CheckpointError: two parameters of the stack share a tensor, which a file cannot represent. Nothing is written.
    """
    check_stack(shifts)
    _check_untied(shifts)
    target = Path(path)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.detach().cpu().contiguous() for name, x in shifts.state_dict().items()}
    description = {
        "format": FORMAT,
        "version": VERSION,
        "head": shifts.name,
        "config": shifts.config.to_dict(),
        "model": _described(shifts.spec),
    }
    with TemporaryDirectory(dir=target, prefix=".saving-") as folder:
        # Not save_file: its files are readable only by their owner, whatever the umask is.
        Path(folder, _TENSORS).write_bytes(in_bytes(tensors, metadata={"format": "pt"}))
        Path(folder, _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        for name in (_TENSORS, _DESCRIPTION):
            os.replace(Path(folder, name), target / name)
    if push_to_hub is not None:
        api = HfApi()
        api.create_repo(push_to_hub, exist_ok=True)
        api.upload_folder(
            repo_id=push_to_hub,
            folder_path=target,
            allow_patterns=[_TENSORS, _DESCRIPTION],
            commit_message="Add shifts",
        )


def load_shifts(source: str | os.PathLike[str], model: nn.Module, revision: str | None = None) -> ShiftStack:
    """Load a stack that `save_shifts` wrote, for a model that it fits.

    Args:
        source: The directory, or a hub repository "user/name".
        revision: Branch, tag or commit of a hub repository.

    Returns:
        The stack, not yet patched into the model. Each head is on the device of its layer.

    Raises:
        CheckpointError: there is nothing at `source`; it is damaged or has another format or version; it needs a shift
            head that is not registered; or it was made for a model of other sizes.
        UnsupportedModelError: no adapter fits the model.
    """
    inner, _, spec = locate(model)
    folder = _folder(source, revision)
    description = _read_description(folder / _DESCRIPTION)
    try:
        head = head_class(description["head"])
        config = head.config_class.from_dict(description["config"])
        saved_spec = _spec_from_dict(description["model"])
        if misfit := saved_spec.misfit(spec):
            raise CheckpointError(f"shifts at {source} do not fit this model: they were made for {misfit}")
        stack = ShiftStack(head, config, spec)
    except CheckpointError:
        raise
    except (KeyError, TypeError, AttributeError, MimicError) as error:
        raise CheckpointError(
            f"{folder / _DESCRIPTION} does not describe shifts that this version can build: {error}; if the shift head "
            f"is from another package, import it first"
        ) from error
    try:
        tensors = load_file(folder / _TENSORS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / _TENSORS} can't be read: {error}; the file is damaged or missing") from error
    _fill(stack, tensors, str(folder / _TENSORS))
    return place(stack, inner)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that hold NaN or infinity."""
    return [name for name, x in tensors.items() if not torch.isfinite(x.float()).all()]


def _check_untied(shifts: ShiftStack) -> None:
    """Refuse shared tensors: a file holds each tensor separately, so they would be separate after loading."""
    names: dict[int, str] = {}
    for name, x in shifts.state_dict(keep_vars=True).items():
        if x.data_ptr() and (other := names.setdefault(x.data_ptr(), name)) != name:
            raise CheckpointError(
                f"{other} and {name} share their memory, but after loading from a file they would be separate: give "
                f"each layer its own tensor (`torch.nn.Parameter(x.detach().clone())`) before you save"
            )


def _folder(source: str | os.PathLike[str], revision: str | None) -> Path:
    local = Path(source)
    if local.is_dir():
        return local
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=[_TENSORS, _DESCRIPTION]))
    except (HFValidationError, _HTTPError, OSError) as error:
        raise CheckpointError(
            f"no shifts at {str(source)!r}: it is neither a local directory nor a hub repository that can be reached "
            f"({error})"
        ) from error


def _read_description(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise CheckpointError(f"{path} does not describe shifts: expected an object with format {FORMAT!r}")
    if found.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {found.get('version')!r}, this mimic_core reads version {VERSION}; update mimic_core"
        )
    return found


def _described(spec: ModelSpec) -> dict[str, Any]:
    """The sizes and sites, without the reasons for missing sites."""
    data = asdict(spec)
    for layer in data["layers"]:
        del layer["missing"]
    return data


def _spec_from_dict(data: Mapping[str, Any]) -> ModelSpec:
    layers = tuple(LayerSpec(**{**layer, "sites": tuple(layer["sites"])}) for layer in data["layers"])
    return ModelSpec(data["model_type"], data["hidden_size"], layers)


def _fill(stack: ShiftStack, tensors: Mapping[str, Tensor], where: str) -> None:
    own = stack.state_dict()
    problems = [f"{name} is missing" for name in own if name not in tensors]
    problems += [f"{name} is not known" for name in tensors if name not in own]
    problems += [
        f"{name} is {list(tensors[name].shape)}, not {list(x.shape)}"
        for name, x in own.items()
        if name in tensors and tensors[name].shape != x.shape
    ]
    problems += [f"{name} holds NaN or infinity" for name in not_finite(tensors)]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(f"{where} does not fit its description: {'; '.join(problems[:4])}{more}")
    stack.load_state_dict(dict(tensors))
