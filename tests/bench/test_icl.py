"""The comparison of methods: what is taken or trained is what it should be, and the tables say what the rows say."""

from __future__ import annotations

import csv
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import mimic_core as mc
from benchmarks import records
from benchmarks.errors import BenchmarkError
from benchmarks.icl import __main__ as command
from benchmarks.icl import latency, plan, running, smolvlm, trials
from benchmarks.icl.__main__ import main
from benchmarks.icl.fit import Samples, fit
from benchmarks.icl.jobs import do
from benchmarks.icl.methods import ABLATIONS, CHOSEN, FACTORS, LABELS, MAIN, MIDDLE, PROMPTED, TAKEN, TRAINED
from benchmarks.icl.pictures import PICTURE_TASKS, picture_task
from benchmarks.icl.pretrain_eyes import seen
from benchmarks.icl.report import README_BEGIN, README_END, Results, headline, page, text
from benchmarks.icl.rows import Job, Row
from benchmarks.icl.running import measure
from benchmarks.icl.vectors import Asked, Taker, best_demonstrations, take
from benchmarks.icl.words import WORD_TASKS, word_task
from benchmarks.icl.worlds import World, world
from benchmarks.report import with_results
from mimic_core.demo.digits import images

pytestmark = pytest.mark.usefixtures("no_shape_checks")


@pytest.fixture(scope="module")
def llava() -> World:
    return world("llava")


@pytest.fixture
def task(llava: World) -> Any:
    return llava.task("3-digits", 40, 100, 30)


@pytest.mark.parametrize("name", WORD_TASKS)
def test_words_held_out_are_not_trained_on(name: str) -> None:
    pairs = WORD_TASKS[name]()
    assert len(pairs) >= 80
    assert all(question and answer and question != answer for question, answer in pairs)
    split = word_task(name, 40, 0, 40)
    assert (len(split.train), len(split.held_out)) == (40, 40)
    if name != "opposite":  # light is the opposite of heavy and of dark
        assert not {q for q, _ in split.train} & {q for q, _ in split.held_out}


def test_right_is_greedy_decoding(llava: World, task: Any) -> None:
    prompts = llava.prompts(task, 12, 0)
    batch = llava.prompter.collate(prompts)
    with torch.no_grad():
        logits = llava.model(**batch.inputs, use_cache=False).logits[batch.before_answer]
    wanted = logits.argmax(-1) == batch.inputs["input_ids"][batch.answer_tokens]
    assert llava.right(llava.model, prompts) == wanted.tolist()
    assert sum(wanted) > 20


def test_demonstrations_come_from_the_training_samples(llava: World, task: Any) -> None:
    train = {line.image for line in task.train}
    for similar in (False, True):
        for line, prompt in zip(task.held_out, llava.prompts(task, 5, 0, similar), strict=True):
            assert len(prompt.images) == 6
            assert set(prompt.images[:5]) <= train
            assert prompt.images[5] == line.image
    alike = [llava.prompts(task, 1, 0, similar)[0].images for similar in (False, True)]
    assert alike[0] != alike[1]


def test_a_training_sample_is_never_its_own_demonstration(llava: World, task: Any) -> None:
    samples = Samples(llava, replace(task, train=task.train[:6]), 0)
    seen = set()
    for _ in range(6):
        shown, alone = samples()
        assert shown.inputs["pixel_values"].shape[0] == 6 * llava.setup.batch  # the five others and itself
        assert alone.inputs["pixel_values"].shape[0] == llava.setup.batch
        pixels = shown.inputs["pixel_values"].unflatten(0, (llava.setup.batch, 6)).flatten(2)
        assert all(len(sample.unique(dim=0)) == 6 for sample in pixels)
        assert torch.equal(pixels[:, -1], alone.inputs["pixel_values"].flatten(1))
        seen |= {tuple(row.tolist()) for row in alone.inputs["pixel_values"].flatten(1)}
    assert len(seen) == 6


@pytest.mark.parametrize("name", TRAINED)
def test_every_method_trains_and_leaves_the_model_as_it_was(llava: World, task: Any, name: str) -> None:
    question = llava.prompter.collate(llava.prompts(task, 0, 0)).inputs
    with torch.no_grad():
        before = llava.model(**question).logits
    fitted = fit(llava, task, name, 0, steps=3)
    with torch.no_grad():
        assert torch.equal(llava.model(**question).logits, before)
        with fitted.applied() as model:
            assert not torch.equal(model(**question).logits, before)
        assert torch.equal(llava.model(**question).logits, before)
    of_lora = sum(p.numel() for n, p in fitted.model.named_parameters() if "lora_" in n)
    of_shifts = sum(p.numel() for p in fitted.shifts.parameters()) if fitted.shifts else 0
    assert fitted.parameters == of_lora + of_shifts > 0
    assert (of_lora > 0, of_shifts > 0) == (bool(TRAINED[name].lora), TRAINED[name].head is not None)
    assert not any(p.requires_grad for n, p in fitted.model.named_parameters() if "lora_" not in n)


