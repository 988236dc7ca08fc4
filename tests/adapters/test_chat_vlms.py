"""Models in the styles of code that models bring with them: every law, and the command of the docs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import mimic_core as mc
from tests.support import chat_vlms, named_models
from tests.support.cases import TEXT, random_shifts
from tests.support.chat_vlms import STYLES, decode, inputs, made

pytestmark = pytest.mark.usefixtures("no_shape_checks", "functions_made_in_functions_unchecked")
Package = Callable[[bool], None]
PAGE = Path(__file__).parents[2] / "docs" / "add-a-model.md"


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> Package:
    """Says whether the files have found flash-attn."""
    named_models.put_packages(monkeypatch)
    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        monkeypatch.setattr(chat_vlms, name, None)
    return chat_vlms.import_flash_attn


@pytest.mark.parametrize("style", STYLES)
def test_every_law(style: str, flash_attn: Package) -> None:
    flash_attn(style == "internlm2")
    report = mc.testing.check_adapter(made(style), inputs(), decode=decode)
    report.raise_for_failures()
    laws = ("query", "key", "value", "attn_heads", "lse", "MimIC", "cached decoding", "padding", "removal", "coverage")
    assert {law: report[law].verdict for law in laws} == dict.fromkeys(laws, "passed")


def test_a_fallback_gives_the_same_or_is_refused(flash_attn: Package) -> None:
    """A model that takes flash-attn where there is one, but not for padding."""
    given, logits = inputs(), []
    shifts = random_shifts(made("qwen"), "mimic")
    for there in (True, False):
        flash_attn(there)
        model = made("qwen")
        with torch.no_grad(), mc.patch(model, shifts):
            logits.append(model(**given).logits)
            padded = given | {"attention_mask": given["attention_mask"].clone()}
            padded["attention_mask"][0, :2] = 0
            if not there:
                model(**padded)
                continue
            with pytest.raises(mc.PatchStateError, match=r"of QWenAttention can't be made: .* another way .*padding"):
                model(**padded)
    torch.testing.assert_close(*logits)
    flash_attn(True)
    assert not torch.allclose(made("qwen")(**given).logits, logits[0])
    with torch.no_grad(), mc.patch(model := made("qwen"), shifts, adapter=mc.GenericAdapter(example=padded)):
        torch.testing.assert_close(model(**padded).logits[1], logits[0][1])


def test_the_kit_sees_a_wrong_projection(flash_attn: Package) -> None:
    """An adapter that takes the attention of the other layer."""

    class Other(mc.GenericAdapter):
        def module(self, model: nn.Module, layer: int, site: mc.types.Site) -> nn.Module:
            return super().module(model, 1 - layer if site == "key" else layer, site)

    flash_attn(True)
    failed = {row.law for row in mc.testing.check_adapter(made("internlm2"), inputs(), adapter=Other).failures}
    assert failed >= {"own layer", "key"}


def test_the_command_of_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = re.search(r'```sh\npython -c "(.+)"\n```', PAGE.read_text())
    assert command is not None
    LlamaForCausalLM(LlamaConfig(**TEXT)).save_pretrained(tmp_path)
    exec(command[1].replace("Qwen/Qwen-VL-Chat", str(tmp_path)), {})
    assert "MimIC" in capsys.readouterr().out
