"""Prompts with images: as the patched Llava of transformers."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import serving, serving_images
from tests.support.serving import Answer, Ask

pytest.importorskip("vllm", reason="vLLM has an environment of its own")
pytest.importorskip("torchvision", reason="vLLM's Llava needs it")
import mimic_core.vllm as mv

LENGTH = 10
TEXTS = ["w5 w6 <image> w7 w8", "<image> w30 w31 w32", "w9 w10 <image>", "w5 w6 <image> w7 w8"]


def test_images_and_stacks_in_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    model, processor = serving_images.llava_at(tmp_path / "model")
    heads = ["mimic", "live", "layer"]
    stacks = {head: serving.stack_at(tmp_path / head, model, head, seed) for seed, head in enumerate(heads)}
    asked = [(text, seed, head) for seed, text in enumerate(TEXTS) for head in (None, *heads)]
    asked += [(TEXTS[0], 9, head) for head in (None, *heads)]  # another image behind the same words
    expected, prompts = [], []
    for text, seed, head in asked:
        picture = serving_images.image(seed)
        inputs = processor(images=picture, text=text, return_tensors="pt")
        ask = Ask(inputs.pop("input_ids")[0].tolist(), head)
        inputs.pop("attention_mask")
        expected.append(serving.wanted(model, stacks, ask, LENGTH, **inputs))
        prompts.append({"prompt": text, "multi_modal_data": {"image": picture}})
    assert len({tuple(answer.tokens) for answer in expected}) > len(asked) // 2
    options = mv.engine_args({head: tmp_path / head for head in heads})
    with serving.engine(tmp_path / "model", **options, skip_tokenizer_init=False, max_num_batched_tokens=64) as llm:
        parameters = [serving.params(Ask([], head), LENGTH) for _, _, head in asked]
        for _ in range(2):  # the second time, blocks are in the cache
            found: list[Answer] = [
                serving.answer_of(one.outputs[0]) for one in llm.generate(prompts, parameters, use_tqdm=False)
            ]
            for one, wanted, what in zip(found, expected, asked, strict=True):
                serving.assert_same(one, wanted, what)