@pytest.mark.slow
def test_mimic_closes_the_gap_of_an_easy_task(llava: World, task: Any) -> None:
    before = llava.right(llava.model, llava.prompts(task, 0, 0))
    with fit(llava, task, "mimic", 0, steps=80).applied() as model:
        after = llava.right(model, llava.prompts(task, 0, 0))
    assert sum(before) < 5
    assert sum(after) > 24


def test_a_task_vector_is_the_mean_state_at_the_end_of_prompts(llava: World, task: Any) -> None:
    shifts = take(llava, task, "task-vector", 0).shifts
    assert shifts is not None
    (head,) = shifts
    asked = Taker(llava, task, 0)._shown(16)
    states: list[Tensor] = []
    layer = llava.model.get_submodule(head.layer.path)
    handle = layer.register_forward_hook(lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        llava.model(**asked.inputs, use_cache=False)
    handle.remove()
    torch.testing.assert_close(head.get_parameter("vector").detach(), states[0][:, -1].mean(0))
    assert head.get_parameter("weight").item() == 1


def test_a_function_vector_is_the_heads_through_the_output_projection(llava: World, task: Any) -> None:
    taker = Taker(llava, task, 0)
    means = taker._means()
    chosen = [(0, 1), (2, 7), (2, 3)]
    found = taker._written(means, chosen) - taker._written(means, [])
    wanted = torch.zeros(96)
    for index, head in chosen:
        weight = llava.model.model.language_model.layers[index].self_attn.o_proj.weight
        wanted += weight[:, 12 * head : 12 * (head + 1)] @ means[index][head]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_the_estimate_of_a_heads_effect_is_its_derivative(llava: World, task: Any) -> None:
    taker = Taker(llava, task, 0)
    means, asked = taker._means(), taker._shown(4, shuffled=True)
    estimates = taker._estimates(asked, means)
    for layer, head in ((0, 0), (1, 5), (3, 2)):

        def moved(by: float, layer: int = layer, head: int = head) -> float:
            def edit(value: Tensor, at: mc.At) -> Tensor:
                value = value.clone()
                value[:, -1, head] += by * (means[layer][head] - value[:, -1, head])
                return value

            with torch.no_grad(), mc.hook(llava.model, "attn_heads", edit, layers=[layer]):
                return asked.log_likelihood().exp().mean().item()

        slope = (moved(0.01) - moved(-0.01)) / 0.02
        assert estimates[layer, head] == pytest.approx(slope, abs=2e-4, rel=0.05)


def test_a_shuffled_prompt_has_the_same_answers_elsewhere(llava: World, task: Any) -> None:
    plain, shuffled = (Taker(llava, task, 3)._shown(8, shuffled=s) for s in (False, True))
    assert isinstance(plain, Asked)
    one, other = plain.inputs["input_ids"][0], shuffled.inputs["input_ids"][0]
    assert not torch.equal(one, other)
    assert sorted(one.tolist()) == sorted(other.tolist())


def test_the_plan_is_whole() -> None:
    jobs = plan.full()
    assert len(jobs) == len(set(jobs))
    assert {job.method for job in jobs} == set(LABELS) == {*PROMPTED, *TAKEN, *TRAINED}
    for one, seeds in plan.SEEDS.items():
        assert {job.seed for job in jobs if job.world == one} == set(range(seeds))
    assert {one: len({job.task for job in jobs if job.world == one}) for one in ("smolvlm", "smollm2")} == {
        "smolvlm": 8,
        "smollm2": 8,
    }
    for one, name in plan.CURVES:
        for method in plan.CURVE:
            counts = {job.samples for job in jobs if (job.world, job.task, job.method) == (one, name, method)}
            assert counts >= set(plan.CURVE_SAMPLES)
    assert {job.method for job in jobs if job.task in plan.VARIED["llava"]} >= set(ABLATIONS)
    assert {(job.world, job.task) for job in jobs} >= plan.OTHERS | plan.LOOKED_AT
    # What a stopped run leaves is whole seeds.
    first = [job for job in jobs if job.world == "smollm2"]
    assert [job.seed for job in first] == sorted(job.seed for job in first)


def test_learning_rates_are_those_that_the_trials_found_best() -> None:
    for kind in (0, 1):
        tried = trials.jobs(kind)
        assert {job.seed for job in tried} == {trials.SEED}
        assert {sum(job.method == method for job in tried) for method in MIDDLE} == {
            len(FACTORS) * len(trials.TASKS[kind])
        }
    assert trials.SEED not in {job.seed for job in plan.full()}
    assert trials.chosen(records.read(trials.FILE, Row)) == CHOSEN


@pytest.mark.parametrize("name", PICTURE_TASKS)
def test_a_held_out_picture_is_never_a_training_picture(name: str) -> None:
    found = picture_task(name, 100, 0, 100)
    assert (len(found.train), len(found.held_out)) == (100, 100)
    train, held_out = ({i for scene in scenes for i in scene.images} for scenes in (found.train, found.held_out))
    assert train <= set(images().train)
    assert held_out <= set(images().held_out)
    counts = [sum(scene.answer == answer for scene in found.held_out) for answer in {s.answer for s in found.held_out}]
    assert max(counts) < 75  # No answer is right for nearly all.
    assert picture_task(name, 100, 0, 100) == found


def test_the_encoder_reads_pictures_it_has_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder of SmolLM2's width stands in for it: what an image becomes depends on the encoder alone."""
    sizes = {"hidden_size": 576, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 9}
    decoder = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=3, **sizes))
    monkeypatch.setattr(smolvlm, "load_model", lambda: (decoder, SimpleNamespace(pad_token_id=0, eos_token_id=0)))
    model, _ = smolvlm.load()
    known = images()

    def tokens(indices: list[int]) -> Tensor:
        with torch.no_grad():
            return seen(model, known.pixels[indices].bfloat16()).float()

    held_out = known.held_out[:200]
    middles = torch.stack([tokens([i for i in known.train if known.digits[i] == d][:30]).mean(0) for d in range(10)])
    nearest = torch.cdist(torch.cat([tokens([i]) for i in held_out]), middles).argmin(1)
    assert (nearest == known.digits[held_out]).float().mean() > 0.95


