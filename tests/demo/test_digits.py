"""The small vision-language models on real digits: their data, their prompts, and that they learn in context."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from benchmarks.icl import pretrain
from benchmarks.icl.episodes import CURRICULUM, KINDS, Drawer, Phase
from mimic_core.demo.digits import FIRST_NAME, RULES, VOCABULARY, DigitPrompter, digit_task, images
from mimic_core.demo.models import DIGIT_MODELS, digit_model_folder, load_digit_model
from mimic_core.demo.tasks import DemoError

over_models = pytest.mark.parametrize("family", DIGIT_MODELS)


def test_held_out_images_are_never_trained_on() -> None:
    known = images()
    assert len(known.pixels) == len(known.digits) == 1797
    assert sorted(known.train + known.held_out) == list(range(1797))
    assert known.pixels.min() == -1
    assert known.pixels.max() == 1
    draw = Drawer(4, 0)
    assert set(draw._images.flatten().tolist()) <= set(known.train)
    for name in RULES:
        task = digit_task(name, 100, 0)
        assert {line.image for line in task.train} <= set(known.train)
        assert {line.image for line in task.held_out} <= set(known.held_out)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_a_function_of_word_and_digit(name: str) -> None:
    known = images()
    tasks = [digit_task(name, 200, seed) for seed in (0, 0, 1)]
    assert tasks[0] == tasks[1] != tasks[2]
    rule: dict[Any, set[int]] = {}
    for line in [*tasks[0].train, *tasks[0].held_out]:
        rule.setdefault((line.word, int(known.digits[line.image])), set()).add(line.answer)
    assert all(len(answers) == 1 for answers in rule.values())
    answers = [next(iter(found)) for found in rule.values()]
    assert min(answers) >= FIRST_NAME
    cells, names = {"3-digits": (3, 3), "8-digits": (8, 8), "2-groups": (6, 2), "2-words": (8, 8)}[name]
    assert (len(rule), len(set(answers))) == (cells, names)
    assert len({digit for _, digit in rule}) == {"2-words": 4}.get(name, cells)
    with pytest.raises(DemoError, match="9999 training samples were asked for; .* images to train on"):
        digit_task(name, 9999, 0)


@over_models
def test_a_query_is_the_same_with_demonstrations(family: str) -> None:
    model = load_digit_model(family)
    prompter, task = DigitPrompter(model), digit_task("2-words", 20, 0, 4)
    short = prompter(task.held_out[0])
    long = prompter(task.held_out[0], task.train[:5])
    assert long.ids[long.query_at :] == short.ids[short.query_at :]
    assert long.images == (*(line.image for line in task.train[:5]), task.held_out[0].image)
    assert short.question.ids == short.ids[:-1]
    assert prompter.decode(short.ids[short.answer_at :]) == VOCABULARY[task.held_out[0].answer]
    batch = prompter.collate([long, prompter(task.held_out[1], task.train[:5])])
    pixels = batch.inputs["pixel_values"].reshape(2, 6, 1, 8, 8)
    assert torch.equal(pixels[0], images().pixels[list(long.images)])
    assert batch.context_tokens.sum(1).tolist() == [prompter.image_tokens + 2] * 2
    assert torch.equal(
        batch.inputs["input_ids"][batch.answer_tokens], torch.tensor([line.answer for line in task.held_out[:2]])
    )


@over_models
def test_the_checkpoint_loads_whole(family: str) -> None:
    _, found = AutoModelForImageTextToText.from_pretrained(digit_model_folder(family), output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert not found["mismatched_keys"]
    assert (digit_model_folder(family) / "model.safetensors").stat().st_size < 3e6


@pytest.mark.slow
@over_models
def test_it_learns_in_context(family: str) -> None:
    found = pretrain.score(load_digit_model(family), held_out=50)
    for name in RULES:
        assert found[f"{name}@24"] > 0.8, name
        assert found[f"{name}@0"] < 0.3, name


def test_episodes_follow_their_rules() -> None:
    known, draw = images(), Drawer(4, 3)
    by_image = {tuple(pixels.flatten().tolist()): int(d) for pixels, d in zip(known.pixels, known.digits, strict=True)}
    for k, kind in enumerate(KINDS):
        weights = tuple(float(i == k) for i in range(4))
        episodes = draw(Phase(1, 6, 25, (3, 8), weights))  # pyright: ignore[reportArgumentType]
        assert torch.equal(episodes.ids[:, episodes.asked + 1], episodes.answers)
        for ids, pixels, answers in zip(episodes.ids, episodes.pixels, episodes.answers, strict=True):
            rule: dict[tuple[int, int], set[int]] = {}
            for word, picture, answer in zip(ids[episodes.asked], pixels, answers, strict=True):
                rule.setdefault((int(word), by_image[tuple(picture.flatten().tolist())]), set()).add(int(answer))
            assert all(len(found) == 1 for found in rule.values())
            names = {next(iter(found)) for found in rule.values()}
            if kind == "plain":
                assert all(found == {FIRST_NAME + digit} for (_, digit), found in rule.items())
            elif kind == "grouping":
                assert len(names) <= 2
            else:
                assert len(names) == len(rule)
            assert (len({word for word, _ in rule}) > 1) == (kind == "sides")


@over_models
def test_training_is_repeatable_and_what_is_saved_is_what_was_trained(family: str, tmp_path: Any) -> None:
    models = [pretrain.train(family, steps=3, seed=0) for _ in range(2)]
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(models[0].parameters()), next(pretrain.train(family, 3, seed=1).parameters()))
    pretrain.save(models[0], tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    episodes = Drawer(DigitPrompter(loaded).image_tokens, 5)(CURRICULUM[0])
    with torch.no_grad():
        wanted, found = (pretrain.answer(model, family, episodes) for model in (models[0], loaded))
    assert torch.equal(wanted, found)


def test_a_course_goes_on_when_a_phase_is_mastered() -> None:
    course = pretrain.Course("idefics2", steps=100)
    for step in range(60):
        course.after(step, right=0.6)
    assert course.phase is CURRICULUM[0]
    step = 60
    while course.phase is CURRICULUM[0]:
        course.after(step, right=1.0)
        step += 1
    assert 60 < step < 200
    for later in range(step, step + 15):
        course.after(later, right=1.0)
    assert course.phase is CURRICULUM[1]
    course.after(step + 15, right=1.0)
    assert course.phase is CURRICULUM[2]


def test_random_draws_are_of_the_seed() -> None:
    assert RULES["8-digits"](random.Random(1)) == RULES["8-digits"](random.Random(1))
