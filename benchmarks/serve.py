"""`python -m benchmarks.serve`: what a stack costs a request that vLLM serves, beside vLLM's own LoRA.

Run it in an environment with vLLM. It writes a CSV file; `python -m benchmarks.report` then writes its table, in an
environment with `.[bench]`.
"""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import mimic_core as mc

from . import records
from .errors import BenchmarkError
from .measure import Effort, Times, interleaved
from .serve_engine import Engine, Names, prompts
from .serve_rows import DECODE, FIRST, HEADS, NO_PLUGIN, RANKS, STACKS, UNPATCHED, ServedRow, lora, missed

# Requests and the tokens of their prompts. With 32 prompts of 512, a round would take minutes on two cores.
DECODES = ((1, 512), (8, 512), (32, 128))
FIRSTS = ((1, 512), (8, 64), (32, 16))
STEPS = 8
# SmolLM2-135M with a third of its layers and of its vocabulary, so that each keeps its share of the time.
SIZES: dict[str, Any] = {
    "vocab_size": 16384,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 10,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
MODEL = "smollm2-135m-10layers-random"
_TARGETS = ("q_proj", "v_proj")  # those that PEFT takes for a Llama if it is not told which


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds, to try the command")
    parser.add_argument("--requests", type=int, nargs="+", help="only these numbers of requests; the file keeps others")
    parser.add_argument("--out", type=Path, help="folder for the CSV file (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    folder = options.out or records.RESULTS
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = folder / f"{'part-' if options.quick else ''}serve-{records.file_name(device)}"
    machine = asdict(records.this_machine(device))
    rows: list[ServedRow] = []
    if options.requests and path.exists():
        rows = [row for row in records.read(path, ServedRow) if row.requests not in options.requests]
    try:
        for row in run(options.quick, options.requests):
            rows.append(ServedRow(**{**asdict(row), **machine, "threads": row.threads}))
            records.write(path, sorted(rows, key=_order), ServedRow)  # a run that is stopped keeps its rows
    except (BenchmarkError, mc.MimicError) as error:
        sys.exit(f"benchmarks.serve: {error}")
    for row in sorted(rows, key=_order):
        spread = f"{row.ratio:.3f} [{row.ratio_p20:.3f}, {row.ratio_p80:.3f}]"
        where = f"{row.what}, {row.requests} x {row.context}, {row.contestant}, {row.stacks}"
        print(f"{where}: {row.time_us / 1000:.2f} ms, {spread}")
    print("\n".join(["", *(f"missed: {one}" for one in missed(rows)), f"{len(rows)} rows are in {path}"]))


def _order(row: ServedRow) -> tuple[Any, ...]:
    names = [UNPATCHED, NO_PLUGIN, *HEADS, *(lora(rank) for rank in RANKS)]
    return row.what != DECODE, row.requests, names.index(row.contestant), row.stacks


def run(quick: bool, requests: Sequence[int] | None) -> Iterator[ServedRow]:
    """Measure everything: the engine with the plugin beside each of the others."""
    with TemporaryDirectory() as folder:
        work = Path(folder)
        wanted = prepare(work, quick)
        shifts = {f"{head}{i}": work / f"{head}{i}" for head in HEADS.values() for i in range(STACKS)}
        with engine(work, "plugin", shifts) as ours:
            check(ours, wanted)
            others = {NO_PLUGIN: 0} | {lora(rank): rank for rank in RANKS}
            for other, rank in others.items():
                adapters = {f"lora{i}": work / f"lora{rank}-{i}" for i in range(STACKS if rank else 0)}
                with engine(work, other, None, adapters, rank) as theirs:
                    if rank and theirs.ask("answers", ["lora0"], 64, 8) == theirs.ask("answers", [None], 64, 8):
                        raise BenchmarkError(f"{other}: the adapter does not change the answer, so it may not be used")
                    yield from measured(ours, theirs, other, quick, requests)


def prepare(work: Path, quick: bool) -> dict[str | None, list[int]]:
    """Write model, stacks and adapters. Return what transformers' model answers, with each stack and without."""
    torch.manual_seed(0)
    sizes = {**SIZES, **({"num_hidden_layers": 2} if quick else {})}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval().requires_grad_(False)
    model.save_pretrained(work / "model")
    wanted: dict[str | None, list[int]] = {None: _answer(model, 0)}
    for head in HEADS.values():
        for i in range(STACKS):
            stack = mc.build_shifts(model, head)
            for name, p in stack.named_parameters():
                p.data = torch.randn(p.shape) * (2.0 if name.endswith("vector") else 0.3)
            mc.save_shifts(stack, work / f"{head}{i}")
            with mc.patch(model, stack):
                wanted[f"{head}{i}"] = _answer(model, i)
    for rank in RANKS:
        for i in range(STACKS):
            _adapter(work / f"lora{rank}-{i}", model, rank)
    return wanted


def _answer(model: Any, row: int) -> list[int]:
    ids = torch.tensor(prompts(STACKS, 64, 0)[row : row + 1])
    how: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, 64:].tolist()


def _adapter(folder: Path, model: Any, rank: int) -> None:
    """A LoRA adapter of random numbers in the format of PEFT."""
    folder.mkdir()
    weights = {}
    for name, module in model.named_modules():
        if name.endswith(_TARGETS):
            out, into = module.weight.shape
            weights[f"base_model.model.{name}.lora_A.weight"] = 0.1 * torch.randn(rank, into)
            weights[f"base_model.model.{name}.lora_B.weight"] = 0.1 * torch.randn(out, rank)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(_TARGETS), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@contextmanager
def engine(
    work: Path, name: str, shifts: Mapping[str, Path] | None, adapters: Mapping[str, Path] | None = None, rank: int = 0
) -> Iterator[Engine]:
    """An engine, for as long as the block runs."""
    print(f"benchmarks.serve: starting vLLM, {name}", file=sys.stderr)
    made = Engine(work / "model", work / "log", shifts, adapters or {}, rank)
    try:
        yield made
    finally:
        made.stop()


def check(ours: Engine, wanted: Mapping[str | None, list[int]]) -> None:
    """Compare with transformers before anything is timed: stacks in one batch, each with a prompt of its own."""
    for head in HEADS.values():
        names = [f"{head}{i}" for i in range(STACKS)]
        found = ours.ask("answers", names, 64, 8)
        wrong = [name for name, tokens in zip(names, found, strict=True) if tokens != wanted[name]]
        if wrong or wanted[names[0]] == wanted[None]:
            raise BenchmarkError(f"the tokens of {', '.join(wrong) or 'no stack'} differ from those of transformers")


def names_of(head: str, stacks: int, requests: int) -> Names:
    """The stack or adapter of each request."""
    return [f"{head}{i % stacks}" if stacks else None for i in range(requests)]


def measured(
    ours: Engine, theirs: Engine, other: str, quick: bool, requests: Sequence[int] | None
) -> Iterator[ServedRow]:
    """Both engines' contestants in turns. Those with stacks are measured once, beside the plain engine."""
    from vllm import __version__

    plans = [(DECODE, n, context) for n, context in DECODES] + [(FIRST, n, context) for n, context in FIRSTS]
    for what, n, context in tqdm(plans[1::3] if quick else plans, desc=other, file=sys.stderr):
        if requests is not None and n not in requests:
            continue
        counts = (1, STACKS) if n > 1 else (1,)
        asked: dict[tuple[str, int], tuple[Engine, Names]] = {(UNPATCHED, 0): (ours, names_of("", 0, n))}
        if other == NO_PLUGIN:
            asked[NO_PLUGIN, 0] = (theirs, names_of("", 0, n))
            asked |= {(k, c): (ours, names_of(head, c, n)) for k, head in HEADS.items() for c in counts}
        else:
            asked |= {(other, c): (theirs, names_of("lora", c, n)) for c in counts}
        times = timed(what, asked, context, quick)
        for key in asked:
            if key == (UNPATCHED, 0) and other != NO_PLUGIN:
                continue
            seconds, ratio = times.median(str(key)), times.ratio(str(key), str((UNPATCHED, 0)))
            row: dict[str, Any] = {"vllm": __version__, "model": MODEL, "dtype": "fp32", "what": what}
            row |= {"requests": n, "context": context, "contestant": key[0], "stacks": key[1]}
            row |= {"time_us": seconds * 1e6, "tokens_s": n / seconds if what == DECODE else None}
            row |= dict(zip(("ratio", "ratio_p20", "ratio_p80"), ratio, strict=True))
            yield ServedRow(**row, rounds=times.rounds, threads=ours.threads)


def timed(what: str, asked: Mapping[tuple[str, int], tuple[Engine, Names]], context: int, quick: bool) -> Times:
    """The contestants of one measurement."""
    extra = (STEPS,) if what == DECODE else ()
    method = "decode" if what == DECODE else "first"
    calls = {str(key): partial(of.ask, method, names, context, *extra) for key, (of, names) in asked.items()}
    rounds = 2 if quick else 9 if what == DECODE else 3
    # The engine has measured: what the call returns are the seconds.
    return interleaved(calls, lambda call, _: float(call()), Effort(seconds=0, rounds=rounds, limit=60.0))  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