def test_best_demonstrations_are_training_samples_that_do_well(llava: World, task: Any) -> None:
    shown = best_demonstrations(llava, task, 6, 0)
    assert len(shown) == 6
    assert set(shown) <= set(task.train)
    right = llava.right(llava.model, [llava.prompter(line, shown) for line in task.held_out])
    assert sum(right) >= sum(llava.right(llava.model, llava.prompts(task, 6, 0))) - 2


@pytest.mark.parametrize("method", TAKEN)
def test_what_is_taken_acts_and_is_taken_again_the_same(llava: World, task: Any, method: str) -> None:
    found, again = (take(llava, task, method, 0) for _ in range(2))
    assert found.shifts is not None
    assert again.shifts is not None
    assert all(torch.equal(x, again.shifts.state_dict()[name]) for name, x in found.shifts.state_dict().items())
    question = llava.prompter.collate(llava.prompts(task, 0, 0)).inputs
    with torch.no_grad(), found.applied() as model:
        shifted = model(**question).logits
    with torch.no_grad():
        assert not torch.equal(llava.model(**question).logits, shifted)
    assert found.bytes() > 4 * found.parameters


def rows() -> list[Row]:
    """Two seeds of one task: 0% without, 80% and 60% with demonstrations, MimIC 80% and 30%."""
    found = []
    for seed, (shown, mimic) in enumerate(((0.8, 0.8), (0.6, 0.3))):
        base = Row(what="accuracy", world="llava", task="t", seed=seed, samples=100, shots=0, prompt_tokens=6.0)
        found += [
            replace(base, method="zero-shot", value=0.0),
            replace(base, method="icl", shots=24, value=shown),
            replace(base, method="mimic", value=mimic, parameters=800),
        ]
    return found


def test_tables_say_what_the_rows_say(tmp_path: Path) -> None:
    results = Results(rows())
    assert results.shares("llava", "t", "mimic") == pytest.approx([1.0, 0.5])
    assert results.mean_share("llava", "mimic") == "75 ± 35"
    line = next(line for line in text(rows()).splitlines() if line.startswith("| MimIC "))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells == ["MimIC", "55 ± 35", "75 ± 35", "800", "-", "6", "-", "-"]
    assert "| MimIC" in headline(rows())
    assert "75 ± 35" in page(rows(), [])
    records.write(tmp_path / "icl.csv", rows(), Row)
    assert [asdict(row) for row in records.read(tmp_path / "icl.csv", Row)] == [asdict(row) for row in rows()]


def test_a_mean_with_a_part_missing_is_not_shown_as_whole() -> None:
    jobs = [replace(row.job, seed=seed, task=task) for row in rows() for seed in (0, 1) for task in ("t", "u")]
    more = [replace(row, task="u") for row in rows() if not (row.method == "mimic" and row.seed == 1)]
    whole, part = Results([*rows(), *more], jobs[:0]), Results([*rows(), *more], jobs)
    assert whole.mean_share("llava", "mimic") != "-"  # Nothing says that there was to be more.
    assert part.mean_share("llava", "mimic") == "-"
    assert (part.cell("llava", "t", "mimic"), part.cell("llava", "u", "mimic")) == ("55 ± 35", "80 (1 of 2)")
    assert part.ranks("llava", ("zero-shot", "mimic")) == {}
    assert part.ranks("llava", ("zero-shot",)) == {"zero-shot": 1.0}
    assert part.missing() == {"llava": (1, 12)}
    assert "1 of 12 for Digits, Llava" in page(part.rows, [], jobs)
    assert "not complete" not in page(rows(), [], {row.job for row in rows()})


