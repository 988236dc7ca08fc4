"""Images as the vision towers take them, by model type where it isn't one tensor of pixels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

GRID = 4  # patches along a side, where a model takes patches
CHANNELS = 3


@dataclass(frozen=True)
class Images:
    """One image a sample, as arguments of a forward, and how many tokens stand for it in the text."""

    values: dict[str, Tensor]
    tokens: int


Recipe = Callable[[PreTrainedModel, torch.Generator], Images]


def default_images(model: PreTrainedModel, generator: torch.Generator) -> Images:
    """Pixels of the tower's image size, or rows of patches where the forward asks for their grid."""
    vision = _vision(model)
    if "image_grid_thw" in inspect.signature(model.forward).parameters:
        return _counted(model, _grid(generator, (_patch_width(vision),)))
    side = _side(vision)
    values = {"pixel_values": torch.randn(2, CHANNELS, side, side, generator=generator)}
    if "image_sizes" in _asked_for(model):
        values["image_sizes"] = torch.tensor([[side, side]] * 2)
    return _counted(model, values)


def _vision(model: PreTrainedModel) -> Any:
    return getattr(model.config, "vision_config", None) or model.config


def _one(value: Any) -> int:
    return value[0] if isinstance(value, list | tuple) else value


def _side(vision: Any) -> int:
    return _one(getattr(vision, "image_size", None) or 16)


def _patch_width(vision: Any) -> int:
    """Numbers in a patch, over its frames."""
    frames = getattr(vision, "temporal_patch_size", getattr(vision, "patch_temporal", 1))
    return CHANNELS * _one(frames) * _one(vision.patch_size) ** 2


def _still_patch_width(model: PreTrainedModel) -> int:
    return CHANNELS * _one(_vision(model).patch_size) ** 2


def _grid(generator: torch.Generator, patch: tuple[int, ...], name: str = "image_grid_thw") -> dict[str, Tensor]:
    """Patches of both images in a row, and the grids they came from."""
    pixels = torch.randn(2 * GRID**2, *patch, generator=generator)
    shape = [1, GRID, GRID] if name.endswith("thw") else [GRID, GRID]
    return {"pixel_values": pixels, name: torch.tensor([shape] * 2)}


def _counted(model: PreTrainedModel, values: dict[str, Tensor]) -> Images:
    """Ask the model itself how many features it makes of an image."""
    known = _known(model)
    taken = {name: value for name, value in values.items() if name in known or "args" in known}
    settings = {name: getattr(_vision(model), name, None) for name in _asked_for(model) - set(values)}
    found = _owner(model).get_image_features(**taken, **settings)
    features = getattr(found, "pooler_output", None)
    if features is None and hasattr(found, "deepstack_features"):
        # Pairs of a decoder layer and the features it adds to the same tokens.
        features = found.deepstack_features[0][1]
    if features is None:
        features = getattr(found, "last_hidden_state", found)
    return Images(values, sum(part.numel() // part.shape[-1] for part in _tensors(features)) // 2)


def _owner(model: PreTrainedModel) -> Any:
    """What makes features of images: the model, the one inside it, or the encoder of that."""
    inner = getattr(model, "model", None)
    candidates = (inner, model, getattr(inner, "encoder", None))
    return next(found for found in candidates if hasattr(found, "get_image_features"))


def _known(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(_owner(model).get_image_features).parameters)


def _asked_for(model: PreTrainedModel) -> set[str]:
    """What get_image_features can't do without."""
    parameters = inspect.signature(_owner(model).get_image_features).parameters.values()
    return {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value:
            yield from _tensors(item)


def _pixels(model: PreTrainedModel, generator: torch.Generator, *lead: int) -> Tensor:
    side = _side(_vision(model))
    return torch.randn(2, *lead, CHANNELS, side, side, generator=generator)


def _without_tokens(model: PreTrainedModel, generator: torch.Generator) -> Images:
    """The image reaches the text through attention, or in front of it."""
    return Images({"pixel_values": _pixels(model, generator)}, 0)


def _tiles(model: PreTrainedModel, generator: torch.Generator) -> Images:
    return _counted(model, {"pixel_values": _pixels(model, generator, 1)})


def _any_resolution(model: PreTrainedModel, generator: torch.Generator) -> Images:
    """The whole image, and beside it two tiles of it."""
    side = _side(_vision(model))
    values = {"pixel_values": _pixels(model, generator, 3), "image_sizes": torch.tensor([[side, 2 * side]] * 2)}
    return _counted(model, values)


def _masked_tiles(model: PreTrainedModel, generator: torch.Generator) -> Images:
    mask = torch.ones(2, 1, dtype=torch.bool)
    return _counted(model, {"pixel_values": _pixels(model, generator, 1), "pixel_attention_mask": mask})


def _two_resolutions(model: PreTrainedModel, generator: torch.Generator) -> Images:
    side = _side(model.config.high_res_vision_config)
    high = torch.randn(2, CHANNELS, side, side, generator=generator)
    return _counted(model, {"pixel_values": _pixels(model, generator), "high_res_pixel_values": high})


def _placed_patches(model: PreTrainedModel, generator: torch.Generator, pooled: int = 1) -> Images:
    """Patches with their columns and rows."""
    side = torch.arange(GRID)
    places = torch.cartesian_prod(side, side).flip(-1).expand(2, -1, -1)
    width = pooled**2 * _patch_width(_vision(model))
    return _counted(
        model,
        {"pixel_values": torch.rand(2, GRID**2, width, generator=generator), "image_position_ids": places.contiguous()},
    )


def _patch_rows(model: PreTrainedModel, generator: torch.Generator) -> Images:
    pixels = torch.randn(2, GRID**2, _patch_width(_vision(model)), generator=generator)
    found = _counted(model, {"pixel_values": pixels})
    # In transformers 5.1 the forward has another name for them.
    name = "pixel_values" if "pixel_values" in inspect.signature(model.forward).parameters else "image_patches"
    return Images({name: pixels}, found.tokens)


def _square_patches(model: PreTrainedModel, generator: torch.Generator) -> Images:
    side = _one(_vision(model).patch_size)
    return _counted(model, _grid(generator, (CHANNELS, side, side)))


def _merged_patches(model: PreTrainedModel, generator: torch.Generator) -> Images:
    """Patches already put together in blocks, channels last."""
    vision = _vision(model)
    side = vision.patch_size * vision.spatial_merge_size
    pixels = torch.randn(2 * 4, side, side, CHANNELS, generator=generator)
    return _counted(model, {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2, 2]] * 2)})


