"""The methods that are compared: what is learned, from which loss, how fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mimic_core as mc
from mimic_core.types import Site

Loss = Literal["align", "kl", "lorentz", "lm"]


@dataclass(frozen=True)
class Method:
    """A trained method.

    Attributes:
        label: Its name in tables.
        head: The shift heads' config, if it has some.
        lora: Rank of LoRA, if it has it.
        loss: "align" (layer-wise squared distance to the teacher, and the answer's likelihood), "lorentz" (the same, in
            hyperbolic space), "kl" (distance of the answer's distributions, and likelihood) or "lm" (likelihood alone).
        site: Where states are compared.
        weights: Of the layers in "align": "teacher" divides each by the teacher's mean square.
        like: The method whose learning rate it has; empty: its own.
        shots: Demonstrations that the teacher sees; None: as many as the world's teachers do.
    """

    label: str
    head: mc.HeadConfig | None = None
    lora: int = 0
    loss: Loss = "lm"
    site: Site = "mlp_out"
    weights: Literal["teacher"] | None = None
    like: str = ""
    shots: int | None = None


MIMIC, LIVE = mc.MimICConfig(), mc.LIVEConfig()
TRAINED: dict[str, Method] = {
    "live": Method("LIVE", LIVE, loss="kl"),
    "lora": Method("LoRA", lora=8),
    "mimic": Method("MimIC", MIMIC, loss="align"),
    "virtual-kv-1": Method("Virtual key and value, 1", mc.VirtualKVConfig(n=1)),
    "virtual-kv-4": Method("Virtual keys and values, 4", mc.VirtualKVConfig(n=4)),
    "hyper-icl": Method("Hyper-ICL", mc.HyperICLConfig(), loss="lorentz", site="layer_out"),
    "m2iv": Method("M2IV", mc.M2IVConfig(), loss="kl"),
    "i2cl": Method("I2CL", mc.I2CLConfig()),
    "loreft": Method("LoReFT", mc.LoReFTConfig()),
    "ia3": Method("IA3", mc.IA3Config()),
    "attn-bias": Method("Bias at attention", mc.AttnBiasConfig()),
    "mlp-bias": Method("Bias at the MLP", mc.MlpBiasConfig()),
    "mimic-teacher": Method("MimIC, weighted by the teacher", MIMIC, loss="align", weights="teacher", like="mimic"),
    "mimic+lora": Method("MimIC + LoRA", MIMIC, lora=8, loss="align", like="mimic"),
    "mimic-shared": Method("MimIC, gate shared by the heads", mc.MimICConfig(shared=True), loss="align", like="mimic"),
    "mimic-vector": Method("MimIC, vector without gate", mc.MimICConfig(gate=False), loss="align", like="mimic"),
    "mimic-kl": Method("MimIC, KL for alignment", MIMIC, loss="kl", like="mimic"),
    "mimic-lm": Method("MimIC, likelihood alone", MIMIC, loss="lm", like="mimic"),
    "mimic-attn": Method("MimIC, aligned at attention outputs", MIMIC, loss="align", site="attn_out", like="mimic"),
    "mimic-layer": Method("MimIC, aligned at layer outputs", MIMIC, loss="align", site="layer_out", like="mimic"),
    "mimic-1": Method("MimIC, 1 demonstration for the teacher", MIMIC, loss="align", like="mimic", shots=1),
    "mimic-16": Method("MimIC, 16 demonstrations for the teacher", MIMIC, loss="align", like="mimic", shots=16),
    "live-align": Method("LIVE, with MimIC's loss", LIVE, loss="align", like="live"),
}
PROMPTED = {
    "zero-shot": "zero-shot",
    "icl": "demonstrations",
    "best-of": "demonstrations, best of 8 choices",
    "retrieval": "demonstrations, most similar",
}
TAKEN = {
    "task-vector": "Task Vector",
    "function-vector": "Function Vector",
    "mtv": "MTV",
    "icv": "ICV",
    "caa": "CAA",
}
# What was tried for each method and kind of model, on seed 100, which is in no table: the middle one, a quarter of
# it, four and sixteen times as much. `python -m benchmarks.icl.trials` runs that and writes docs/results/trials.csv.
# It is the learning rate of what is trained, Adam's on the log-odds of MTV's choice, and the factor on the direction
# of ICV and CAA.
FACTORS = (0.25, 1.0, 4.0, 16.0)
MIDDLE = {
    "live": (0.2, 5e-2),
    "lora": (5e-3, 1e-3),
    "mimic": (0.2, 1e-2),
    "virtual-kv-1": (0.2, 1e-2),
    "virtual-kv-4": (0.2, 1e-2),
    "hyper-icl": (5e-2, 1e-2),
    "m2iv": (0.2, 1e-2),
    "i2cl": (5e-2, 1e-2),
    "loreft": (2e-2, 5e-3),
    "ia3": (5e-2, 1e-2),
    "attn-bias": (0.2, 1e-2),
    "mlp-bias": (0.2, 1e-2),
    "mtv": (0.5, 0.5),
    "icv": (10.0, 10.0),
    "caa": (1.0, 1.0),
}
# Which of the four was best, with the digit models and with SmolLM2, where it is not the middle one.
CHOSEN: dict[str, tuple[float, float]] = {
    "live": (16.0, 0.25),
    "mimic": (1.0, 4.0),
    "virtual-kv-1": (1.0, 4.0),
    "virtual-kv-4": (1.0, 4.0),
    "hyper-icl": (0.25, 0.25),
    "m2iv": (1.0, 4.0),
    "i2cl": (16.0, 16.0),
    "ia3": (4.0, 4.0),
    "mlp-bias": (1.0, 16.0),
    "mtv": (4.0, 1.0),
    "caa": (4.0, 1.0),
}


def rate(method: str, world: str) -> float:
    """What was chosen for a method."""
    words = world in ("smollm2", "smolvlm")
    return MIDDLE[method][words] * CHOSEN.get(method, (1.0, 1.0))[words]


def other_rate(method: str, world: str) -> float | None:
    """What was chosen for a method, if it is not the middle one: a job with another rate is another job."""
    own = TRAINED[method].like or method if method in TRAINED else method
    words = world in ("smollm2", "smolvlm")
    return None if CHOSEN.get(own, (1.0, 1.0))[words] == 1 else rate(own, world)


MAIN = tuple(TRAINED)[: list(TRAINED).index("mimic-teacher")]
ABLATIONS = tuple(name for name in TRAINED if name not in (*MAIN, "mimic+lora"))
LABELS = {**PROMPTED, **TAKEN, **{name: method.label for name, method in TRAINED.items()}}
