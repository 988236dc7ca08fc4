"""Prompts with images: as the patched model of transformers."""

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
TEXTS = ["w15 w16 IMAGE w17 w18", "IMAGE w30 w31 w32", "w19 w20 IMAGE", "w15 w16 IMAGE w17 w18", "w15 w16 w17"]
TEXTS += ["IMAGE w21 w22 IMAGE w23"]


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.exhaustive] if x != "llava" else []) for x in serving_images.MODELS]
)
def test_images_and_stacks_in_one_batch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "smolvlm":
        pytest.importorskip("num2words", reason="the processor of SmolVLM needs it")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    made = serving_images.made_at(tmp_path / "model", name)
    heads = ["mimic", "live", "layer", "ends"]
    stacks = {head: serving.stack_at(tmp_path / head, made.model, head, seed) for seed, head in enumerate(heads)}
    asked = [(text, seed, head) for seed, text in enumerate(TEXTS) for head in (None, *heads)]
    asked += [(TEXTS[0], 9, head) for head in (None, *heads)]  # another image behind the same words
    expected, prompts = [], []
    for words, seed, head in asked:
        text = words.replace("IMAGE", made.mark)
        pictures = [made.image(seed + 10 * i) for i in range(words.count("IMAGE"))]
        inputs = made.processor(images=pictures or None, text=text, return_tensors="pt")
        ask = Ask(inputs.pop("input_ids")[0].tolist(), head)
        inputs.pop("attention_mask")
        expected.append(serving.wanted(made.model, stacks, ask, LENGTH, **inputs))
        prompts.append({"prompt": text, **({"multi_modal_data": {"image": pictures}} if pictures else {})})
    assert len({tuple(answer.tokens) for answer in expected}) > len(asked) // 2
    assert expected[0].tokens != expected[-5].tokens or expected[0].apart(expected[-5]) > 1e-2, "the image is seen"
    options = mv.engine_args({head: tmp_path / head for head in heads})
    options |= {"max_num_batched_tokens": 96, "limit_mm_per_prompt": {"image": 2, "video": 0}}
    with serving.engine(tmp_path / "model", **options, skip_tokenizer_init=False) as llm:
        parameters = [serving.params(Ask([], head), LENGTH) for _, _, head in asked]
        for _ in range(2):  # the second time, blocks are in the cache
            found: list[Answer] = [
                serving.answer_of(one.outputs[0]) for one in llm.generate(prompts, parameters, use_tqdm=False)
            ]
            for one, wanted, what in zip(found, expected, asked, strict=True):
                serving.assert_same(one, wanted, what)
