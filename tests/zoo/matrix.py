"""The kit over every model type of the installed transformers, a process for each, so that a crash costs a row."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ATTENTION = ("sdpa", "eager")
LENGTH = 16
"""Text tokens of a sample: more than every window, chunk and top-k of a tiny model."""


@dataclass(frozen=True)
class Place:
    """One row of the matrix: a model type and the mapping of transformers it is in."""

    model_type: str
    task: str

    @property
    def file(self) -> str:
        """Name of the row's file."""
        return f"{self.task}.{self.model_type}.json"


def every_place() -> list[Place]:
    """All image-text-to-text types, and the types that are in the causal-LM mapping alone."""
    from transformers.models.auto import modeling_auto

    image_text = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    rows = [Place(name, "image-text-to-text") for name in sorted(image_text)]
    return rows + [Place(name, "causal-lm") for name in sorted(causal)]


def check_type(place: Place, quick: bool = False) -> dict[str, Any]:
    """Build the type's tiny model and run the kit with each attention implementation, on text and on images.

    Args:
        quick: One run only: the first attention implementation it takes, with images where it takes them.

    Returns:
        JSON data: the class, its layers, and a run for each combination: laws by verdict, and the details of those that
        did not pass. Where there is no model, `refused` says why.
    """
    import torch
    import transformers

    from mimic_core.adapters import adapter_for
    from mimic_core.errors import MimicError

    from .tiny import tiny

    torch.set_num_threads(1)
    row: dict[str, Any] = {"type": place.model_type, "task": place.task, "runs": []}
    row["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    try:
        case = tiny(place.model_type, task=place.task)  # pyright: ignore[reportArgumentType]
    except MimicError as error:
        return row | {"refused": f"no tiny model: {error}"}
    row["class"] = type(case.model).__name__
    try:
        adapter = adapter_for(case.model)
        row["adapter"] = type(adapter).__name__
        row["layers"] = [
            {"sites": list(layer.sites), "missing": layer.missing} for layer in adapter.spec(case.model).layers
        ]
    except MimicError as error:
        return row | {"refused": str(error)}
    for attention in ATTENTION:
        for images in (True, False) if case.has_images else (False,):
            row["runs"].append({"attention": attention, "images": images} | _run(place, attention, images))
            if quick and "laws" in row["runs"][-1]:
                return row
    return row


def _run(place: Place, attention: str, images: bool) -> dict[str, Any]:
    from mimic_core.testing import check_adapter
    from mimic_core.testing.verdicts import Raised, attempt

    from .tiny import tiny

    case = tiny(place.model_type, task=place.task)  # pyright: ignore[reportArgumentType]
    if not images and case.needs_images:
        return {"skipped": "the class takes no text without images"}
    try:
        case.model.set_attn_implementation(attention)
    except ValueError as error:
        return {"skipped": f"transformers refuses {attention}: {str(error).partition('. ')[0]}"}
    inputs = case.inputs(images=images, length=LENGTH)
    if isinstance(ran := attempt(lambda: case.model(**inputs)), Raised):
        return {"skipped": f"the unpatched model does not run with {attention}: {ran}"}
    report = check_adapter(case.model, inputs, name=place.model_type)
    return {
        "laws": {law.law: law.verdict for law in report.rows},
        "details": {law.law: law.detail for law in report.rows if law.verdict != "passed"},
        "seconds": round(report.seconds, 2),
    }


def _write_row(place: Place, path: Path) -> None:
    """The whole of a row's process."""
    row = check_type(place)
    path.with_suffix(".part").write_text(json.dumps(row, indent=1) + "\n")
    path.with_suffix(".part").replace(path)


def run(places: Iterable[Place], folder: Path, jobs: int = 1, limit: float = 600.0) -> Iterator[dict[str, Any]]:
    """Fill a folder with a file for each row, and yield the rows as they come. Rows that are there are not run again.

    Args:
        jobs: How many processes at a time.
        limit: Seconds a row may take.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # One process imports torch and transformers, the others are its forks: else imports would take most of the time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mimic_core.testing", "transformers", "transformers.models.auto.modeling_auto"])

    def finish(place: Place) -> dict[str, Any]:
        path = folder / place.file
        if path.exists():
            return json.loads(path.read_text())
        process = context.Process(target=_write_row, args=(place, path))
        process.start()
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()
            end = f"took more than {limit:g} seconds"
        else:
            end = f"the process ended with {process.exitcode}"
        if path.exists():
            return json.loads(path.read_text())
        return {"type": place.model_type, "task": place.task, "runs": [], "crashed": end}

    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(finish, place) for place in places]):
            yield done.result()
