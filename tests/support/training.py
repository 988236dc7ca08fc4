"""A tiny model, shifts and data to train on, a `Trainer` that records its steps, and the same steps in plain torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

import mimic_core as mc
from mimic_core.integrations.trainer import ShiftTrainer
from tests.support.cases import BY_NAME, fresh_model, random_shifts

LLAMA = BY_NAME["llama"]
Step = list[tuple[Tensor, Any]]


def model_and_shifts(dtype: torch.dtype = torch.float32, head: str = "mimic") -> tuple[nn.Module, mc.ShiftStack]:
    model = fresh_model(LLAMA, dtype=dtype)
    return model, random_shifts(model, head).to(dtype)


def rows(count: int) -> Tensor:
    return torch.randint(3, 60, (count, 7), generator=torch.Generator().manual_seed(1))


def samples(count: int = 16) -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in rows(count)]


def arguments(folder: Path | str, **options: Any) -> TrainingArguments:
    plain = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    train = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.1, "optim": "adamw_torch"}
    # The gradient norm is always larger, so clipping shows.
    return TrainingArguments(str(folder), **(plain | train | {"max_grad_norm": 0.1, "weight_decay": 0.1} | options))


class RecordingTrainer(ShiftTrainer):
    """Keeps what its steps got, and the gradients of the shifts after each."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[Step] = [[]]
        self.gradients: list[list[Tensor]] = []

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.steps[-1].append((inputs["input_ids"], num_items_in_batch))
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.gradients.append(gradients_of(self.shifts))
            self.steps.append([])
        return loss


def recorded(folder: Path | str, head: str = "mimic", **options: Any) -> RecordingTrainer:
    """A trainer that has trained."""
    model, shifts = model_and_shifts(head=head)
    trainer = RecordingTrainer(model=model, shifts=shifts, args=arguments(folder, **options), train_dataset=samples())
    trainer.train()
    return trainer


def in_plain_torch(
    steps: list[Step], bf16: bool = False, head: str = "mimic"
) -> tuple[list[list[Tensor]], mc.ShiftStack]:
    """The gradients of the same steps, and the stack after them."""
    model, shifts = model_and_shifts(head=head)
    named = dict(shifts.named_parameters())
    groups = [{"params": [x for name, x in named.items() if "bias" not in name]}]
    groups += [{"params": [x for name, x in named.items() if "bias" in name], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)
    found = []
    with mc.patch(model, shifts):
        for done, step in enumerate(steps):
            for ids, items in step:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = model(input_ids=ids, labels=ids, num_items_in_batch=items).loss
                loss.backward()
            found.append(gradients_of(shifts))
            nn.utils.clip_grad_norm_(shifts.parameters(), 0.1)
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (1 - done / len(steps))
            optimizer.step()
            optimizer.zero_grad()
    return found, shifts


def lightning_module(shifts: mc.ShiftStack, loss_of: Callable[[Tensor], Tensor]) -> Any:
    """A LightningModule that holds a stack, keeps its gradients, and trains it on given rows."""
    import lightning

    class ShiftModule(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.shifts = shifts
            self.gradients: list[list[Tensor]] = []

        def training_step(self, batch: Tensor) -> Tensor:
            return loss_of(batch)

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.gradients.append(gradients_of(self.shifts))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def fit(self, ids: Tensor, processes: int) -> None:
            options = {"accelerator": "cpu", "strategy": "ddp", "devices": processes, "max_epochs": 2, "logger": False}
            options |= {f"enable_{name}": False for name in ("checkpointing", "progress_bar", "model_summary")}
            with patch.dict(os.environ):  # it takes WORLD_SIZE away
                trainer = lightning.Trainer(**options, use_distributed_sampler=False)
                trainer.fit(self, torch.utils.data.DataLoader(ids, batch_size=len(ids)))

    return ShiftModule()


def gradients_of(shifts: mc.ShiftStack) -> list[Tensor]:
    return [x.grad.clone() for x in shifts.parameters()]


def assert_same(found: mc.ShiftStack, wanted: mc.ShiftStack) -> None:
    """Two stacks are equal bit for bit."""
    for name, x in found.state_dict().items():
        assert torch.equal(x, wanted.state_dict()[name]), name
