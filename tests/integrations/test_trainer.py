"""A stack trained by the `Trainer` of transformers: as in a plain loop, saved, resumed, and refused."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.trainer
from transformers import OPTConfig, OPTForCausalLM

import mimic_core as mc
from mimic_core.integrations.trainer import ShiftTrainer, ShiftTrainerMixin
from tests.support.training import (
    arguments,
    assert_same,
    gradients_of,
    in_plain_torch,
    model_and_shifts,
    recorded,
    samples,
)

FILES = {"shifts.json", "shifts.safetensors"}


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str)
def test_it_trains_as_a_plain_loop(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = recorded(tmp_path, **options)
    gradients, shifts = in_plain_torch(trainer.steps[:-1], bf16="bf16" in options)
    assert len(gradients) == 4
    for found, wanted in zip(trainer.gradients, gradients, strict=True):
        assert all(map(torch.equal, found, wanted))
    assert_same(trainer.shifts, shifts)
    untouched = model_and_shifts()[0].state_dict()
    assert all(torch.equal(x, untouched[name]) for name, x in trainer.model.state_dict().items())
    assert {module.training for module in trainer.model.modules() if module is not trainer.model} == {False}
    assert all(x.grad is None for x in trainer.model.parameters())


def test_a_run_that_is_resumed_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole = recorded(tmp_path / "whole", save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert {path.name for path in checkpoint.iterdir()} >= FILES | {"optimizer.pt", "trainer_state.json"}
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 100_000
    model, shifts = model_and_shifts()
    with mc.patch(model, shifts) as handle:  # it may be there already
        again = ShiftTrainer(model=model, shifts=shifts, args=arguments(tmp_path / "again"), train_dataset=samples())
        assert again.handle._installation is handle._installation
        again.train(resume_from_checkpoint=str(checkpoint))
        losses = [[entry.get("loss") for entry in run.state.log_history] for run in (whole, again)]
        assert losses[0] == losses[1]
        assert_same(shifts, whole.shifts)
    for found, wanted in zip(again.optimizer.param_groups, whole.optimizer.param_groups, strict=True):
        for x, y in zip(found["params"], wanted["params"], strict=True):
            assert torch.equal(again.optimizer.state[x]["exp_avg_sq"], whole.optimizer.state[y]["exp_avg_sq"])
    with pytest.raises(mc.PatchStateError, match="removed from the model"):
        again.evaluate(samples(2))
    other = mc.build_shifts(model, "live")
    wrong = ShiftTrainer(model=model, shifts=other, args=arguments(tmp_path), train_dataset=samples())
    with pytest.raises(mc.CheckpointError, match="'mimic' shifts with .* but 'live'"):
        wrong.train(resume_from_checkpoint=str(checkpoint))


def test_the_best_stack_is_loaded_saved_and_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shifts = model_and_shifts()
    # The highest loss is called the best, because the last one must not be it.
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    args = arguments(tmp_path / "out", **options, **steps)
    trainer = ShiftTrainer(model=model, shifts=shifts, args=args, train_dataset=samples(), eval_dataset=samples(4))
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best != str(tmp_path / "out" / "checkpoint-4")
    assert_same(shifts, mc.load_shifts(best, model))
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    trainer.save_model(str(tmp_path / "saved"))
    assert set(os.listdir(tmp_path / "saved")) == FILES
    pushed: list[set[str]] = []
    hub = SimpleNamespace(upload_folder=lambda folder_path, **_: pushed.append(set(os.listdir(folder_path))))
    if hasattr(transformers.trainer, "hf_api"):
        monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    else:
        monkeypatch.setattr(transformers.trainer, "upload_folder", hub.upload_folder)
        monkeypatch.setattr(transformers.trainer, "PushInProgress", lambda jobs: None)
    trainer.hub_model_id, trainer.push_in_progress = "user/name", None
    trainer._push_from_checkpoint(best)
    (tmp_path / "out" / "shifts.json").unlink()
    trainer.push_in_progress = None
    trainer.push_to_hub()
    assert len(pushed) == 2
    assert all(files >= FILES and "model.safetensors" not in files for files in pushed)


def test_gradient_checkpointing_runs_layers_again_without_their_dropout(tmp_path: Path) -> None:
    plain = recorded(tmp_path, max_steps=1)
    model, shifts = model_and_shifts()
    args = arguments(tmp_path, max_steps=1, gradient_checkpointing=True)
    trainer = ShiftTrainer(model=model, shifts=shifts, args=args, train_dataset=samples())
    runs = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    trainer.train()
    assert len(runs) == 2
    assert_same(shifts, plain.shifts)
    config = OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, dropout=0.1
    )
    config.word_embed_proj_dim = 16
    opt = OPTForCausalLM(config).requires_grad_(False)
    shifts = mc.build_shifts(opt, "live")
    with pytest.raises(mc.PatchStateError, match=r"OPTDecoderLayer has dropout=0.1"):
        ShiftTrainer(model=opt, shifts=shifts, args=args, train_dataset=samples()).train()


def test_the_model_in_a_loss_of_ones_own_is_the_patched_one(tmp_path: Path) -> None:
    """Label smoothing asks which model it is. A capture looks through what the trainer has put around it."""
    trainer = recorded(tmp_path, max_steps=1, label_smoothing_factor=0.2)
    batch = {"input_ids": trainer.steps[0][0][0], "labels": trainer.steps[0][0][0]}
    losses = []
    for model in (trainer.model, trainer.model_wrapped):
        with mc.capture(model, "mlp_out") as seen:
            losses.append(trainer.compute_loss(model, dict(batch)))
        assert seen.states
        assert model.config is trainer.model.config
    assert torch.equal(losses[0], losses[1])
    trainer.model_wrapped.zero_grad()
    losses[1].backward()
    assert any(bool(x.any()) for x in gradients_of(trainer.shifts))


def test_what_is_refused(tmp_path: Path, no_shape_checks: None) -> None:
    model, shifts = model_and_shifts()
    args = arguments(tmp_path)
    with pytest.raises(mc.WrongTypeError, match="without `model_init`"):
        ShiftTrainer(model_init=lambda: model, shifts=shifts, args=args)
    with pytest.raises(mc.WrongTypeError, match="found LlamaForCausalLM"):
        ShiftTrainer(model=model, shifts=model, args=args)
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(mc.PatchStateError, match=r"1 parameters of the model require a gradient, such as lm_head"):
        ShiftTrainer(model=model, shifts=shifts, args=args)
    assert not mc.handles(model)
    model.requires_grad_(False)
    args._n_gpu = 2
    with pytest.raises(mc.PatchStateError, match="torchrun"):
        ShiftTrainer(model=model, shifts=shifts, args=args)


@pytest.mark.newest
def test_with_trl(tmp_path: Path) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

    class ShiftSFTTrainer(ShiftTrainerMixin, SFTTrainer): ...

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 60)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    processing = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    text = Dataset.from_list([{"text": " ".join(f"w{3 + i * j % 50}" for j in range(1, 8))} for i in range(8)])
    model, shifts = model_and_shifts()
    before = {name: x.clone() for name, x in shifts.state_dict().items()}
    args = SFTConfig(str(tmp_path), bf16=False, **_shared(arguments(tmp_path)))
    trainer = ShiftSFTTrainer(
        model=model, shifts=shifts, args=args, train_dataset=text, eval_dataset=text, processing_class=processing
    )
    trainer.train()
    assert all(not torch.equal(x, before[name]) for name, x in shifts.state_dict().items())
    logged = trainer.state.log_history
    assert {"loss", "entropy"} <= set(logged[0])
    assert logged[-2]["eval_loss"] < logged[0]["loss"]
    files = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert files >= FILES
    assert "model.safetensors" not in files


def _shared(args: Any) -> dict[str, Any]:
    names = ("max_steps", "per_device_train_batch_size", "learning_rate", "use_cpu", "disable_tqdm", "logging_steps")
    found = {name: getattr(args, name) for name in names}
    return found | {"report_to": [], "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
