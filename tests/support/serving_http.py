"""vLLM's server with stacks, started by the command of docs/serve.md and asked over HTTP, also by many at a time."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from itertools import count, cycle
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from transformers import PreTrainedModel

import mimic_core as mc

from . import serving
from .pages import split
from .serving import Answer, Ask

LENGTH = 12
PYTHON = Path(sys.executable).parent
PAGE = Path(__file__).parents[2] / "docs" / "serve.md"
# The page's commands: install, start the server, ask it, the demonstration.
_, START, REQUEST, _ = (block.text for block in split(PAGE.read_text())[0] if block.language == "sh")
# Keys for half of the requests that may run at a time: under load some are preempted.
OPTIONS = "--dtype float32 --max-model-len 256 --block-size 32 --max-num-seqs 64 --num-gpu-blocks-override 128"
# What is asked for in each request.
_FIXED = {"temperature": 0, "max_tokens": LENGTH, "ignore_eos": True, "logprobs": 0}
_FIXED |= {"model": "my/model", "return_tokens_as_token_ids": True}


class Server:
    """A server of `my/model` in a folder, with the stacks of the page's command."""

    def __init__(self, folder: Path, model: PreTrainedModel, stacks: dict[str, mc.ShiftStack]) -> None:
        self.folder = folder
        self.model = model
        self.stacks = stacks
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        told = {"VLLM_PLUGINS": "mimic_core", "VLLM_CPU_KVCACHE_SPACE": "1", "PATH": f"{PYTHON}:{os.environ['PATH']}"}
        with (self.folder / "log").open("w") as log:
            self._process = process = subprocess.Popen(
                ["bash", "-c", f"exec {START.strip()} --host 127.0.0.1 --port {self._port} {OPTIONS}"],
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **told},
                start_new_session=True,
            )
        for _ in range(900):
            assert process.poll() is None, (self.folder / "log").read_text()[-4000:]
            try:
                if self.call("/v1/models")[0] == 200:
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"the server does not answer: {(self.folder / 'log').read_text()[-4000:]}")

    def kill(self) -> None:
        """End all of its processes at once, without a word to them."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(60)
            self._process = None

    def stop(self) -> None:
        """Ask it to end, and wait until it has."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(60)
            self._process = None

    def call(self, path: str, body: Any = None, method: str | None = None) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def stream(self, ask: Ask) -> list[int]:
        """The tokens of an answer that comes in parts."""
        body = {**_FIXED, "prompt": ask.prompt, "stream": True, "vllm_xargs": {"shifts": ask.stack}}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            parts = [line.decode().removeprefix("data: ").strip() for line in answer]
        found = [json.loads(part)["choices"][0]["logprobs"]["tokens"] for part in parts if part.startswith("{")]
        assert len(found) > 1
        return [int(token.partition(":")[2]) for tokens in found for token in tokens]

    def complete(self, prompt: list[int], **more: Any) -> tuple[int, Any]:
        """Status and JSON of the answer to a prompt."""
        return self.call("/v1/completions", {**_FIXED, "prompt": prompt, **more})

    def ask(self, ask: Ask) -> Answer:
        """The answer to an ask."""
        extra = {} if ask.stack is None else {"vllm_xargs": {"shifts": ask.stack, "strength": ask.strength}}
        status, body = self.complete(ask.prompt, **extra)
        assert status == 200, body
        found = body["choices"][0]["logprobs"]
        return Answer([int(token.partition(":")[2]) for token in found["tokens"]], found["token_logprobs"])

    def add(self, name: str) -> None:
        """Let the running server load a stack."""
        status, body = self.call("/v1/shifts", {"name": name, "source": str(self.folder / f"{name}-shifts")})
        assert status == 200, body

    def wanted(self, ask: Ask) -> Answer:
        """What transformers' model answers."""
        return serving.wanted(self.model, self.stacks, ask, LENGTH)


class Load(NamedTuple):
    """What came of many requests.

    Attributes:
        counts: Of right answers, by stack; "refused" for those with status 400, "lost" for those that a kill cut off.
        wrong: What was not as it should be.
    """

    counts: Counter[str]
    wrong: list[str]


def load(
    server: Server,
    asks: Sequence[tuple[Ask, Answer]],
    clients: int,
    seconds: float,
    then: Callable[[], None] = lambda: None,
) -> Load:
    """So many clients ask a server again and again for so long.

    Args:
        asks: What they ask, with the right answers. One in sixteen questions is for a stack that is not there.
        then: Called at the end, while the last questions are not answered yet.
    """
    over = Event()
    found = Load(Counter(), [])

    def client(number: int) -> None:
        for turn in count(number):
            if over.is_set():
                return
            ask, wanted = asks[(6 * number + turn) % len(asks)]  # neighbours ask for other stacks
            try:
                if turn % 16 == 0:
                    status, body = server.complete(ask.prompt, vllm_xargs={"shifts": "unknown"})
                    assert (status, "no stack is called 'unknown'" in str(body)) == (400, True), (status, body)
                    found.counts["refused"] += 1
                else:
                    serving.assert_same(server.ask(ask), wanted, ask)
                    found.counts[ask.stack or "none"] += 1
            except AssertionError as error:
                found.wrong.append(str(error))
            except (OSError, HTTPException) as error:
                found.counts["lost"] += 1
                if not over.is_set():
                    found.wrong.append(f"{ask}: {error!r}")

    with ThreadPoolExecutor(clients) as threads:
        running = [threads.submit(client, number) for number in range(clients)]
        time.sleep(seconds)
        over.set()
        then()
    for one in running:
        one.result()
    return found


def asks_for(server: Server, prompts: Sequence[list[int]]) -> list[tuple[Ask, Answer]]:
    """Each prompt for each stack and for none, with the right answers; strengths differ."""
    strengths = cycle([1.0, 0.5, -1.0, 1.0, 2.0])
    asks = [
        Ask(prompt, name, 1.0 if name is None else next(strengths))
        for prompt in prompts
        for name in [None, *server.stacks]
    ]
    return [(ask, server.wanted(ask)) for ask in asks]
