"""The pictures of gates: what is read is what the model does, and the page says what the rows say."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mimic_core as mc
from benchmarks import records
from benchmarks.icl import gate_figures, gate_report, gates
from benchmarks.icl.fit import fit
from benchmarks.icl.gate_reading import of_demonstrations, of_shifts
from benchmarks.icl.gate_report import GateRow
from benchmarks.icl.worlds import World, world
from benchmarks.report import with_results

# transformers' eager attention takes the softmax in fp32 in every model.
FP32 = {"rtol": 1e-5, "atol": 1e-6}

pytestmark = pytest.mark.usefixtures("no_shape_checks")


@pytest.fixture(scope="module")
def llava() -> World:
    return world("llava")


@pytest.fixture(scope="module")
def exact(llava: World) -> Any:
    """The digits' model in fp64, where a difference of two outputs has many digits left."""
    return copy.deepcopy(llava.model).double()


@pytest.fixture
def task(llava: World) -> Any:
    return llava.task("2-words", 40, 100, 5)


def in_fp64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def before_projection(model: nn.Module, inputs: dict[str, Tensor], shifts: mc.ShiftStack) -> list[Tensor]:
    """What enters the output projections of a patched model, [t h e] by layer, by torch's own hooks."""
    seen: list[Tensor] = []
    layers = model.model.language_model.layers
    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in layers]
    with torch.no_grad(), mc.patch(model, shifts):
        model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [x[0].unflatten(-1, (8, -1)) for x in seen]


@pytest.mark.parametrize("steps", [0, 20])
def test_a_gate_is_what_the_shift_adds_over_its_vector(llava: World, exact: Any, task: Any, steps: int) -> None:
    shifts = fit(llava, task, "mimic", 0, steps).shifts
    assert shifts is not None
    inputs = in_fp64(llava.prompter.collate(llava.prompts(task, 0, 0)[:1]).inputs)
    read = of_shifts(exact, shifts, inputs)
    assert read.share.shape == (4, 8, 7)
    shifted = before_projection(exact, inputs, shifts)
    for layer in range(4):
        # The layers before still shift, so this layer sees what it sees with the whole stack.
        without = copy.deepcopy(shifts)
        nn.init.zeros_(without[layer].vector)
        plain = before_projection(exact, inputs, without)[layer]
        moved = shifted[layer] - plain
        gate = moved / shifts[layer].vector.detach().double()  # t h e: the same in every channel
        torch.testing.assert_close(gate, read.share[layer].T[..., None].expand_as(gate), rtol=1e-6, atol=1e-9)
        size = moved.flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
        torch.testing.assert_close(size, read.size[layer], rtol=1e-6, atol=1e-12)
    if steps:
        assert read.share.std() > 0.1


@pytest.mark.parametrize("shots", [1, 12])
def test_the_share_of_demonstrations_is_their_attention_weight(llava: World, exact: Any, task: Any, shots: int) -> None:
    (prompt,) = llava.prompts(task, shots, 0)[:1]
    inputs = in_fp64(llava.prompter.collate([prompt]).inputs)
    read = of_demonstrations(exact, prompt, inputs)
    eager = copy.deepcopy(exact)
    eager.set_attn_implementation("eager")
    with torch.no_grad(), mc.capture(eager, "value") as seen:
        weights = eager(**inputs, use_cache=False, output_attentions=True).attentions
    start = prompt.query_at
    for layer, weight in enumerate(weights):
        of_line = weight[0, :, start:]  # h t s
        demonstrations = of_line[:, :, 1:start]
        torch.testing.assert_close(read.share[layer, :, 1:], demonstrations.sum(-1), **FP32)
        own = of_line.clone()
        own[:, :, 1:start] = 0
        own = own / own.sum(-1, keepdim=True)
        with_them, without = (w @ seen.states[layer][0] for w in (of_line, own))
        lengths = ((with_them - without).norm(dim=(0, 2)), without.norm(dim=(0, 2)))
        torch.testing.assert_close(read.size[layer, 1:], lengths[0] / lengths[1], **FP32)
    assert (read.share[:, :, 0] == 0).all()
    assert (read.size[:, 0] == 0).all()


def test_without_demonstrations_their_share_is_nothing(llava: World, exact: Any, task: Any) -> None:
    (prompt,) = llava.prompts(task, 0, 0)[:1]
    read = of_demonstrations(exact, prompt, in_fp64(llava.prompter.collate([prompt]).inputs))
    torch.testing.assert_close(read.share, torch.zeros_like(read.share), rtol=0, atol=1e-12)


