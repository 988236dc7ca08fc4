"""vLLM's server with stacks, asked over HTTP."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false, reportOptionalSubscript=false

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import PreTrainedModel

import mimic_core as mc
from tests.support import serving
from tests.support.pages import split
from tests.support.serving import Answer, Ask

pytest.importorskip("vllm", reason="vLLM has an environment of its own")

LENGTH = 12
PYTHON = Path(sys.executable).parent
PAGE = Path(__file__).parents[2] / "docs" / "serve.md"
# The page's commands: install, start the server, ask it.
_, START, REQUEST = (block.text for block in split(PAGE.read_text())[0] if block.language == "sh")


class Server(NamedTuple):
    url: str
    model: PreTrainedModel
    stacks: dict[str, mc.ShiftStack]
    folder: Path

    def call(self, path: str, body: Any = None, method: str | None = None) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def complete(self, prompt: list[int], **more: Any) -> tuple[int, Any]:
        fixed = {"temperature": 0, "max_tokens": LENGTH, "ignore_eos": True, "logprobs": 0}
        fixed |= {"model": "my/model", "prompt": prompt, "return_tokens_as_token_ids": True}
        return self.call("/v1/completions", {**fixed, **more})

    def ask(self, ask: Ask) -> Answer:
        extra = {} if ask.stack is None else {"vllm_xargs": {"shifts": ask.stack, "strength": ask.strength}}
        status, body = self.complete(ask.prompt, **extra)
        assert status == 200, body
        found = body["choices"][0]["logprobs"]
        return Answer([int(token.partition(":")[2]) for token in found["tokens"]], found["token_logprobs"])

    def check(self, ask: Ask) -> None:
        serving.assert_same(self.ask(ask), serving.wanted(self.model, self.stacks, ask, LENGTH), ask)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """It is started by the page's own command."""
    folder = tmp_path_factory.mktemp("served")
    model = serving.model_at(folder / "my" / "model", "llama")
    heads = {"vqa": "mimic", "caption": "live", "numbers": "out"}
    stacks = {
        name: serving.stack_at(folder / f"{name}-shifts", model, head, seed)
        for seed, (name, head) in enumerate(heads.items())
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    more = f"--host 127.0.0.1 --port {port} --dtype float32 --max-model-len 256 --block-size 32"
    told = {"VLLM_PLUGINS": "mimic_core", "VLLM_CPU_KVCACHE_SPACE": "1", "PATH": f"{PYTHON}:{os.environ['PATH']}"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {START.strip()} {more}"],
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **told},
        )
    made = Server(f"http://127.0.0.1:{port}", model, stacks, folder)
    try:
        for _ in range(900):
            assert process.poll() is None, (folder / "log").read_text()[-4000:]
            try:
                if made.call("/v1/models")[0] == 200:
                    break
            except OSError:
                time.sleep(0.2)
        yield made
    finally:
        process.terminate()
        process.wait(60)


def test_requests_of_different_stacks_at_the_same_time(server: Server) -> None:
    start = list(range(10, 80))
    asks = [Ask([*start, 80 + i % 3], name) for i, name in enumerate([None, "vqa", "caption"] * 4)]
    asks += [Ask([*start, 90], "vqa", 0.5), Ask([*start, 90], "caption", -1.0), Ask([*start, 90], "vqa", 0.0)]
    with ThreadPoolExecutor(len(asks)) as threads:
        answers = list(threads.map(server.ask, asks))
    for ask, answer in zip(asks, answers, strict=True):
        serving.assert_same(answer, serving.wanted(server.model, server.stacks, ask, LENGTH), ask)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"vllm_xargs": {"shifts": "none"}}, "no stack is called 'none'; this engine serves 'vqa', 'caption'"),
        ({"vllm_xargs": {"shifts": "vqa", "strength": "much"}}, "a strength is a finite number; found 'much'"),
        ({"vllm_xargs": {"strength": 0.5}}, "a strength is given without a stack"),
        ({"vllm_xargs": {"shifts": "vqa"}, "use_beam_search": True, "n": 2}, "beams can't have a stack"),
    ],
)
def test_a_wrong_request_gets_status_400(server: Server, more: dict[str, Any], message: str) -> None:
    status, body = server.complete([5, 6, 7], **more)
    assert (status, message in body["error"]["message"]) == (400, True), body
    server.check(Ask([5, 6, 7], "vqa"))


def test_the_operator_adds_lists_and_removes_stacks(server: Server) -> None:
    ask = Ask([8, 9, 10, 11], "numbers")
    assert server.call("/v1/shifts") == (200, {"shifts": ["vqa", "caption"]})
    assert server.complete(ask.prompt, vllm_xargs={"shifts": "numbers"})[0] == 400
    assert server.call("/v1/shifts", {"name": "numbers", "source": str(server.folder / "numbers-shifts")})[0] == 200
    server.check(ask)
    assert server.call("/v1/shifts/numbers", method="DELETE") == (200, {"shifts": ["vqa", "caption"]})
    assert server.complete(ask.prompt, vllm_xargs={"shifts": "numbers"})[0] == 400
    for body, message in [
        ({"name": "x", "source": str(server.folder / "my" / "model")}, "shifts.safetensors of the stack"),
        ({"name": "", "source": "somewhere"}, "the name of a stack is a string"),
        ({"name": "x"}, "KeyError: 'source'"),
    ]:
        status, answer = server.call("/v1/shifts", body)
        assert (status, message in answer["error"]["message"]) == (400, True), answer
    server.check(Ask([8, 9, 10, 11], "caption"))


def test_the_request_of_the_page(server: Server) -> None:
    command = REQUEST.replace("http://localhost:8000", server.url)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    words = json.loads(done.stdout)["choices"][0]["text"].split()
    wanted = serving.wanted(server.model, server.stacks, Ask([5, 6, 7], "vqa"), 16).tokens
    assert words == [f"w{token}" for token in wanted if token > 2], "without the special tokens"