def _cubes(model: PreTrainedModel, generator: torch.Generator) -> Images:
    """Patches over several frames, channels last."""
    vision = _vision(model)
    shape = (vision.temporal_patch_size, vision.patch_size, vision.patch_size, CHANNELS)
    return _counted(model, {"pixel_values": torch.randn(2 * 4, *shape, generator=generator)})


def _sized_patches(model: PreTrainedModel, generator: torch.Generator) -> Images:
    """A strip of patches, with the height and width of each image."""
    side = _vision(model).patch_size
    strip = torch.randn(1, CHANNELS, side, 2 * GRID**2 * side, generator=generator)
    return _counted(model, {"pixel_values": strip, "target_sizes": torch.tensor([[GRID, GRID]] * 2)})


def _shaped_patches(model: PreTrainedModel, generator: torch.Generator) -> Images:
    values = {
        "pixel_values": torch.randn(2, GRID**2, _patch_width(_vision(model)), generator=generator),
        "spatial_shapes": torch.tensor([[GRID, GRID]] * 2),
        "pixel_attention_mask": torch.ones(2, GRID**2, dtype=torch.long),
    }
    return _counted(model, values)


def _merge_sizes(model: PreTrainedModel, generator: torch.Generator) -> Images:
    values = _grid(generator, (_patch_width(_vision(model)),))
    return _counted(model, values | {"image_merge_sizes": torch.tensor([2, 2])})


def _grid_hw(model: PreTrainedModel, generator: torch.Generator) -> Images:
    return _counted(model, _grid(generator, (_still_patch_width(model),), "image_grid_hw"))


