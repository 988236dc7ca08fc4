"""The demo: its tasks, its prompts, and a whole run on a tiny model of random weights with a byte tokenizer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mimic_core.demo.__main__ import main
from mimic_core.demo.prompts import Prompter
from mimic_core.demo.tasks import TASKS, DemoError, make_task
from tests.support.byte_tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.mark.parametrize("name", TASKS)
def test_nothing_held_out_is_trained_on(name: str) -> None:
    pairs = TASKS[name]()
    assert len({query for query, _ in pairs}) == len(pairs) >= 80
    assert all(query and answer and query == query.strip() and answer == answer.strip() for query, answer in pairs)
    splits = [make_task(name, 40, seed) for seed in (0, 0, 1)]
    for task in splits:
        assert len(task.train) == 40
        assert len(task.held_out) == len(pairs) - 40
        assert not {q for q, _ in task.train} & {q for q, _ in task.held_out}
    assert splits[0] == splits[1] != splits[2]
    with pytest.raises(DemoError, match="some must be held out"):
        make_task(name, len(pairs), 0)


def test_capitals_are_real() -> None:
    known = dict(TASKS["capitals"]())
    assert {known["France"], known["Japan"], known["Egypt"]} == {"Paris", "Tokyo", "Cairo"}


def test_a_query_is_the_same_tokens_with_demonstrations(tokenizer: Any) -> None:
    prompter = Prompter(tokenizer, torch.device("cpu"))
    short = prompter(("go", "went"))
    long = prompter(("go", "went"), [("see", "saw"), ("come", "came")])
    assert long.ids[long.query_at :] == short.ids[short.query_at :]
    assert short.ids[0] == long.ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(short.ids[short.answer_at :]).strip() == "went"
    batch = prompter.collate([short, prompter(("understand", "understood"))])
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    assert ids[0][mask[0]].tolist() == short.ids
    assert ids[0][batch.answer_tokens[0]].tolist() == short.ids[short.answer_at :]
    assert ids[0][batch.context_tokens[0]].tolist() == short.ids[short.query_at :]
    assert not (batch.context_tokens & ~mask).any()
    assert not batch.context_tokens[:, 0].any()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, no_shape_checks: None) -> Callable[..., None]:
    """The command, in this process: one of its own would import everything first. CI runs it as a program."""

    def command(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["mimic_core.demo", *options])
        main()

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return command


def test_a_whole_run(
    tokenizer: Any, tmp_path: Path, run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run(
        *("--model", str(tmp_path / "model"), "--task", "past-tense", "--quick", "--seed", "3", "--samples", "12"),
        *("--output", str(tmp_path / "shifts"), "--json", str(tmp_path / "table.json")),
    )
    printed = capsys.readouterr().out
    for row in ("zero-shot", "8-shot", "LIVE", "MimIC"):
        assert row in printed
    assert json.loads((tmp_path / "table.json").read_text())
    assert list((tmp_path / "shifts").rglob("shifts.safetensors"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "no/such-model-anywhere"), "can't be loaded"),
        (("--task", "past-tense", "--samples", "900"), "held out"),
    ],
)
def test_a_wrong_wish_is_answered_in_a_sentence(
    options: tuple[str, ...], message: str, run: Callable[..., None]
) -> None:
    with pytest.raises(SystemExit, match=rf"^mimic_core\.demo: .*{message}") as end:
        run(*options)
    assert isinstance(end.value.code, str), "a message, and status 1"
