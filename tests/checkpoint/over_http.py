"""Push, card and load through huggingface_hub's own client. test_checkpoint_pretrained.py runs this in a process.

The client reads HF_ENDPOINT when it is imported.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import mimic_core as mc
from tests.support.cases import BY_NAME, logits_of, random_shifts
from tests.support.checkpoints import assert_same

TOKEN = sys.argv[1]
base = AutoModelForCausalLM.from_pretrained("org/base").eval()
inputs = BY_NAME["llama"].inputs()
first, second = random_shifts(base, "mimic"), random_shifts(base, "live")
options = {"license": "apache-2.0", "training": "On **ten** pictures.", "token": TOKEN}
url = first.push_to_hub("me/vqa", private=True, **options)
assert "/me/vqa/commit/" in url, url
second.push_to_hub("me/vqa", revision="v2", commit_message="LIVE", **options)
for revision, wanted in ((None, first), ("main", first), ("v2", second), (url.rpartition("/")[2], first)):
    for source in (mc.load_shifts, mc.ShiftStack.from_pretrained):
        assert_same(source("me/vqa", base, revision=revision, token=TOKEN, strict=True, cache_dir="cache"), wanted)
assert any(Path("cache").rglob("shifts.safetensors"))
for refused in ({}, {"token": "wrong"}, {"token": TOKEN, "revision": "v3"}):
    with pytest.raises(mc.CheckpointError, match="no shifts at 'me/vqa'"):
        mc.load_shifts("me/vqa", base, cache_dir="another", **refused)

first.push_to_hub("me/open", **options)
card = ModelCard.load("me/open")
assert card.data.base_model == "org/base"
assert card.data.base_model_relation == "adapter"
assert card.data.library_name == "mimic_core"
assert card.data.license == "apache-2.0"
assert "On **ten** pictures." in card.text
(snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
with mc.patch(base, first):
    wanted = logits_of(base, inputs)
found = {}
exec(snippet.replace("...  #", "found['logits'] = logits_of(model.eval(), inputs)  #"), globals())
assert torch.equal(found["logits"], wanted)
print("all of it")
