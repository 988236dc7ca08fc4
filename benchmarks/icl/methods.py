"""The methods that are compared: what is learned, from which loss, how fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mimic_core as mc
from mimic_core.types import Site


@dataclass(frozen=True)
class Method:
    """A trained method.

    Attributes:
        label: Its name in tables.
        head: The shift heads' config, if it has some.
        lora: Rank of LoRA, if it has it.
        loss: "align" (layer-wise squared distance to the teacher, and the answer's likelihood), "kl" (distance of the
            answer's distributions, and likelihood) or "lm" (likelihood alone).
        site: Where "align" compares.
        rate: Learning rate with the digit models; `word_rate` with the language model. Rates of shift heads; LoRA's own
            are beside.
    """

    label: str
    head: mc.HeadConfig | None = None
    lora: int = 0
    loss: Literal["align", "kl", "lm"] = "lm"
    site: Site = "mlp_out"
    rate: float = 0.2
    word_rate: float = 1e-2
    lora_rate: float = 5e-3
    lora_word_rate: float = 1e-3

    def rates(self, world: str) -> tuple[float, float]:
        """Learning rates of the shift heads and of LoRA."""
        return (self.word_rate, self.lora_word_rate) if world == "smollm2" else (self.rate, self.lora_rate)


MIMIC, LIVE = mc.MimICConfig(), mc.LIVEConfig()
TRAINED: dict[str, Method] = {
    "live": Method("LIVE", LIVE, loss="kl", word_rate=5e-2),
    "lora": Method("LoRA", lora=8),
    "mimic": Method("MimIC", MIMIC, loss="align"),
    "mimic+lora": Method("MimIC + LoRA", MIMIC, lora=8, loss="align"),
    "mimic-shared": Method("MimIC, gate shared by the heads", mc.MimICConfig(shared=True), loss="align"),
    "mimic-vector": Method("MimIC, vector without gate", mc.MimICConfig(gate=False), loss="align"),
    "mimic-kl": Method("MimIC, KL for alignment", MIMIC, loss="kl"),
    "mimic-lm": Method("MimIC, likelihood alone", MIMIC, loss="lm"),
    "mimic-attn": Method("MimIC, aligned at attention outputs", MIMIC, loss="align", site="attn_out"),
    "mimic-layer": Method("MimIC, aligned at layer outputs", MIMIC, loss="align", site="layer_out"),
    "live-align": Method("LIVE, with MimIC's loss", LIVE, loss="align", word_rate=5e-2),
}
PROMPTED = {"zero-shot": "zero-shot", "icl": "demonstrations", "retrieval": "demonstrations, most similar"}
TAKEN = {"task-vector": "Task Vector", "function-vector": "Function Vector"}
MAIN = ("live", "lora", "mimic", "mimic+lora")
ABLATIONS = tuple(name for name in TRAINED if name not in MAIN)
LABELS = {**PROMPTED, **TAKEN, **{name: method.label for name, method in TRAINED.items()}}
