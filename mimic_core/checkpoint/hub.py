"""Stacks on the Hugging Face Hub: upload, download, and the model card."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import HfApi, ModelCardData, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from ..errors import CheckpointError, PatchStateError
from ..heads import ShiftStack
from ..parallel import is_sharded

FILES = ("shifts.safetensors", "shifts.json")
CARD = "README.md"
# The base class of the HTTP client's errors: httpx in huggingface_hub 1.x, httpx2 in 2.x.
_HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]


def check_one_pushes(shifts: ShiftStack) -> None:
    """Refuse a sharded stack: all processes gather it, so each would push it.

    Raises:
        PatchStateError: the parameters are sharded.
    """
    if is_sharded(shifts):
        raise PatchStateError(
            "the parameters of these shifts are sharded, and each process would push them: save them with "
            "mimic_core.save_shifts in all processes, then load_shifts in one process without sharding, and push that"
        )


def upload(
    folder: Path,
    repo_id: str,
    *,
    with_card: bool = False,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Add shifts",
) -> str:
    """Upload a saved stack. Repository and branch are created if they do not exist. Returns the commit's address.

    Args:
        with_card: Upload the model card too, if the branch has none.
    """
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    has_card = with_card and api.file_exists(repo_id, CARD, revision=revision)
    done = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=[*FILES, CARD] if with_card and not has_card else list(FILES),
        commit_message=commit_message,
        revision=revision,
    )
    return done.commit_url


def folder_of(
    source: str | os.PathLike[str],
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
) -> Path:
    """A directory with the files: `source` itself, or what was downloaded of a repository.

    Raises:
        CheckpointError: it is neither; or a directory is asked for a revision.
    """
    local = Path(source)
    if local.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{str(source)!r} is a local directory, which has no revision {revision!r}; leave `revision` out, or "
                f"give the name of a hub repository"
            )
        return local
    try:
        found = snapshot_download(
            str(source),
            revision=revision,
            allow_patterns=list(FILES),
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
        )
    except (HFValidationError, _HTTPError, OSError) as error:
        raise CheckpointError(
            f"no shifts at {str(source)!r}: it is neither a local directory nor a hub repository that can be reached "
            f"({error})"
        ) from error
    return Path(found)


def model_card(
    shifts: ShiftStack, repo_id: str | None = None, license: str | None = None, training: str | None = None
) -> str:
    """The text of `README.md` for a stack: what it is, what it was made for, and how it is used.

    Args:
        repo_id: Where it will be, for the snippet.
        license: An identifier of the Hub, such as "apache-2.0".
        training: How it was trained, as Markdown.
    """
    origin = shifts.origin
    base = base_model_of(shifts)
    data = ModelCardData(
        base_model=base,
        library_name="mimic_core",
        license=license,
        tags=[
            "mimic_core",
            "shift-head",
            *(part.name for part in shifts.parts),
            *([origin.model_type] if origin else []),
        ],
        base_model_relation="adapter" if base else None,
    )
    heads = list(shifts)
    sites = ", ".join(f"`{site}`" for site in dict.fromkeys(site for head in heads for site in head.edits()))
    numbers = sum(x.numel() for x in shifts.parameters())
    size = sum(x.numel() * x.element_size() for x in shifts.state_dict().values())
    layers = f"{len(shifts.layers)} of {len(shifts.spec.layers)}"
    made_for = f"[{base}](https://huggingface.co/{base})" if base else f"a model of type `{shifts.spec.model_type}`"
    configs = [part.config for part in shifts.parts]
    options = [(k, v) for x in configs for k, v in x.to_dict().items() if v != getattr(type(x)(), k)]
    name = repo_id or "path/to/this/directory"
    return f"""---
{data.to_yaml()}
---

# Shifts for {base or shifts.spec.model_type}

These are shift heads of [mimic_core](https://pypi.org/project/mimic_core/): small learned modules for the frozen
decoder of {made_for}. The model itself is not in this repository and does not change.

| | |
|---|---|
| head | `{shifts.name}` |
| options that are not the default | {", ".join(f"`{k}={v!r}`" for k, v in options) or "none"} |
| sites | {sites} |
| decoder layers with a head | {layers} |
| parameters | {numbers:,} |
| size | {size / 1024:,.1f} KiB |

```python
import mimic_core as mc
from transformers import {_auto_class(shifts.spec.model_type)} as Auto

model = Auto.from_pretrained("{base or "path/or/name/of/the/model"}")
shifts = mc.load_shifts("{name}", model)
with mc.patch(model, shifts):
    ...  # model(...) and model.generate(...) are shifted here
```

## Training

{training or "How these shifts were trained is not known to the library that wrote this card."}
"""


def base_model_of(shifts: ShiftStack) -> str | None:
    """The name on the Hub of the model that the shifts were made for. None if it is not known, or a local path."""
    name = "" if shifts.origin is None else shifts.origin.name_or_path
    return name if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not Path(name).exists() else None


def _auto_class(model_type: str) -> str:
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return "AutoModelForImageTextToText"
    return "AutoModelForCausalLM" if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "AutoModel"
