"""The benchmarks run, refuse what is wrong, count memory rightly; and the docs show what the CSV files hold."""

from __future__ import annotations

import re
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mimic_core as mc
from benchmarks import (
    bench_heads,
    bench_host,
    bench_patch,
    bench_shift,
    bench_stacks,
    card,
    cases,
    check,
    contestants,
    measure,
    published,
    records,
    report,
)
from benchmarks.__main__ import main
from benchmarks.errors import BenchmarkError
from benchmarks.models import Subject
from benchmarks.targets import TARGETS, Target
from mimic_core.heads.base import _HEADS
from tests.support import oracles
from tests.support.cases import CASES, Case, fresh_model, logits_of, model_of, random_shifts

CPU, DOUBLE = torch.device("cpu"), torch.float64
BRIEF = measure.Effort(seconds=0.0, rounds=3, sample=0.0)
TINY = [cases.Case("d64", t, t, mask=mask) for t in (16, 32) for mask in ("causal", "padded")]


def tiny_model(device: torch.device, dtype: torch.dtype) -> Subject:
    llama = next(case for case in CASES if case.name == "llama")
    return Subject("tiny", nn.Module.to(fresh_model(llama), device, dtype), 128)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_shift, "prefill_cases", lambda device, quick: TINY)
    monkeypatch.setattr(bench_shift, "decode_cases", lambda device, quick: [cases.Case("d64", 1, 24, mask="none")])
    monkeypatch.setattr(measure, "QUICK", BRIEF)
    monkeypatch.setattr(bench_host, "_QUICK", BRIEF)
    monkeypatch.setattr(bench_heads, "QUICK", BRIEF)
    monkeypatch.setattr(bench_patch, "smollm2", tiny_model)
    monkeypatch.setattr(bench_patch, "small_llava", tiny_model)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny", "no_shape_checks")
def test_quick_run_writes_rows_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    page = report.PAGE.read_text()
    main(["--quick", "--device", "cpu", "--out", str(tmp_path)])
    rows = records.read(tmp_path / "part-cpu.csv")
    assert {path.name for path in tmp_path.iterdir()} == {"part-cpu.csv", "time-part-cpu.png", "memory-part-cpu.png"}
    assert {row.what for row in rows} == {
        *("forward", "forward+backward", "decode", "live forward", "live forward+backward", "error"),
        *("prefill", "decode step", "training step", *bench_stacks.STAGES),
        *bench_host.CALLS,
        *([bench_host.STATIC_CACHE] if bench_host.CAN_COMPILE else []),
    }
    for row in rows:
        facts = (row.date, row.device, row.cores, row.threads, row.torch, row.transformers, row.python)
        assert all(facts)
        assert all((row.bench, row.case, row.model, row.dtype, row.what, row.contestant, row.yardstick))
        if row.what == "error":
            assert row.of
            assert row.error is not None
            assert row.yardstick_error is not None
        elif row.of:
            assert row.count is not None
        else:
            assert None not in (row.ratio, row.ratio_p20, row.ratio_p80, row.time_us, row.added_us)
            assert row.rounds == BRIEF.rounds
            assert row.what == "decode step" or row.bench in ("host", "stacks", "heads") or row.peak_bytes
        if (
            row.contestant == contestants.OURS
            and not row.what.startswith("live")
            and row.bench not in ("host", "heads")
        ):
            assert row.backend
            assert row.why
    forward = [row for row in rows if row.case == TINY[0].name and row.what == "forward"]
    assert [row.contestant for row in forward][:2] == ["sdpa", "mimic_core"]
    assert forward[-1].contestant == "published"
    assert (forward[0].b, forward[0].h, forward[0].g, forward[0].t, forward[0].s, forward[0].d) == (1, 8, 8, 16, 16, 64)
    host = [row for row in rows if row.bench == "host"]
    assert {row.threads for row in host} == {1}
    assert {row.contestant for row in host if row.model == "tiny-llama" and row.layers == 8} == {
        *(bench_patch.UNPATCHED, bench_patch.MIMIC, bench_patch.LIVE, contestants.PUBLISHED),
        *(bench_host.PUBLISHED_LIVE, bench_host.PLAIN_ADD),
    }
    counted = {(row.contestant, row.of): row.count for row in host if row.what == bench_host.STATIC_CACHE}
    assert set(counted.values()) <= {0}, counted
    assert len(counted) == (6 if bench_host.CAN_COMPILE else 0)
    launched = {row.contestant: row.count or 0 for row in host if row.of == "launches" and row.what == "forward"}
    assert launched[bench_patch.UNPATCHED] == 0 < launched[contestants.PUBLISHED]
    assert launched[bench_patch.MIMIC] < launched[contestants.PUBLISHED]
    assert {row.of for row in rows if row.what == "error"} == {"out", *contestants.LEAVES}
    printed = capsys.readouterr().out
    assert all(target.name in printed for target in TARGETS)
    assert report.PAGE.read_text() == page, "a quick run leaves the docs alone"


