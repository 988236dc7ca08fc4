"""An engine of vLLM in a process of its own, which measures what it is asked to."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from .errors import BenchmarkError

Names = Sequence["str | None"]
# The largest token of a prompt.
VOCABULARY = 16000


class Engine:
    """The parent's side: one call at a time, for engines that take turns.

    Args:
        shifts: The folders of the stacks that the engine serves. None: it does not use the plugin.
        adapters: The folders of LoRA adapters, all of this rank.
    """

    def __init__(
        self, model: Path, log: Path, shifts: Mapping[str, Path] | None, adapters: Mapping[str, Path], rank: int
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._log = log
        self._process = context.Process(target=_run, args=(theirs, model, log, shifts, adapters, rank))
        self._process.start()
        theirs.close()
        self.threads: int = self._received()

    def ask(self, method: str, *args: Any) -> Any:
        """The result of a method of `_Engine`."""
        self._pipe.send((method, args))
        return self._received()

    def _received(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError as error:
            raise BenchmarkError(f"an engine of vLLM ended: {self._log.read_text()[-3000:]}") from error

    def stop(self) -> None:
        """End the process."""
        if self._process.is_alive():
            self._pipe.send(None)
        self._process.join(60)


def prompts(count: int, context: int, seed: int) -> list[list[int]]:
    """Prompts of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, context), generator=generator).tolist()


def _run(
    pipe: Connection,
    model: Path,
    log: Path,
    shifts: Mapping[str, Path] | None,
    adapters: Mapping[str, Path],
    rank: int,
) -> None:
    file = log.open("w")
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file.fileno(), stream.fileno())
    if not torch.cuda.is_available():
        # One thread, whose own time is taken: two wait for each other whenever the machine has other work for a core.
        # Here OMP_NUM_THREADS comes too late, and vLLM must not choose.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        torch.set_num_threads(1)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    engine = _Engine(model, shifts, adapters, rank)
    pipe.send(torch.get_num_threads())
    while (asked := pipe.recv()) is not None:
        method, args = asked
        pipe.send(getattr(engine, method)(*args))
    engine.end()


# On a CPU what else the machine does is not counted.
_clock = time.perf_counter if torch.cuda.is_available() else time.process_time


class _Engine:
    def __init__(self, model: Path, shifts: Mapping[str, Path] | None, adapters: Mapping[str, Path], rank: int) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        import mimic_core.vllm

        options: dict[str, Any] = {"skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True}
        options |= {"max_model_len": 1024, "block_size": 32}
        if shifts is not None:
            options |= mimic_core.vllm.engine_args(shifts)
        if adapters:
            options |= {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": rank}
        llm = LLM(str(model), **options)
        self._engine = llm.llm_engine
        self._loras = {name: LoRARequest(name, i + 1, str(path)) for i, (name, path) in enumerate(adapters.items())}
        self._ids = itertools.count()

    def _start(self, names: Names, rows: list[list[int]], length: int) -> list[str]:
        from vllm import SamplingParams

        ids = []
        for name, row in zip(names, rows, strict=True):
            adapter = self._loras.get(name) if name else None
            extra = {"shifts": name} if name and adapter is None else None
            fixed: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "detokenize": False}
            params = SamplingParams(**fixed, max_tokens=length, extra_args=extra)
            ids.append(str(next(self._ids)))
            self._engine.add_request(ids[-1], {"prompt_token_ids": row}, params, lora_request=adapter)
        return ids

    def _stop(self, ids: list[str]) -> None:
        self._engine.abort_request(ids)
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def decode(self, names: Names, context: int, steps: int) -> float:
        """Seconds of a step in which each request gets a token. After the first call, prompts are cached."""
        ids = self._start(names, prompts(len(names), context, 0), 256)
        waiting = set(ids)
        while waiting:
            waiting -= {one.request_id for one in self._engine.step()}
        began = _clock()
        for _ in range(steps):
            self._engine.step()
        seconds = (_clock() - began) / steps
        self._stop(ids)
        return seconds

    def first(self, names: Names, context: int) -> float:
        """Mean seconds to the first token of requests that come at the same time, with prompts not seen before."""
        self._engine.reset_prefix_cache()
        began = _clock()
        ids = self._start(names, prompts(len(names), context, 1), 2)
        times: dict[str, float] = {}
        while len(times) < len(ids):
            for one in self._engine.step():
                times.setdefault(one.request_id, _clock() - began)
        self._stop(ids)
        return sum(times.values()) / len(times)

    def answers(self, names: Names, context: int, length: int) -> list[list[int]]:
        """Greedy tokens."""
        ids = self._start(names, prompts(len(names), context, 0), length)
        found = {}
        while self._engine.has_unfinished_requests():
            found |= {one.request_id: list(one.outputs[0].token_ids) for one in self._engine.step()}
        return [found[one] for one in ids]

    def end(self) -> None:
        """Let go of the engine."""
        self._engine.engine_core.shutdown()
