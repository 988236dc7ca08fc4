"""The `Trainer` of transformers, and those built on it, for the shifts in a frozen model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.training_args import ParallelMode

from ..adapters import unwrap
from ..build import place
from ..checkpoint import load_shifts, save_shifts
from ..errors import CheckpointError, PatchStateError, WrongTypeError
from ..heads import ShiftStack
from ..patch import handles, patch

_Base = Trainer if TYPE_CHECKING else object


class ShiftTrainerMixin(_Base):
    """Makes a subclass of `Trainer` train a stack of shift heads instead of its model.

        class ShiftSFTTrainer(ShiftTrainerMixin, SFTTrainer): ...

    It takes what that trainer takes, and `shifts`. The optimizer has the parameters of the stack alone. A checkpoint
    has the two files of `save_shifts` instead of the model, beside the states of the optimizer and the trainer. In
    several processes (`torchrun`), gradients are averaged by DistributedDataParallel. The model is in eval mode, so a
    dropout in it does nothing.

    Args:
        shifts: The stack. If it is not in the model yet, it is put there.

    Attributes:
        shifts: The stack.
        handle: The handle of the patch. It is not removed when training ends.

    Raises:
        WrongTypeError: `shifts` is not a ShiftStack.
        PatchStateError: the model has parameters to train, or the arguments ask for FSDP, DeepSpeed or several devices
            in one process.
    """

    model: Any

    def __init__(self, *args: Any, shifts: ShiftStack, **kwargs: Any) -> None:
        if not isinstance(shifts, ShiftStack):
            raise WrongTypeError(f"a ShiftStack is needed, found {type(shifts).__name__}; it is wrapped by the trainer")
        if kwargs.get("model_init") is not None:
            raise WrongTypeError("the shifts are made for one model, so give it as `model`, without `model_init`")
        self.shifts = shifts
        super().__init__(*args, **kwargs)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharded or getattr(self, "is_distributed_loading_by_transformers", False):
            raise PatchStateError(
                "this trainer does not train shifts in a sharded model (FSDP, DeepSpeed, tensor parallel): use "
                "DistributedDataParallel, or a loop of your own with fully_shard of the model's layers"
            )
        if self.args.parallel_mode not in (ParallelMode.NOT_PARALLEL, ParallelMode.DISTRIBUTED):
            raise PatchStateError(
                f"this process has {self.args.n_gpu} devices ({self.args.parallel_mode}), but shifts are trained with "
                f"one process for each: start them with torchrun, or show it one device (CUDA_VISIBLE_DEVICES=0)"
            )
        own = set(self.shifts.parameters())
        if others := [name for name, x in self.model.named_parameters() if x.requires_grad and x not in own]:
            raise PatchStateError(
                f"only the shifts are trained, but {len(others)} parameters of the model require a gradient, such as "
                f"{others[0]}: freeze it with model.requires_grad_(False)"
            )
        place(self.shifts, unwrap(self.model))
        there = [handle for handle in handles(self.model) if handle._installation.key is self.shifts]
        self.handle = there[0] if there else patch(self.model, self.shifts)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        model, self.model = self.model, self.shifts
        try:
            return super().create_optimizer()
        finally:
            self.model = model

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        if not self.handle.installed:
            raise PatchStateError(
                "the shifts were removed from the model: let the patch stay while the trainer is used"
            )
        if not training or model is not self.model:
            return model
        inner = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        return self.accelerator.prepare_model(_Trained(inner, self.shifts))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_shifts(self.shifts, output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with torch.random.fork_rng(devices=[]):
            loaded = load_shifts(resume_from_checkpoint, self.model, strict=True)
        if _kind(loaded) != _kind(self.shifts):
            raise CheckpointError(
                f"{resume_from_checkpoint} has {loaded.name!r} shifts with {loaded.config}, but {self.shifts.name!r} "
                f"with {self.shifts.config} is being trained (or other dtypes): resume with a stack of the same kind"
            )
        self.shifts.load_state_dict(loaded.state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._save()  # what is pushed is the folder around the checkpoints
        super()._push_from_checkpoint(checkpoint_folder)


class ShiftTrainer(ShiftTrainerMixin, Trainer):
    """The `Trainer` of transformers for a stack of shift heads; see `ShiftTrainerMixin`.

    trainer = ShiftTrainer(model=model, shifts=shifts, args=arguments, train_dataset=data)
    trainer.train()
    """


class _Trained(nn.Module):
    """The model as its trainer sees it: the parameters are those of the shifts, the rest is the model's."""

    def __init__(self, model: nn.Module, shifts: ShiftStack) -> None:
        super().__init__()
        self.shifts = shifts
        self._outside = (model,)  # in a tuple, which parameters(), state_dict() and to() skip

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Private names are what others note about one object: accelerate marks a model that it has prepared.
            if name.startswith("_"):
                raise
            return getattr(self._outside[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._outside[0](*args, **kwargs)

    def get_base_model(self) -> nn.Module:
        """What `patch` and `capture` look for in a wrapper."""
        return unwrap(self._outside[0])

    def _get_name(self) -> str:
        return self.get_base_model()._get_name()  # label smoothing goes by it

    def train(self, mode: bool = True) -> _Trained:
        super().train(mode)
        model = self._outside[0].eval()
        # The flags of single modules, without what is inside them. trl's trainers read the model's.
        model.training = mode
        for layer in _checkpointed(model):
            layer.training = mode
        return self


def _checkpointed(model: nn.Module) -> Iterator[nn.Module]:
    """The layers that run again in the backward, which they do only in training mode.

    Raises:
        PatchStateError: a layer has a dropout of its own, which would act then.
    """
    for layer in model.modules():
        if not isinstance(layer, GradientCheckpointingLayer) or not layer.gradient_checkpointing:
            continue
        for name, value in vars(layer).items():
            if "drop" in name and isinstance(value, float) and value > 0:
                raise PatchStateError(
                    f"gradient checkpointing needs the layers in training mode, where {type(layer).__name__} has "
                    f"{name}={value}, but the frozen model is trained without dropout: set it to 0 in the model's "
                    f"config, or switch checkpointing off"
                )
        yield layer


def _kind(shifts: ShiftStack) -> tuple[object, ...]:
    return shifts.name, shifts.config, [x.dtype for x in shifts.state_dict().values()]
