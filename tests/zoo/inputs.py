"""Inputs of a tiny model: its text, and the tokens that stand for the images in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mimic_core.errors import UnsupportedModelError

from .images import IMAGES, NEED_IMAGES, Images, default_images
from .sizes import FIRST_TEXT_ID, SpecialIds

SHORTER = 3
_PIXELS = {"pixel_values", "pixel_values_images", "flattened_patches", "image_patches"}
_STARTS = ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index")
_ENDS = ("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index")
_PLACES = ("mm_token_type_ids", "token_type_ids", "image_embeds_position_mask")
_PLACEHOLDERS = ("image_token_id", "image_token_index", "image_patch_id")


def forward_names(model: PreTrainedModel) -> set[str]:
    """The named arguments of a forward, and of the models inside that are handed the others."""
    names: set[str] = set()
    inner: Any = model
    for child in ("model", "encoder", None):
        parameters = inspect.signature(inner.forward).parameters
        names |= set(parameters)
        inner = getattr(inner, child, None) if child else None
        if inner is None or not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return names


def takes_images(model: PreTrainedModel) -> bool:
    """Whether a model's forward takes pixels."""
    return bool(forward_names(model) & _PIXELS)


def needs_images(model: PreTrainedModel) -> bool:
    """Whether a forward over text alone is an error."""
    return model.config.model_type in NEED_IMAGES


def has_encoder(model: PreTrainedModel) -> bool:
    """Whether the text is a decoder's beside an encoder."""
    return "decoder_input_ids" in inspect.signature(model.forward).parameters and model.config.is_encoder_decoder


def _has_learned_positions(model: PreTrainedModel) -> bool:
    """Whether positions are looked up by column unless they are given, so that padding on the left would shift them."""
    names = {"wpe", "position_embeddings", "position_embedding", "positions_embed"}
    tables = (module for name, module in model.named_modules() if name.rpartition(".")[2] in names)
    # With a padding index they are counted from the ids instead.
    by_column = any(isinstance(table, nn.Embedding) and table.padding_idx is None for table in tables)
    return by_column and "position_ids" in inspect.signature(model.forward).parameters


def build(
    model: PreTrainedModel,
    ids: SpecialIds,
    generator: torch.Generator,
    *,
    images: bool,
    padding: Literal["right", "left"] | None,
    length: int,
) -> dict[str, Tensor]:
    """The keyword arguments of one forward: see `TinyModel.inputs`."""
    known = forward_names(model)
    if padding is not None and not known & {"attention_mask", "decoder_attention_mask"}:
        raise UnsupportedModelError(f"{type(model).__name__} takes no attention mask, so its text can't be padded")
    text = torch.randint(ids.text.start, ids.text.stop, (2, length), generator=generator)
    rows = [text[0].tolist(), text[1, : length - SHORTER].tolist() if padding else text[1].tolist()]
    source = torch.randint(ids.text.start, ids.text.stop, (2, 8), generator=generator).tolist()
    found = _images(model, generator) if images or needs_images(model) else None
    inputs: dict[str, Tensor] = dict(found.values) if found else {}
    tokens = found.tokens if found else 0
    if has_encoder(model):
        inputs |= _text(rows, padding, "decoder_")
        if "input_ids" in inspect.signature(model.get_encoder().forward).parameters:
            inputs |= _text(_with_placeholders(model, ids, source, tokens), None)
    else:
        inputs |= _text(_with_placeholders(model, ids, rows, tokens), padding)
        if padding == "left" and not tokens and _has_learned_positions(model):
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    if tokens:
        places = (inputs["input_ids"] == _placeholder(model, ids)).long()
        inputs |= {name: places for name in _PLACES if name in inspect.signature(model.forward).parameters}
    if model.config.model_type in _EXTRAS:
        inputs |= _EXTRAS[model.config.model_type](model, inputs, tokens)
    return {name: value for name, value in inputs.items() if name in known}


def _text(rows: list[list[int]], padding: Literal["right", "left"] | None, prefix: str = "") -> dict[str, Tensor]:
    """Ids and mask, filled up to the longest row."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, 2, width, dtype=torch.long)
    for index, row in enumerate(rows):
        real = slice(width - len(row), None) if padding == "left" else slice(len(row))
        ids[index, real] = torch.tensor(row)
        mask[index, real] = 1
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}


def _with_placeholders(model: PreTrainedModel, ids: SpecialIds, rows: list[list[int]], tokens: int) -> list[list[int]]:
    if not tokens:
        return rows
    before, after = _marks(model, _STARTS), _marks(model, _ENDS)
    image = [*before, *[_placeholder(model, ids)] * tokens, *after]
    return [[row[0], *image, *row[1:]] for row in rows]


def _images(model: PreTrainedModel, generator: torch.Generator) -> Images:
    with torch.no_grad():
        return IMAGES.get(model.config.model_type, default_images)(model, generator)


def _placeholder(model: PreTrainedModel, ids: SpecialIds) -> int:
    if model.config.model_type == "instructblipvideo":
        return model.config.video_token_index
    found = _marks(model, _PLACEHOLDERS)
    return found[0] if found else ids.of("image")


def _marks(model: PreTrainedModel, names: tuple[str, ...]) -> list[int]:
    """The first of some token ids that a config has, as a list of one; else an empty one."""
    config = getattr(model.config, "vlm_config", model.config)
    values = (getattr(config, name, None) for name in names)
    return [value for value in values if value is not None][:1]


# What else a forward takes, by model type: of the model, the inputs so far and the number of tokens of an image.


def _boxes(model: Any, inputs: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """Where on the page each token of the encoder stands."""
    count = inputs["input_ids"].shape[1]
    left = torch.linspace(0.0, 0.8, count)
    box = torch.stack([left, left, left + 0.1, left + 0.2], -1)
    return {"bbox": box.expand(2, -1, -1).contiguous()}


def _image_seen_by_all(model: Any, inputs: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    return {"image_attention_mask": torch.ones(*inputs["input_ids"].shape, 1, dtype=torch.long)}


def _first_tile_seen(model: Any, inputs: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    if not tokens:
        return {}
    tiles = model.config.vision_config.max_num_tiles
    seen = torch.zeros(*inputs["input_ids"].shape, 1, tiles, dtype=torch.long)
    seen[..., 0] = 1
    return {"cross_attention_mask": seen}


def _question(model: Any, inputs: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """The text for the Q-Former: a fixed one."""
    ids = torch.arange(FIRST_TEXT_ID, FIRST_TEXT_ID + 5).expand(2, -1).contiguous()
    return {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


def _proteins(model: Any, inputs: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    ids = torch.arange(FIRST_TEXT_ID, FIRST_TEXT_ID + 6).expand(2, -1).contiguous()
    return {"protein_input_ids": ids, "protein_attention_mask": torch.ones_like(ids)}


def _canvas(model: Any, inputs: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """The text to be refined: without it the forward draws one."""
    length = model.config.canvas_length
    return {"decoder_input_ids": torch.arange(FIRST_TEXT_ID, FIRST_TEXT_ID + 2 * length).view(2, length)}


_EXTRAS: dict[str, Callable[[Any, dict[str, Tensor], int], dict[str, Tensor]]] = {
    "diffusion_gemma": _canvas,
    "evolla": _proteins,
    "idefics": _image_seen_by_all,
    "instructblip": _question,
    "instructblipvideo": _question,
    "mllama": _first_tile_seen,
    "udop": _boxes,
}
