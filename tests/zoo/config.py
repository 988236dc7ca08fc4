"""Small values for every size a config class has, found by the names of its fields."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import is_dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from .sizes import BY_ROLE, EVEN_IF_NONE, LAYER_KINDS, PARTNERS, SIZES, SPECIAL_IDS, VOCABULARY, SpecialIds
from .table import CONFIGS, NEW_ID

_SPECIAL = re.compile(r"(.+?)_(?:token_id|token_index|index|id)$")
# Ids of these stems are not tokens.
_NOT_TOKENS = {"altup_active", "cls", "lang", "loop_layer_start", "loop_layer_end", "moe_layer_start", "moe_layer_end"}


def small_config(
    config_class: type[PreTrainedConfig],
    ids: SpecialIds,
    *,
    role: str = "text",
    overrides: Mapping[str, Any] | None = None,
) -> PreTrainedConfig:
    """A config with every layer kind of the class and small sizes.

    Args:
        config_class: Any config class of transformers.
        ids: Where special tokens get their ids from; one for the whole model.
        role: "text", or what part of the model the config is of ("vision", "audio").
        overrides: Values that go before everything else; for a sub-config a mapping of its own.
    """
    # Copied: config classes change lists and dicts they are given.
    table = deepcopy(CONFIGS.get(config_class.__name__.removesuffix("Config"), {})) | dict(overrides or {})
    table = {name: _filled(name, value, ids) for name, value in table.items()}
    # As the class itself gives it: shows which sub-configs and kinds of layers there are.
    made = _default(config_class)
    default = vars(made) if made else {}
    declared = {name: parameter.default for name, parameter in inspect.signature(config_class).parameters.items()}
    parts = {name: type(value) for name, value in default.items() if isinstance(value, PreTrainedConfig)}
    foreign = {name: CONFIG_MAPPING[value["config_class"]] for name, value in table.items() if _is_foreign(value)}
    parts |= foreign
    values: dict[str, Any] = {}
    for name, open_value in declared.items():
        if name not in parts:
            small = _small(name, default.get(name, open_value), open_value, role, ids)
            if small is not None:
                values[name] = small
    if "kv_lora_rank" in declared:
        # Latent attention gives every head keys and values of its own.
        values["num_key_value_heads"] = table.get("num_attention_heads", values["num_attention_heads"])
    rope = default.get("rope_parameters")
    if rope and "rope_theta" in rope and rope["rope_theta"] is None:
        values["rope_parameters"] = {**rope, "rope_theta": 10000.0}
    for name, part in parts.items():
        inner = table.pop(name, {})
        if isinstance(inner, Mapping):
            inner = {key: value for key, value in inner.items() if key != "config_class"}
            inner = small_config(part, ids, role=_role(name, part, role), overrides=inner)
        values[name] = inner
    # A part in another's place goes in when the config is made: its class may check for the one it expects.
    others = {name: values.pop(name) for name in [*values] if name in foreign}
    if not is_dataclass(config_class):
        # Older classes take dicts alone, and some silently leave out a config.
        values |= {name: _as_dict(values.get(name, others.get(name))) for name in parts}
    depth = table.get("num_hidden_layers", values.get("num_hidden_layers", 4))
    for name in LAYER_KINDS:
        # Where the class has the layers after some slide, it is left to it.
        ask_class = name == "layer_types" and "max_window_layers" in declared
        if name in declared and name not in table and default.get(name) and not ask_class:
            values[name] = _pattern(name, list(default[name]), depth)
    config = config_class(**(values | table))
    vars(config).update(others)
    return config


def _filled(name: str, value: Any, ids: SpecialIds) -> Any:
    """A value of the table, with the token ids it asks for."""
    if value is NEW_ID:
        found = _SPECIAL.match(name)
        return ids.of(found[1] if found else name)
    return value(ids) if callable(value) else value


def _is_foreign(value: Any) -> bool:
    return isinstance(value, Mapping) and "config_class" in value


def _as_dict(config: PreTrainedConfig | None) -> dict[str, Any] | None:
    return None if config is None else config.to_diff_dict() | {"model_type": config.model_type}


def _default(config_class: type[PreTrainedConfig]) -> PreTrainedConfig | None:
    """A config as its class makes it, or None where it makes none without arguments."""
    try:
        return config_class()
    except (ValueError, TypeError):
        return None


def _role(name: str, part: type[PreTrainedConfig], role: str) -> str:
    """What a sub-config is of, by its name in its parent or that of its class."""
    if role != "text":
        return role
    for found in ("vision", "audio", "qformer", "perceiver", "vq"):
        if found in name:
            return found
    return "vision" if part.__name__.startswith("ViT") else "text"


def _small(name: str, value: Any, declared: Any, role: str, ids: SpecialIds) -> Any:
    """The small value of a field, or None to leave it to its class."""
    special = _SPECIAL.match(name)
    if special and special[1] not in _NOT_TOKENS and (value is None or isinstance(value, int | list)):
        stem = special[1]
        big = isinstance(value, int) and value >= VOCABULARY
        if stem in SPECIAL_IDS or (role == "text" and (big or "token" in name or "image" in name)):
            return ids.of(stem)
        return None
    size = BY_ROLE.get(role, {}).get(name, SIZES.get(name))
    if size is None or (declared is None and name not in EVEN_IF_NONE):
        return None
    if isinstance(size, list):
        return size if isinstance(value, list | tuple) else None
    # A tower of stages has a list where others have a number: the table says what to do with it.
    if isinstance(value, list | tuple):
        return [size] * len(value) if len(set(value)) == 1 else None
    return size


def _pattern(name: str, found: list[str], depth: int) -> list[str]:
    """Every kind of layer once in the order they come, then again from the start (the last kind for MLPs)."""
    kinds = list(dict.fromkeys(found))
    if len(kinds) == 1 and kinds[0] in PARTNERS:
        kinds.append(PARTNERS[kinds[0]])
    if name in ("layer_types", "layers_block_type"):
        return [kinds[i % len(kinds)] for i in range(depth)]
    return [kinds[min(i, len(kinds) - 1)] for i in range(depth)]
