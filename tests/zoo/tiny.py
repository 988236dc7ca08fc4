"""A tiny random model of any model type, with inputs for it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from mimic_core.errors import UnknownNameError, UnsupportedModelError

from .config import small_config
from .inputs import build, needs_images, takes_images
from .sizes import VOCABULARY, SpecialIds
from .table import UNSUPPORTED

Task = Literal["image-text-to-text", "causal-lm"]
Padding = Literal["right", "left"]
_CLASSES: dict[Task, Mapping[str, Any]] = {
    "image-text-to-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
SPREAD = 0.2


@dataclass(frozen=True)
class TinyModel:
    """A model with random weights and what its forward takes.

    Beside an encoder the text is the decoder's (`decoder_input_ids`), and the encoder's input is always full.
    `model` is in eval mode, fp32, on the CPU, without gradients for its weights.
    """

    model_type: str
    task: Task
    model: PreTrainedModel
    ids: SpecialIds
    seed: int = 0

    @property
    def has_images(self) -> bool:
        """Whether `inputs(images=True)` can be asked for."""
        return takes_images(self.model)

    @property
    def needs_images(self) -> bool:
        """Whether the model has no forward over text alone: `inputs` then always has images."""
        return needs_images(self.model)

    def inputs(self, images: bool = False, padding: Padding | None = None, length: int = 12) -> dict[str, Tensor]:
        """Two samples, as keyword arguments of the model's forward.

        Args:
            images: One image a sample, and as many tokens that stand for it as the model asks for, besides the text.
            padding: The side on which the second sample, of three tokens less, is filled up; None: both are full.
            length: Text tokens of the first sample.

        Raises:
            UnsupportedModelError: images or padding are asked for, and the model takes no images or no mask.
        """
        if images and not self.has_images:
            raise UnsupportedModelError(f"{self.model_type} takes no images")
        generator = torch.Generator().manual_seed(self.seed)
        return build(self.model, self.ids, generator, images=images, padding=padding, length=length)


def tiny(model_type: str, *, seed: int = 0, task: Task | None = None) -> TinyModel:
    """Build a tiny model with every kind of layer of its family.

    Args:
        model_type: One that transformers' AutoModelForImageTextToText or AutoModelForCausalLM knows.
        seed: Of the weights and the inputs.
        task: Which of the two classes, where there are both; by default the former.

    Raises:
        UnknownNameError: the installed transformers has no such model type for the task.
        UnsupportedModelError: the model can't be built here, with the reason.
    """
    task = task or next((name for name, classes in _CLASSES.items() if model_type in classes), None)
    if task is None or model_type not in _CLASSES[task]:
        where = f"for {task}" if task else "with image-text-to-text or causal-lm models"
        raise UnknownNameError(f"transformers {transformers.__version__} has no model type {model_type!r} {where}")
    if model_type in UNSUPPORTED:
        raise UnsupportedModelError(f"no tiny {model_type}: {UNSUPPORTED[model_type]}")
    model_class = _model_class(model_type, task)
    ids = SpecialIds()
    config = _config(model_type, task, model_class, ids)
    ids.of("image")  # also where no field of the config names it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = model_class(config)
        except ImportError as error:
            raise UnsupportedModelError(f"{model_type} can't be built here: {error}") from error
        _spread(model)
    if model_type == "llama4" and task == "image-text-to-text":
        model.get_submodule("language_model").register_forward_hook(_with_image_outputs)
        model.get_submodule("vision_model").register_forward_hook(_with_pooled)
    if (generation := getattr(model, "generation_config", None)) is not None:
        # An image's placeholder among generated tokens would ask for an image that isn't there.
        generation.suppress_tokens = list(range(ids.text.stop, VOCABULARY))
    model.eval().requires_grad_(False)
    return TinyModel(model_type, task, model, ids, seed)


def _model_class(model_type: str, task: Task) -> type[PreTrainedModel]:
    found = _CLASSES[task][model_type]
    name = found if isinstance(found, str) else found[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise UnsupportedModelError(f"transformers names {name} for {model_type}, but does not have this class")
    return model_class


def _config(model_type: str, task: Task, model_class: type[PreTrainedModel], ids: SpecialIds) -> PreTrainedConfig:
    """The small config the class takes: of the model type, or the text part of it."""
    config_class, wanted = CONFIG_MAPPING[model_type], model_class.config_class
    # The text part of a family whose causal class is of the text alone.
    if wanted is not None and wanted is not config_class and wanted.__module__ == config_class.__module__:
        config_class = wanted
    causal = task == "causal-lm" and "is_decoder" in inspect.signature(config_class).parameters
    return small_config(config_class, ids, overrides={"is_decoder": True} if causal else None)


def _with_image_outputs(module: nn.Module, args: Any, output: Any) -> None:
    """Llama4 of transformers 5.24 reads a field of its text model's output that isn't there."""
    if not hasattr(output, "image_outputs"):
        object.__setattr__(output, "image_outputs", None)


def _with_pooled(module: nn.Module, args: Any, output: Any) -> None:
    """Llama4 of transformers 5.1 does so with its vision model."""
    if not hasattr(output, "pooler_output"):
        object.__setattr__(output, "pooler_output", output.last_hidden_state)


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Move every weight away from where it leaves its layer without effect.

    Matrices get a deviation large enough for a tiny width; what is constant (norms, biases, gates that start closed)
    gets noise around its constant.
    """
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        if parameter.ndim >= 2:
            fan_in = parameter[0].numel() if parameter.ndim != 3 else parameter.shape[-1]
            parameter.normal_(0.0, min(SPREAD, 1.7 * fan_in**-0.5))
        elif bool((parameter == parameter.flatten()[0]).all()):
            noise = torch.randn_like(parameter)
            # A lone gate at zero must open, whichever way the dice fall.
            parameter.add_(0.5 * noise.sign() if parameter.numel() == 1 else 0.1 * noise)
    for module in model.modules():
        # Codes of one length, so that the direction of what is looked up decides, and not always the shortest code.
        if "Quantizer" in type(module).__name__:
            for codes in (inner for inner in module.modules() if isinstance(inner, nn.Embedding)):
                codes.weight.copy_(functional.normalize(codes.weight.normal_(), dim=-1))
