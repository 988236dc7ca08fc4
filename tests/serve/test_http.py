"""vLLM's server with stacks, asked over HTTP."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false, reportOptionalSubscript=false

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support import serving
from tests.support.serving import Ask
from tests.support.serving_http import REQUEST, Server, asks_for, load

pytest.importorskip("vllm", reason="vLLM has an environment of its own")

# The first two are in the page's command.
STACKS = {"vqa": "mimic", "caption": "live", "numbers": "out", "a": "other", "b": "shared", "c": "vector"}
STACKS |= {"d": "both", "e": "layer"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """It is started by the page's own command."""
    folder = tmp_path_factory.mktemp("served")
    model = serving.model_at(folder / "my" / "model", "llama")
    stacks = {
        name: serving.stack_at(folder / f"{name}-shifts", model, head, seed)
        for seed, (name, head) in enumerate(STACKS.items())
    }
    made = Server(folder, model, stacks)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def check(server: Server, ask: Ask) -> None:
    serving.assert_same(server.ask(ask), server.wanted(ask), ask)


def test_requests_of_different_stacks_at_the_same_time(server: Server) -> None:
    start = list(range(10, 80))
    asks = [Ask([*start, 80 + i % 3], name) for i, name in enumerate([None, "vqa", "caption"] * 4)]
    asks += [Ask([*start, 90], "vqa", 0.5), Ask([*start, 90], "caption", -1.0), Ask([*start, 90], "vqa", 0.0)]
    with ThreadPoolExecutor(len(asks)) as threads:
        answers = list(threads.map(server.ask, asks))
    for ask, answer in zip(asks, answers, strict=True):
        serving.assert_same(answer, server.wanted(ask), ask)


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
    check(server, Ask([5, 6, 7], "vqa"))


def test_an_answer_in_parts(server: Server) -> None:
    ask = Ask([6, 7, 8], "vqa")
    assert server.stream(ask) == server.wanted(ask).tokens


def test_the_operator_adds_lists_and_removes_stacks(server: Server) -> None:
    ask = Ask([8, 9, 10, 11], "numbers")
    assert server.call("/v1/shifts") == (200, {"shifts": ["vqa", "caption"]})
    assert server.complete(ask.prompt, vllm_xargs={"shifts": "numbers"})[0] == 400
    server.add("numbers")
    check(server, ask)
    assert server.call("/v1/shifts/numbers", method="DELETE") == (200, {"shifts": ["vqa", "caption"]})
    assert server.complete(ask.prompt, vllm_xargs={"shifts": "numbers"})[0] == 400
    for body, message in [
        ({"name": "x", "source": str(server.folder / "my" / "model")}, "shifts.safetensors of the stack"),
        ({"name": "", "source": "somewhere"}, "the name of a stack is a string"),
        ({"name": "x"}, "KeyError: 'source'"),
    ]:
        status, answer = server.call("/v1/shifts", body)
        assert (status, message in answer["error"]["message"]) == (400, True), answer
    check(server, Ask([8, 9, 10, 11], "caption"))


def test_the_request_of_the_page(server: Server) -> None:
    command = REQUEST.replace("http://localhost:8000", server.url)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    words = json.loads(done.stdout)["choices"][0]["text"].split()
    wanted = serving.wanted(server.model, server.stacks, Ask([5, 6, 7], "vqa"), 16).tokens
    assert words == [f"w{token}" for token in wanted if token > 2], "without the special tokens"


@pytest.mark.parametrize(("seconds", "prompts"), [(4, 2), pytest.param(150, 20, marks=pytest.mark.exhaustive)])
def test_two_hundred_at_a_time_and_a_kill_between(server: Server, seconds: int, prompts: int) -> None:
    """Requests of eight stacks and of none get the answers of their stack alone, before the kill and after it."""
    start = list(range(10, 80))
    asks = asks_for(server, [[*start, 80 + i] for i in range(prompts)] + [[3 + i, 40 + i, 9] for i in range(prompts)])
    for name in list(STACKS)[2:]:
        server.add(name)
    before = load(server, asks, 200, seconds, then=server.kill)
    server.start()
    assert server.call("/v1/shifts") == (200, {"shifts": ["vqa", "caption"]})
    for name in list(STACKS)[2:]:
        server.add(name)
    after = load(server, asks, 200, seconds)
    for name in list(STACKS)[2:]:
        server.call(f"/v1/shifts/{name}", method="DELETE")
    for found in (before, after):
        print(f"{found.counts.total()} requests of 200 clients in {seconds} s: {dict(found.counts)}")
        assert found.wrong == []
        assert all(found.counts[name] for name in ["none", "refused", *STACKS])
    assert before.counts["lost"]
    assert not after.counts["lost"]
