"""The same questions in other forms, the steps that training takes, and the tables of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.icl import latency, plan
from benchmarks.icl.figures import costs, draw
from benchmarks.icl.fit import Samples
from benchmarks.icl.jobs import LOOKS, do
from benchmarks.icl.methods import MAIN
from benchmarks.icl.pictures import PicturePrompter, picture_task
from benchmarks.icl.report import Results, asked_otherwise, page, training
from benchmarks.icl.rows import Job, Row
from benchmarks.icl.stats import packed
from benchmarks.icl.words import CapitalsPrompter
from benchmarks.icl.worlds import world
from benchmarks.measure import QUICK
from mimic_core.demo.digits import images
from mimic_core.demo.prompts import Prompter
from tests.support.byte_tokenizer import byte_tokenizer

pytestmark = pytest.mark.usefixtures("no_shape_checks")
CPU = torch.device("cpu")


def test_words_are_asked_in_other_forms() -> None:
    tokenizer = byte_tokenizer()
    shown, asked = [("see", "saw")], ("go", "went")

    def texts(prompter: Prompter) -> tuple[str, str]:
        prompt = prompter(asked, shown)
        return tokenizer.decode(prompt.question.ids), tokenizer.decode(prompt.ids[prompt.answer_at :]).strip()

    assert texts(Prompter(tokenizer, CPU)) == ("<s>see: saw\ngo:", "went")
    assert texts(Prompter(tokenizer, CPU, mark=" ->")) == ("<s>see -> saw\ngo ->", "went")
    assert texts(CapitalsPrompter(tokenizer, CPU)) == ("<s>see: saw\nGO:", "went")


def test_noise_is_on_held_out_pictures_alone() -> None:
    task = picture_task("compare", 20, 0, 10)
    plain, noisy = (PicturePrompter(byte_tokenizer(), CPU, noise=noise) for noise in (0.0, 0.5))
    prompts = [plain(scene, task.train[:2]) for scene in task.held_out]
    assert [noisy(scene, task.train[:2]) for scene in task.held_out] == prompts
    before, after = (one.collate(prompts).inputs["pixel_values"].float() for one in (plain, noisy))
    assert torch.equal(before, images().pixels[[i for p in prompts for i in p.images]].bfloat16().float())
    moved = (after - before).unflatten(0, (len(prompts), 6))
    assert not moved[:, :4].any(), "the demonstrations are training pictures"
    assert moved[:, 4:].std() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(noisy.collate(prompts).inputs["pixel_values"].float(), after)


def test_accuracy_is_looked_at_during_training_and_changes_nothing() -> None:
    job = Job("llava", "3-digits", 100, "attn-bias", 30, 16, 20)
    plain, looked = do(job), do(replace(job, also="steps"))
    assert [row.after for row in looked] == [*range(2, 16, 16 // LOOKS), None]
    assert replace(looked[-1], also="") == plain[0]
    assert {row.what for row in looked} == {"accuracy"}


def test_teachers_are_shown_as_many_demonstrations_as_a_method_says() -> None:
    place = world("llava")
    task = place.task("3-digits", 40, 100, 10)
    for shots in (1, 16, None):
        shown, alone = Samples(place, task, 0, shots)()
        longer = shown.inputs["input_ids"].shape[1] - alone.inputs["input_ids"].shape[1]
        assert longer == (shots or place.shots) * 6  # an image of four tokens, a word and the answer


def test_a_step_is_timed_beside_loras() -> None:
    found = {(row.method, row.what): row.value or 0 for row in latency.of_training(world("llava"), QUICK)}
    methods = (*MAIN, plan.VARIATION)
    assert set(found) == {(method, what) for method in methods for what in ("training step", "training memory")}
    assert found["lora", "training step"] == 1
    # A teacher reads 24 demonstrations.
    assert found["mimic", "training step"] > found["attn-bias", "training step"]
    assert found["mimic", "training memory"] > found["attn-bias", "training memory"] > 0


def rows() -> list[Row]:
    """One seed, four questions, and a part of them with noise."""
    base = Row(
        what="accuracy", world="llava", task="8-digits", seed=0, samples=100, steps=400, shots=0, prompt_tokens=6.0
    )
    noisy = replace(base, what="accuracy, noisy")
    icl = replace(base, method="icl", shots=24, steps=0, value=0.75, right=packed([True] * 3 + [False]))
    return [
        icl,
        replace(icl, what="accuracy, noisy", value=0.25),
        replace(base, method="mimic", value=0.75, right=packed([True] * 3 + [False])),
        replace(noisy, method="mimic", value=0.5, right=packed([True] * 2 + [False] * 2)),
        *(
            replace(base, method="mimic", after=step, value=value)
            for step, value in ((50, 0.5), (100, 0.72), (150, 0.6))
        ),
        replace(base, method="live", value=0.5, right=packed([True] * 2 + [False] * 2)),
        replace(noisy, method="live", value=0.0, right=packed([False] * 4)),
        replace(base, method="live", after=50, value=0.7),
        Row(what="training step", world="llava", method="mimic", value=3.0),
        Row(what="training memory", world="llava", method="mimic", value=2.5e6),
    ]


def cells(text: str, label: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {label} "))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_tables_say_what_the_rows_say() -> None:
    results = Results(rows())
    asked = asked_otherwise(results, "llava")
    assert cells(asked, "method") == ["8-digits", "8-digits, noisy"]
    assert cells(asked, "MimIC") == ["75", "50"]
    assert cells(asked, "LIVE")[1].strip("*") == "0"
    assert cells(asked, "24 demonstrations") == ["75", "25"]
    steps = training(results, "llava")
    assert cells(steps, "MimIC") == ["3.00", "2.5", "100", "300"]
    assert cells(steps, "LIVE") == ["-", "-", "-", "-"]
    assert results.accuracies("llava", "8-digits", "mimic") == [0.75], "what was seen in training is no result"
    assert "### Asked otherwise" in page(rows(), [])


def test_the_cost_of_a_method_is_there_if_all_of_it_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    times = [Row(what="first token", world="llava", method=m, value=v) for m, v in (("icl", 2.1), ("mimic", 1.1))]
    seen = [*rows(), *times]
    assert costs(Results(seen), "llava") == {"icl": (2.1, 0.75), "mimic": (1.1, 0.75)}
    assert {path.name for path in draw(Results(seen), tmp_path)} == {"cost.png"}
    more = [row.job for row in seen if row.task and row.method == "mimic"]
    assert costs(Results(seen, [replace(job, seed=1) for job in more]), "llava") == {"icl": (2.1, 0.75)}


def test_tables_of_nothing_are_not_there() -> None:
    results = Results(row for row in rows() if row.what == "accuracy" and row.after is None)
    assert (asked_otherwise(results, "llava"), training(results, "llava")) == ("", "")