def _pooled_patches(model: PreTrainedModel, generator: torch.Generator) -> Images:
    """Patches, and which of them are pooled to one token: here blocks of four."""
    pixels = torch.randn(2, GRID**2, _still_patch_width(model), generator=generator)
    blocks = torch.arange(2 * GRID**2).view(2, GRID // 2, 2, GRID // 2, 2).transpose(2, 3).reshape(-1, 4)
    values = {
        "pixel_values": pixels,
        "image_token_pooling": blocks,
        "image_grids": torch.tensor([[0, 0, GRID // 2, GRID // 2]] * 2),
        "image_num_crops": torch.tensor([1, 1]),
    }
    return Images(values, _counted(model, values).tokens)


def _flattened(model: PreTrainedModel, generator: torch.Generator) -> Images:
    """Patches, each behind its row and column."""
    side = torch.arange(1, GRID + 1)
    places = torch.cartesian_prod(side, side).expand(2, -1, -1)
    pixels = torch.randn(2, GRID**2, _vision(model).patch_embed_hidden_size, generator=generator)
    values = {"flattened_patches": torch.cat([places.float(), pixels], -1)}
    return Images(values, getattr(model.config, "latent_query_num", 0))


def _aspect_tiles(model: PreTrainedModel, generator: torch.Generator) -> Images:
    """One image of as many tiles as the model has, of which the first is filled."""
    tiles = model.config.vision_config.max_num_tiles
    filled = torch.zeros(2, 1, tiles, dtype=torch.long)
    filled[..., 0] = 1
    values = {
        "pixel_values": _pixels(model, generator, 1, tiles),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": filled,
    }
    return Images(values, 1)


def _frames(model: PreTrainedModel, generator: torch.Generator) -> Images:
    frames = 4
    return Images({"pixel_values": _pixels(model, generator, frames)}, frames * model.config.num_query_tokens)


def _queries(model: PreTrainedModel, generator: torch.Generator) -> Images:
    return Images({"pixel_values": _pixels(model, generator)}, model.config.num_query_tokens)


def _beside_video(model: PreTrainedModel, generator: torch.Generator) -> Images:
    pixels = _pixels(model, generator)
    name = "pixel_values" if "pixel_values" in _known(model) else "pixel_values_images"
    return Images({"pixel_values_images": pixels}, _counted(model, {name: pixels}).tokens)


def _robot(model: PreTrainedModel, generator: torch.Generator) -> Images:
    """One camera, the state of a robot, and the noise its actions are made of."""
    config = model.config
    vision = config.vlm_config.vision_config
    pixels = torch.randn(2, 1, CHANNELS, vision.image_size, vision.image_size, generator=generator)
    values = {
        "pixel_values": pixels,
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
        "state": torch.randn(2, config.max_state_dim, generator=generator),
        "noise": torch.randn(2, config.chunk_size, config.max_action_dim, generator=generator),
        "timestep": torch.tensor([0.3, 0.6]),
    }
    return Images(values, (vision.image_size // vision.patch_size) ** 2)


IMAGES: dict[str, Recipe] = {
    "blip": _without_tokens,
    "blip-2": _queries,
    "deepseek_vl_hybrid": _two_resolutions,
    "diffusion_gemma": _placed_patches,
    "fuyu": _patch_rows,
    "gemma4": _placed_patches,
    "gemma4_unified": lambda model, generator: _placed_patches(model, generator, _vision(model).pooling_kernel_size),
    "git": _without_tokens,
    "granite4_vision": _any_resolution,
    "granite_docling": _masked_tiles,
    "idefics": lambda model, generator: Images({"pixel_values": _pixels(model, generator, 1)}, 0),
    "idefics2": _tiles,
    "idefics3": _tiles,
    "inkling2": _merged_patches,
    "inkling2_loop": _merged_patches,
    "inkling_mm_model": _cubes,
    "instructblip": _queries,
    "instructblipvideo": _frames,
    "kimi_k25": _square_patches,
    "kosmos-2": lambda model, generator: Images(
        {"pixel_values": _pixels(model, generator)}, model.config.latent_query_num
    ),
    "kosmos-2.5": _flattened,
    "lfm2_vl": _shaped_patches,
    "llava_next": _any_resolution,
    "llava_next_video": _any_resolution,
    "llava_onevision": _any_resolution,
    "minicpm_ocr": _sized_patches,
    "minicpmv4_6": _sized_patches,
    "minicpmv4_7": _sized_patches,
    "mllama": _aspect_tiles,
    "molmo2": _pooled_patches,
    "nemotron_h_omni": _grid_hw,
    "paddleocr_vl": _square_patches,
    "perception_lm": _tiles,
    "pi0": _robot,
    "pix2struct": _flattened,
    "pp_formulanet": _without_tokens,
    "smolvlm": _tiles,
    "udop": _without_tokens,
    "video_llama_3": _merge_sizes,
    "video_llava": _beside_video,
    "vision-encoder-decoder": _without_tokens,
}
# Models whose forward is an error without an image.
NEED_IMAGES = {"blip", "blip-2", "idefics", "instructblip", "instructblipvideo", "kosmos-2", "pi0", "pix2struct"}
NEED_IMAGES |= {"pp_formulanet", "vision-encoder-decoder"}