@pytest.mark.usefixtures("tiny", "no_shape_checks")
def test_a_part_keeps_the_rows_of_the_other(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    brief = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--cases"]
    for case in ("live-c576-t1", "tiny_model decode 64"):
        main([*brief, case, "--only", "patch" if "decode" in case else "shift"])
    assert {row.bench for row in records.read(tmp_path / "part-cpu.csv")} == {"shift", "patch"}
    with pytest.raises(SystemExit, match="no case matches 'nothing'"):
        main([*brief, "nothing"])


@pytest.mark.newest
@pytest.mark.usefixtures("tiny", "no_shape_checks")
def test_the_script_for_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="needs a GPU, and torch"):
        card.main(["--out", str(tmp_path)])
    monkeypatch.setattr(card, "_TESTS", Path(__file__).parents[1] / "ops" / "test_gpu.py")
    monkeypatch.setattr(card.os, "cpu_count", lambda: 1)  # each process of its tests imports everything
    ordered = card._ordered
    monkeypatch.setattr(bench_shift, "effort_for", lambda device, quick: BRIEF)
    monkeypatch.setattr(card, "_ordered", lambda device: [task for task in ordered(device) if "t16" in task.name])
    card.main(["--device", "cpu", "--out", str(tmp_path), "--minutes", "5"])
    assert "skipped" in (tmp_path / "tests.txt").read_text()
    assert {row.model for row in records.read(tmp_path / "cpu.csv")} == {"d64"}
    assert "mimic_core" in (tmp_path / "page.md").read_text()
    monkeypatch.setattr(card, "_TESTS", tmp_path / "none.py")
    with pytest.raises(SystemExit, match="the tests failed"):
        card.main(["--device", "cpu", "--out", str(tmp_path), "--minutes", "0"])


def test_the_script_for_a_card_forgets_no_task() -> None:
    tasks = list(card._ordered(CPU))
    assert len({task.name for task in tasks}) == len(tasks) > 60
    assert tasks[0].name == "host call eager"


def drops_the_gradient_of_the_lse(x: cases.Inputs) -> Tensor:
    out, lse = mc.ops.attention_with_lse(x.q, x.k, x.v, mask=x.mask, is_causal=x.is_causal)
    return mc.ops.gated_shift(out, x.q, lse.detach(), x.vector, x.gate_weight, x.gate_bias)


def sees_the_future(x: cases.Inputs) -> Tensor:
    return mc.ops.shifted_attention(*x[:6])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("wrong", "said"), [(drops_the_gradient_of_the_lse, "k "), (sees_the_future, "out ")])
