"""What the oracle model needs to know of a stack and of a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import mimic_core as mc


def oracle_params(shifts: mc.ShiftStack, depth: int) -> tuple[list[list[dict[str, Any]]], dict[str, Tensor]]:
    """The stack's numbers in fp64, as the oracle takes them, and the leaves whose gradients are wanted."""
    leaves = {name: p.detach().double().requires_grad_() for name, p in shifts.named_parameters()}
    params: list[list[dict[str, Any]]] = [[] for _ in range(depth)]
    places = {id(head): f"{name}." for name, head in shifts.named_modules()}
    for head in shifts:
        prefix = places[id(head)]
        numbers = leaves | {name: x.double() for name, x in shifts.named_buffers()}
        tensors = {name.removeprefix(prefix): x for name, x in numbers.items() if name.startswith(prefix)}
        config = head.config
        if isinstance(config, mc.MimICConfig):
            options = {"kind": "mimic", "shared": config.shared, "all_keys": config.log_z2 == "all_keys"}
        elif isinstance(config, (mc.TaskVectorConfig, mc.FunctionVectorConfig)):
            options = {"kind": "vector", "site": "layer_out"}
        elif isinstance(config, (mc.AttnBiasConfig, mc.MlpBiasConfig)):
            options = {"kind": "vector", "site": "attn_out" if isinstance(config, mc.AttnBiasConfig) else "mlp_out"}
        elif isinstance(config, mc.CAAConfig):
            options = {"kind": "vector", "site": "layer_out", "factor": config.scale}
        elif isinstance(config, mc.ICVConfig):
            options = {"kind": "live", "site": "mlp_out", "sigmoid": False, "scale": config.scale}
        elif isinstance(config, (mc.I2CLConfig, mc.M2IVConfig)):
            options = {"kind": "two outputs"}
        elif isinstance(config, mc.VirtualKVConfig):
            options = {"kind": "virtual_kv", "weight": config.weight_init}
        elif isinstance(config, mc.IA3Config):
            options = {"kind": "ia3"}
        elif isinstance(config, mc.LoReFTConfig):
            options = {"kind": "loreft"}
        elif isinstance(config, mc.MTVConfig):
            options = {"kind": "mtv"}
        elif isinstance(config, mc.HyperICLConfig):
            options = {"kind": "hyper_icl"}
        else:
            assert isinstance(config, mc.LIVEConfig)
            options = {"kind": "live", "site": config.site, "sigmoid": config.sigmoid}
        params[head.layer.index].append(options | tensors)
    return params, leaves


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    path = mc.adapter_for(model).spec(model).layers[0].path.removesuffix(".0")
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    return layers