@pytest.mark.newest
def test_a_quick_run_writes_rows_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = gates.PAGE.read_text()
    arguments = ["--quick", "--worlds", "llava", "--shifts", str(tmp_path / "kept"), "--out"]
    gates.main([*arguments, str(tmp_path / "one")])
    gates.main([*arguments, str(tmp_path / "two")])
    assert gates.PAGE.read_text() == page
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["llava-2-words-0-10"]
    names = {"gates.csv", "gates.png", "gates-tokens.png", "gates-rule.png", "gates-size.png"}
    for name in names:
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
        assert one == two
        assert b"Software" not in one
    assert {path.name for path in (tmp_path / "one").iterdir()} == names

    rows = records.read(tmp_path / "one" / "gates.csv", GateRow)
    of = {what: [row for row in rows if row.what == what] for what in ("accuracy", "gate", "size", "token", "rule")}
    assert {what: len(found) for what, found in of.items() if what != "rule"} == {
        "accuracy": 1,
        "gate": 4 * 8,
        "size": 4,
        "token": 7 * (1 + gates.CHOSEN),
    }
    assert sum(map(len, of.values())) == len(rows)
    line = [row.text for row in of["token"] if row.head is None]
    assert line[:5] == ["start", *gates.PATCHES]
    assert line[5] in ("left", "right")
    assert all(row.learned is not None and 0 <= row.learned <= 1 for row in rows if row.what != "size")
    end = [row for row in of["token"] if row.token == 5 and row.head is not None]
    assert len({(row.layer, row.head) for row in end}) == gates.CHOSEN
    by_place = {(row.layer, row.head): row.learned or 0 for row in of["gate"]}
    found = sorted((by_place[row.layer, row.head] for row in end[: gates.CHOSEN // 2]), reverse=True)
    assert found == sorted(by_place.values(), reverse=True)[: gates.CHOSEN // 2]
    before = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    gates.main(["--report", "--out", str(tmp_path / "one")])
    assert {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()} == before
    assert "| 2-words |" in capsys.readouterr().out


def test_tokens_of_words_are_named() -> None:
    texts = {7: " keep", 8: ":", 9: " kept", 10: "\n"}
    prompter = SimpleNamespace(decode=lambda ids: texts[ids[0]].split("\n")[0].strip())
    place = SimpleNamespace(name="smollm2", prompter=prompter)
    found = gates.tokens(place, SimpleNamespace(ids=[1, 7, 8, 9, 10]))
    assert found == ["start", "keep", ":", "kept", "newline"]


def rows() -> list[GateRow]:
    """Two seeds of two layers and two attention heads; the gates of the second are those of the first, turned round."""
    found = []
    for seed in (0, 1):
        base = GateRow(world="llava", task="t", seed=seed, shots=24)
        found.append(replace(base, what="accuracy", before=0.0, learned=0.5, demonstrations=0.75))
        for layer in (0, 1):
            found.append(replace(base, what="size", layer=layer, before=0.0, learned=2.0 + layer, demonstrations=0.5))
            for head in (0, 1):
                gate = (0.1 + 0.2 * layer + 0.4 * head) if seed == 0 else (0.7 - 0.2 * layer - 0.4 * head)
                share = 0.9 - gate if seed == 0 else gate
                place = replace(base, what="gate", layer=layer, head=head)
                found.append(replace(place, before=gate, learned=gate, demonstrations=share))
    return found


def test_tables_say_what_the_rows_say() -> None:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in gate_report.tables(rows()).splitlines()]
    assert ["llava", "t", "0", "0%", "50%", "75%", "0.40", "0.40", "0.50", "1.00", "-1.00"] in lines
    assert ["llava", "t, seed 0", "t, seed 1", "-1.00", "-1.00", "1.00"] in lines
    assert ["layer 0", "0.30", "0.30", "0.60", "2.00", "0.50"] in lines
    assert ["layer 1", "0.50", "0.50", "0.40", "3.00", "0.50"] in lines


def test_nothing_to_report_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is nothing to report in"):
        gates.main(["--report", "--out", str(tmp_path)])


def test_the_results_are_whole_and_the_page_says_them(tmp_path: Path) -> None:
    """Every run has its rows, and nobody has edited what is written from them."""
    found = records.read(gates.IMAGES / "gates.csv", GateRow)
    assert list(gate_report.by_run(found)) == list(gates.RUNS)
    drawn = gate_figures.draw(found, tmp_path)
    assert all((gates.IMAGES / path.name).is_file() for path in drawn)
    page = gates.PAGE.read_text()
    assert all(f"(images/{path.name})" in page for path in drawn)
    assert with_results(page, gate_report.tables(found), gates.BEGIN, gates.END) == page