class InThisProcess(ThreadPoolExecutor):
    """In place of processes, which import everything first: CI runs the command with them. It pickles, as they do."""

    def __init__(self, processes: int, context: Any, initializer: Any) -> None:
        assert context.get_start_method() == "spawn"
        super().__init__(processes, initializer=initializer)

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        call = pickle.loads(pickle.dumps((fn, args, kwargs)))
        return super().submit(lambda: pickle.loads(pickle.dumps(call[0](*call[1], **call[2]))))


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "ProcessPoolExecutor", InThisProcess)
    job = Job("llava", "3-digits", 100, "zero-shot", 20, 0, 10)
    path = tmp_path / "icl.csv"
    once = measure([job], [], path, processes=1)
    with path.open() as file:
        assert len(list(csv.DictReader(file))) == len(once) == 1
    assert once[0].job == job
    marked = [replace(once[0], value=0.123)]
    assert measure([job], marked, path, processes=1) == marked
    assert measure([replace(job, seed=101)], marked, path, processes=1)[0].job.seed == 101


def test_a_job_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "ProcessPoolExecutor", InThisProcess)
    wrong = Job("llava", "no-such-task", 100, "zero-shot", 20, 0, 10)
    right = replace(wrong, task="3-digits")
    with pytest.raises(BenchmarkError, match="1 of 2 jobs failed(.|\n)*no-such-task"):
        measure([wrong, right], [], tmp_path / "icl.csv", processes=1)
    assert [row.job for row in records.read(tmp_path / "icl.csv", Row)] == [right]


def test_every_method_decodes_a_token_to_be_timed(llava: World) -> None:
    found = latency.contestants(llava)
    assert set(found) == {"zero-shot", "icl", *TAKEN, *MAIN, "mimic+lora"}
    for one in found.values():
        with one.decoding():
            assert one.token().logits.shape[:2] == (1, 1)


def test_a_job_gives_the_same_rows_again() -> None:
    job = Job("llava", "2-groups", 100, "live", 30, 4, 20, "distance shots")
    first, again = ([replace(row, seconds=None) for row in do(job)] for _ in range(2))
    assert first == again
    assert {row.what for row in first} == {"accuracy", "distance"}
    assert [row.layer for row in first if row.what == "distance"] == [0, 1, 2, 3]
    assert [row.shots for row in first if row.what == "accuracy"] == [0, 1, 4, 12, 24]


def test_nothing_to_report_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is nothing to report in"):
        main(["--report", "--out", str(tmp_path)])


def test_a_run_and_a_later_report_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured numbers have more digits than the file: at both times the pictures and pages are of the file's."""
    pytest.importorskip("matplotlib")

    def measured(jobs: Any, rows: list[Row], path: Path, processes: int) -> list[Row]:
        seen = Row(what="distance", world="llava", task="t", seed=0, method="mimic", samples=100)
        found = [replace(seen, layer=layer, value=layer + 1.0000049) for layer in range(3)]
        found += [replace(row, value=(row.value or 0.0) / 3 + 1e-7) for row in accuracies()]
        records.write(path, found, Row)
        return found

    accuracies = rows
    monkeypatch.setattr(command, "measure", measured)
    written = []
    for asked in (("--quick",), ("--quick", "--report")):
        main([*asked, "--out", str(tmp_path)])
        written.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert set(written[0]) == {"icl.csv", "README.md", "distance.png"}
    assert [name for name, content in written[0].items() if written[1][name] != content] == []


RESULTS = records.ROOT / "docs" / "results"


def test_the_pages_say_the_results_and_what_is_missing() -> None:
    """Every row is of a planned job, and nobody has edited what is written from them."""
    found, jobs = records.read(RESULTS / "icl.csv", Row), plan.full()
    done = {row.job for row in found if row.what not in latency.WHAT}
    assert done <= set(jobs)
    pictures = [
        path for name in ("cost", "samples", "shots", "distance") if (path := RESULTS / f"{name}.png").is_file()
    ]
    written = (RESULTS / "README.md").read_text()
    assert written == page(found, pictures, jobs)
    assert ("This run is not complete" in written) == (len(done) < len(jobs))
    readme = (records.ROOT / "README.md").read_text()
    assert with_results(readme, headline(found, jobs), README_BEGIN, README_END) == readme
