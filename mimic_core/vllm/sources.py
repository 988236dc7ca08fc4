"""Which stacks an engine serves: their names, their folders, and a digest of what is in them."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint import hub
from ..checkpoint.files import read_description
from ..errors import CheckpointError, MimicError, PatchStateError, UnknownNameError, WrongTypeError
from ..heads.base import head_class
from ..positions import Positions
from .hooks import PUT

# The key of vLLM's `additional_config`, and that of a request's `extra_args`.
SHIFTS = "shifts"
# Another key of the `additional_config`: stacks are served on CUDA, although no card was there to try it.
UNTRIED = "shifts_on_untried_cuda"


class Source(NamedTuple):
    """A folder with a stack, a digest of its two files, and the positions on which its parts act, if not on all.

    A request carries the digest, so it never gets another stack.
    """

    folder: str
    digest: str
    positions: tuple[Positions, ...]


def engine_args(
    shifts: Mapping[str, str | os.PathLike[str]] | None = None, *, on_untried_cuda: bool = False
) -> dict[str, Any]:
    """The arguments that `vllm.LLM` or `vllm.EngineArgs` needs to serve stacks.

        llm = LLM("my/model", **mimic_core.vllm.engine_args(shifts={"vqa": "vqa-shifts", "caption": "me/caption"}))
        llm.generate(prompts, SamplingParams(extra_args={"shifts": "vqa", "strength": 1.0}))

    Args:
        shifts: The sources of the stacks by name: directories, or repositories of the Hugging Face Hub. None or empty:
            the engine starts without a stack, and they can be added later.
        on_untried_cuda: Serve on a GPU too, which was never tried: docs/serve.md says what to compare first.

    Raises:
        UnknownNameError: a name is no string, or empty.
        PatchStateError: vLLM does not load the plugin, so nothing would be shifted.
    """
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    if not PUT:
        raise PatchStateError(
            "vLLM did not load the plugin of mimic_core: install mimic_core with pip, so that vLLM finds its entry "
            "point, and if VLLM_PLUGINS is set, name mimic_core in it"
        )
    named = {check_name(name): os.fspath(source) for name, source in (shifts or {}).items()}
    untried = {UNTRIED: True} if on_untried_cuda else {}
    return {"additional_config": {SHIFTS: named, **untried}, "enforce_eager": True}


def check_name(name: object) -> str:
    """Return the name of a stack.

    Raises:
        UnknownNameError: it is none.
    """
    if not isinstance(name, str) or not name:
        raise UnknownNameError(f"the name of a stack is a string that is not empty; found {name!r}")
    return name


def sources_of(vllm_config: Any) -> dict[str, Any] | None:
    """What the operator said, by name; None: the engine serves no stacks.

    Raises:
        WrongTypeError: it is no dict of strings.
    """
    config = vllm_config.additional_config
    found = config.get(SHIFTS) if isinstance(config, Mapping) else None
    if found is not None and not isinstance(found, dict):
        raise WrongTypeError(
            f"the stacks that vLLM serves are given as {{'{SHIFTS}': {{name: source}}}} in its additional_config; "
            f"found {found!r}"
        )
    return found


def resolve(source: object) -> Source:
    """The folder of a source, downloaded if need be, and what is in it now.

    Raises:
        CheckpointError: there is no stack at `source`, or none of heads that are registered.
    """
    if not isinstance(source, str):
        raise CheckpointError(f"the source of a stack is a directory or a hub repository; found {source!r}")
    folder = str(hub.folder_of(source, None, None, None).resolve())
    digest = digest_of(folder)
    described = read_description(Path(folder, hub.FILES[1]))
    try:
        head, config = described["head"], described["config"]
        parts = zip(head, config, strict=True) if isinstance(head, list) else [(head, config)]
        configs = [head_class(name).config_class.from_dict(options) for name, options in parts]
    except (KeyError, TypeError, ValueError, AttributeError, MimicError) as error:
        raise CheckpointError(f"{hub.FILES[1]} at {folder} does not describe a stack: {error}") from error
    positions: dict[Positions, None] = dict.fromkeys(config.positions for config in configs)
    return Source(folder, digest, tuple(one for one in positions if one != "all"))


def digest_of(folder: str) -> str:
    """A digest of the two files of a stack.

    Raises:
        CheckpointError: one of them can't be read.
    """
    found = hashlib.sha256()
    for name in hub.FILES:
        try:
            found.update(hashlib.sha256(Path(folder, name).read_bytes()).digest())
        except OSError as error:
            raise CheckpointError(f"{name} of the stack at {folder} can't be read: {error}") from error
    return found.hexdigest()