def test_what_is_wrong_is_refused(wrong, said: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.Case("smolvlm-256m", 48, 48, dtype)
    inputs = cases.make_inputs(case, CPU)
    cheat = contestants.Contestant("cheat", wrong)
    limit = f"{check.LIMITS[dtype]:g}"
    with pytest.raises(BenchmarkError, match=rf"cheat is wrong in {case.name} .*{said}.* the limit is {limit}"):
        check.check(cheat, case, inputs, check.wanted_of(inputs))
    honest = contestants.contestants(inputs)
    monkeypatch.setattr(bench_shift, "contestants", lambda inputs, flex: [*honest, cheat])
    refused: list[BenchmarkError] = []
    rows = bench_shift.measure_case(case, CPU, BRIEF, refused)
    assert [str(error).split()[0] for error in refused] == ["cheat"]
    assert {row.contestant for row in rows} == {c.name for c in honest}


def test_every_head_is_measured() -> None:
    assert {name: mc.heads.head_for_config(config).name for name, config in bench_heads.CONFIGS.items()} == {
        name: name for name in _HEADS
    }


def test_heads_that_are_wrong_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[BenchmarkError] = []
    monkeypatch.setattr(bench_heads, "CONFIGS", {"mimic": mc.MimICConfig(), "live": mc.LIVEConfig()})
    forward = mc.heads.LIVEHead.forward
    monkeypatch.setattr(
        mc.heads.LIVEHead, "forward", lambda self, x, at: forward(self, x, at) * (1 + 0.1 * (x.dtype != DOUBLE))
    )
    rows = bench_heads.measure_heads(bench_heads.FORWARD, 16, CPU, BRIEF, refused)
    assert [row.contestant for row in rows] == [bench_patch.UNPATCHED, "mimic"]
    right = mc.ops.virtual_context
    monkeypatch.setattr(
        mc.ops, "virtual_context", lambda *x: right(*x) if x[3].shape[1] > 1 else right(*x[:5], 0.9 * x[5], x[6])
    )
    rows = bench_heads.measure_pairs(cases.Case("d64", 16, 16), CPU, BRIEF, refused)
    assert [str(error).split(" is wrong")[0] for error in refused] == ["live", bench_heads.of_pairs(1)]
    assert [row.contestant for row in rows][:2] == ["sdpa", "mimic_core"]
    assert len(rows) == 5


def test_nan_is_refused() -> None:
    found = check.error(torch.tensor([1.0, torch.nan]), torch.ones(2).double())
    with pytest.raises(BenchmarkError, match="out inf"):
        check.refuse("cheat", "a case", {"out": found.largest}, 1.0)


@pytest.mark.parametrize("case", [*TINY, cases.Case("smolvlm-256m", 16, 16), cases.Case("d64", 1, 9, mask="none")])
def test_the_reference_is_whole_when_it_is_taken_in_parts(case: cases.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_ELEMENTS", 1000)
    inputs = cases.make_inputs(case, CPU)
    wanted = check.wanted_of(inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs[:6]]
    out = mc.ops.shifted_attention(*exact, mask=inputs.mask, is_causal=inputs.is_causal, backend="reference")
    torch.testing.assert_close(wanted.shifted["out"], out[:, :, wanted.heads])
    gradients = torch.autograd.grad(out, exact, inputs.grad.double())
    for name, gradient in zip(contestants.LEAVES, gradients, strict=True):
        chosen = wanted.key_heads if name in ("k", "v") else wanted.heads
        part = gradient[:, chosen] if gradient.ndim == 4 else gradient[chosen]
        torch.testing.assert_close(wanted.shifted[name], part)
    assert wanted.plain.keys() == {"out", "q", "k", "v"}


@pytest.mark.parametrize(
    ("g", "mask"), [(4, "none"), (2, "causal"), (1, "padded"), (4, "additive")], ids=lambda x: str(x)
)
def test_the_published_form_is_the_same_function(g: int, mask: str) -> None:
    b, h, t, d = 2, 4, 6, 8
    x = [torch.randn(b, n, t, d, dtype=torch.float64) for n in (h, g, g)]
    x += [torch.randn(h, d, dtype=torch.float64), torch.randn(h, d, dtype=torch.float64), torch.randn(h).double()]
    leaves = [leaf.requires_grad_() for leaf in x]
    given = {"padded": cases.padded_mask(b, t, CPU), "additive": torch.randn(1, 1, t, t).double()}.get(mask)
    out = published.published_attention(*leaves, given, mask == "causal")
    wanted = oracles.shifted_attention(*leaves, mask=given, is_causal=mask == "causal")
    torch.testing.assert_close(out, wanted)
    grad = torch.randn_like(out)
    found, right = (torch.autograd.grad(result, leaves, grad) for result in (out, wanted))
    for ours, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_published_form_in_a_model(case: Case) -> None:
    model = model_of(case)
    shifts = random_shifts(model, "mimic")
    inputs = case.inputs("left")
    plain, config = logits_of(model, inputs), str(model.config)
    with mc.patch(model, shifts):
        wanted = logits_of(model, inputs)
    with published.published(model, shifts):
        found = logits_of(model, inputs)
        with published.unshifted():
            unshifted = logits_of(model, inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(unshifted[real], plain[real], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[real], plain[real], atol=1e-2)
    assert torch.equal(logits_of(model, inputs), plain)
    assert str(model.config) == config


def test_peak_memory_of_known_patterns() -> None:
    size = 1 << 20
    outside = [torch.empty(size)]
    big = torch.randn(1024, 1024)

    def one_after_the_other() -> Tensor:
        first = torch.empty(4 * size, dtype=torch.int8)
        del first
        return torch.empty(2 * size, dtype=torch.int8)

    def together() -> Tensor:
        first = torch.empty(4 * size, dtype=torch.int8)
        second = torch.empty(2 * size, dtype=torch.int8)
        return first[: len(second)]

    def frees_what_was_there() -> Tensor:
        outside.clear()
        return torch.empty(size, dtype=torch.int8)

    assert measure.peak_memory(one_after_the_other, CPU) == 4 * size
    assert measure.peak_memory(together, CPU) == 6 * size
    assert measure.peak_memory(frees_what_was_there, CPU) == size
    assert measure.peak_memory(lambda: None, CPU) == 0
    # Inside the kernel a copy of its argument, which is gone when it returns; outside one number a row.
    inside = measure.peak_memory(lambda: big.logsumexp(-1), CPU)
    assert 4 * size <= inside <= 4 * size + 8 * 4 * 1024
    leaf = big.requires_grad_()
    kept = measure.peak_memory(lambda: torch.autograd.grad((leaf * leaf).exp().sum(), leaf), CPU)
    assert kept >= 3 * 4 * size


def test_peak_memory_knows_nothing_of_earlier_calls() -> None:
    """What was there before often lies where an earlier call's result lay. Its end is no part of the next call."""
    size = 1 << 20
    outside: list[Tensor] = []

    def frees_what_was_there() -> Tensor:
        outside.clear()
        return torch.empty(size, dtype=torch.int8)

    for _ in range(20):
        assert measure.peak_memory(lambda: torch.empty(4 * size, dtype=torch.int8), CPU) == 4 * size
        outside.append(torch.empty(size))
        assert measure.peak_memory(frees_what_was_there, CPU) == size


def test_contestants_take_turns() -> None:
    ran: list[str] = []
    entered: list[str] = []

    class Around:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            entered.append(self.name)

        def __exit__(self, *exception: object) -> None:
            entered.append(f"after {self.name}")

    calls = {name: partial(ran.append, name) for name in "abc"}
    around = {name: partial(Around, name) for name in "abc"}
    times = measure.interleaved(calls, lambda call, repeats: [call() for _ in range(repeats)] and 1.0, BRIEF, around)
    assert "".join(ran) == "abc" + "abc" + "acb" + "cab"
    assert entered[:4] == ["a", "after a", "b", "after b"]
    assert times.rounds == 3
    assert times.ratio("b", to="a") == (1.0, 1.0, 1.0)
    effort = measure.Effort(seconds=4.0, rounds=7)
    assert [effort.enough(n, s) for n, s in ((7, 3.0), (7, 5.0), (6, 19.0), (3, 21.0), (2, 60.0))] == [
        *(False, True, False, True, False)
    ]
    paired = measure.Times({"a": [1.0, 2.0, 4.0], "b": [2.0, 2.0, 12.0]})
    assert paired.ratio("b", to="a") == measure.Spread(2.0, 1.0, 3.0)
    assert paired.added("b", to="a") == 1.0


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    row = records.Row(case="a, b", what="error", of="q", t=3, ratio=1.25, peak_bytes=10**10, why='said "no"')
    stamped = records.stamped([row], records.this_machine(CPU))
    records.write(tmp_path / "new" / "rows.csv", stamped)
    assert records.read(tmp_path / "new" / "rows.csv") == stamped
    assert asdict(stamped[0]).keys() == {f.name for f in fields(records.Row)}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", stamped[0].date)


def test_targets_name_the_worst_case() -> None:
    ours = records.Row(contestant=contestants.OURS, what="forward", t=1024, ratio=1.04, speed_up=4.5, case="good")
    worse = replace(ours, ratio=1.06, speed_up=3.9, case="worse")
    rows = [ours, worse, replace(ours, ratio=9.0, contestant="published"), replace(ours, ratio=1.09, t=512)]

    def found(start: str) -> tuple[Target, float, str]:
        target = next(target for target in TARGETS if target.name.startswith(start))
        value, row = target.worst(rows) or (0.0, ours)
        return target, value, row.case

    target, value, case = found("forward, time over sdpa, t >= 1024")
    assert (value, case, target.holds(value), target.holds(1.04)) == (1.06, "worse", False, True)
    target, value, case = found("forward, speed-up over published, t = 1024")
    assert (value, case, target.holds(value), target.holds(4.5)) == (3.9, "worse", False, True)
    assert next(t for t in TARGETS if t.name.startswith("decode, micro")).worst(rows) is None


def test_the_docs_show_what_was_measured() -> None:
    page = report.PAGE.read_text()
    assert page.count(report.BEGIN) == page.count(report.END) == 1
    assert report.with_results(page, report.rendered()) == page, "run python -m benchmarks.report"


def test_the_docs_say_so_while_no_gpu_was_measured(tmp_path: Path) -> None:
    row = records.Row(device="A Card", date="2000-01-01", bench="shift", what="forward", case="a case")
    records.write(tmp_path / "cpu.csv", [row])
    assert report.rendered(tmp_path).startswith(report.NO_GPU)
    records.write(tmp_path / "cuda-a-card.csv", [row])
    assert report.NO_GPU not in report.rendered(tmp_path)
    assert report.rendered(tmp_path).count("### A Card") == 2
