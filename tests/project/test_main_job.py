"""The main job on every vision-language family: train shifts on images, save, load, generate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import mimic_core as mc
from tests.support.cases import ATTENTION, CASES, Case, fresh_model

VLMS = [case for case in CASES if case.image_ids]
SAMPLES, DEMO, QUERY, ANSWER = 2, 5, 4, 3


def batch(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Inputs with a demonstration and without, an image in each, and the masks of the tokens that matter."""
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(3, 120, (SAMPLES, DEMO + QUERY + ANSWER), generator=generator)
    bos, image = torch.ones(SAMPLES, 1, dtype=torch.long), torch.tensor(case.image_ids).expand(SAMPLES, -1)
    images = torch.randn(SAMPLES, 2, 3, 16, 16, generator=generator)
    long = torch.cat([bos, image, text[:, :DEMO], image, text[:, DEMO:]], dim=1)
    short = torch.cat([bos, image, text[:, DEMO:]], dim=1)
    wanted = image.shape[1] + QUERY + ANSWER
    masks = {
        "context": torch.arange(long.shape[1]).expand_as(long) >= long.shape[1] - wanted,
        "query": torch.arange(short.shape[1]).expand_as(short) >= short.shape[1] - wanted,
        "answer": torch.arange(short.shape[1]).expand_as(short) >= short.shape[1] - ANSWER,
        "context_answer": torch.arange(long.shape[1]).expand_as(long) >= long.shape[1] - ANSWER,
    }
    return complete(case, long, images), complete(case, short, images[:, 1:]), masks


def complete(case: Case, ids: Tensor, images: Tensor) -> dict[str, Tensor]:
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images}
    if case.name == "llava":
        found["pixel_values"] = images.flatten(0, 1)
    if case.name == "idefics":
        found["image_attention_mask"] = torch.ones(*ids.shape, images.shape[1], dtype=torch.long)
    return found


@pytest.mark.parametrize(
    ("case", "name", "attention"),
    [
        # Each two of the three are together in one case.
        pytest.param(case, name, attention, marks=() if (i + j + k) % 2 else pytest.mark.exhaustive)
        for i, case in enumerate(VLMS)
        for j, name in enumerate(("mimic", "live"))
        for k, attention in enumerate(ATTENTION)
    ],
    ids=str,
)
def test_train_save_load_generate(case: Case, name: str, attention: str, tmp_path: Path) -> None:
    model = fresh_model(case, attention)
    frozen = {key: x.clone() for key, x in model.state_dict().items()}
    shifts = mc.build_shifts(model, name)
    optimizer = torch.optim.AdamW(shifts.parameters(), lr=2e-2)
    recipe = mc.losses.recipe(name)
    with_demonstrations, query_only, masks = batch(case)
    history = []
    with mc.patch(model, shifts) as handle:
        for _ in range(60):
            with torch.no_grad(), handle.disabled():
                with mc.capture(model, "mlp_out", where=masks["context"]) as teacher:
                    teacher_logits = model(**with_demonstrations).logits
            with mc.capture(model, "mlp_out", where=masks["query"]) as student:
                logits = model(**query_only).logits
            lm = mc.losses.lm(logits, query_only["input_ids"], masks["answer"])
            if name == "mimic":
                loss = recipe(align=mc.losses.layer_mse(student, teacher), lm=lm)
            else:
                kl = mc.losses.logits_kl(logits, teacher_logits, masks["answer"], masks["context_answer"])
                loss = recipe(kl=kl, lm=lm)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(loss.item())
        assert history[-1] < 0.8 * history[0]
        generated = model.generate(**query_only, max_new_tokens=4, do_sample=False)
    assert all(torch.equal(x, frozen[key]) for key, x in model.state_dict().items())
    unshifted = model.generate(**query_only, max_new_tokens=4, do_sample=False)
    assert not torch.equal(generated, unshifted)
    mc.save_shifts(shifts, tmp_path)
    with mc.patch(model, mc.load_shifts(tmp_path, model)):
        assert torch.equal(model.generate(**query_only, max_new_tokens=4, do_sample=False), generated)
