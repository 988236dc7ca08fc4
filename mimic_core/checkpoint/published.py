"""Load state dicts of the published MimIC and LIVE code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..build import build_shifts
from ..errors import CheckpointError
from ..heads import HeadConfig, LIVEConfig, MimICConfig, ShiftStack
from .files import not_finite

_GATE = re.compile(r"log_Z1_lin\.(\d+)\.(weight|bias)")


def shifts_from_reference(state_dict: Mapping[str, Tensor], model: nn.Module, log_z2: Any = "all_keys") -> ShiftStack:
    """Build a stack from a state dict of the published code.

    Names and shapes decide which variant it is:

    - MimIC: `attn_shift` [l h d] (per head) or [l h*d] (shared); `log_Z1_lin.<l>.weight` and `.bias` if it has gates;
      `ffn_shift` [l c] if it also shifts the MLP output.
    - LIVE: `ffn_shift` [l c] and `ffn_shift_scale` [l].
    - A norm-preserving vector on the attention output with a fixed scale: `attn_shift` [l c], `attn_shift_scale` [l].

    Args:
        state_dict: The state dict (load it with `torch.load(..., weights_only=True)`).
        log_z2: For gates: "all_keys" as in that code, "attended" as in the paper. See `MimICConfig`.

    Raises:
        CheckpointError: the names fit no variant, the sizes do not fit the model, or a number is NaN or infinite.
        UnsupportedModelError: no adapter fits the model.
    """
    config = _variant(state_dict, log_z2)
    if broken := not_finite(state_dict):
        raise CheckpointError(f"this state dict holds NaN or infinity in {', '.join(broken)}")
    stack = build_shifts(model, config)
    for index, head in enumerate(stack):
        for name, tensor in _layer_tensors(state_dict, index, config).items():
            own = getattr(head, name)
            # There, a shared gate is a linear layer with one output. Ours has no axis for the output.
            one = isinstance(config, MimICConfig) and config.shared and name.startswith("gate_")
            wanted = [1, *own.shape] if one else list(own.shape)
            if list(tensor.shape) != wanted:
                raise CheckpointError(
                    f"this state dict does not fit the model: {name} of layer {index} is {list(tensor.shape)}, the "
                    f"model needs {wanted} ({head.layer.heads} attention heads of {head.layer.head_dim}, hidden size "
                    f"{head.layer.hidden_size})"
                )
            own.data.copy_(tensor.reshape(own.shape))
    for name, x in state_dict.items():
        depth = int(gate[1]) + 1 if (gate := _GATE.fullmatch(name)) else x.shape[0]
        if depth > len(stack):
            raise CheckpointError(f"{name} of this state dict is for {depth} layers, the model has {len(stack)}")
    return stack


def _variant(state_dict: Mapping[str, Tensor], log_z2: Any) -> HeadConfig:
    gates = {name for name in state_dict if _GATE.fullmatch(name)}
    names = frozenset(state_dict) - gates
    attn, ffn = state_dict.get("attn_shift"), state_dict.get("ffn_shift")
    if attn is not None and names <= {"attn_shift", "ffn_shift"} and attn.ndim in (2, 3):
        return MimICConfig(shared=attn.ndim == 2, gate=bool(gates), log_z2=log_z2, mlp_vector=ffn is not None)
    if ffn is not None and not gates and names == {"ffn_shift", "ffn_shift_scale"}:
        return LIVEConfig(site="mlp_out")
    if attn is not None and not gates and names == {"attn_shift", "attn_shift_scale"}:
        return LIVEConfig(site="attn_out", learn_scale=False, scale_init=1.0)
    raise CheckpointError(
        f"these names fit no variant of the published code: {', '.join(sorted(state_dict)) or 'none at all'}; expected "
        f"attn_shift with or without log_Z1_lin.<layer>.weight and .bias and ffn_shift, or ffn_shift with "
        f"ffn_shift_scale, or attn_shift with attn_shift_scale"
    )


def _layer_tensors(state_dict: Mapping[str, Tensor], index: int, config: HeadConfig) -> dict[str, Tensor]:
    """The tensors of a layer under the names of our parameters."""
    if isinstance(config, LIVEConfig):
        prefix = "ffn_shift" if config.site == "mlp_out" else "attn_shift"
        wanted = {"vector": (prefix, index), "scale": (f"{prefix}_scale", index)}
    else:
        assert isinstance(config, MimICConfig)
        wanted: dict[str, tuple[str, int | None]] = {"vector": ("attn_shift", index)}
        if config.gate:
            wanted["gate_weight"] = (f"log_Z1_lin.{index}.weight", None)
            wanted["gate_bias"] = (f"log_Z1_lin.{index}.bias", None)
        if config.mlp_vector:
            wanted["mlp_vector"] = ("ffn_shift", index)
    found = {}
    for name, (key, row) in wanted.items():
        tensor = state_dict.get(key)
        if tensor is None or (row is not None and (tensor.ndim == 0 or row >= len(tensor))):
            raise CheckpointError(f"this state dict has no {key} for layer {index} of the model")
        found[name] = tensor if row is None else tensor[row]
    return found
