"""`python -m mimic_core.demo.serve`: two trained stacks, served by vLLM over HTTP in one batch.

It trains a stack for each word task of the demo and starts vLLM's server with both. Then it asks all questions at the
same time: each without a stack, with the one, and with the other. The answers are compared with those of transformers.
"""

from __future__ import annotations

import argparse
import copy
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mimic_core as mc

from .experiment import WORDS, Experiment
from .models import load_model
from .prompts import Prompter
from .tasks import TASKS, DemoError, make_task

NO_STACK, NEWLINE = "no stack", "\n"


def main() -> None:
    """Run the command line. An error ends the program with its message."""
    parser = argparse.ArgumentParser(prog="python -m mimic_core.demo.serve", description=__doc__)
    parser.add_argument("--model", help="hub id or local path of a model (default: that of the demo)")
    parser.add_argument("--epochs", type=int, default=2, help="passes over the 40 training samples (default: 2)")
    parser.add_argument("--questions", type=int, default=6, help="held-out questions of each task (default: 6)")
    options = parser.parse_args()
    try:
        with TemporaryDirectory() as folder:
            run(Path(folder), options)
    except (DemoError, mc.MimicError) as error:
        sys.exit(f"mimic_core.demo.serve: {error}")


def run(folder: Path, options: argparse.Namespace) -> None:
    """Train, serve, ask, compare with transformers and print.

    Raises:
        DemoError: vLLM is not there or does not start, or an answer is another one than transformers'.
    """
    if find_spec("vllm") is None:
        raise DemoError("vLLM is not installed; docs/serve.md has the command that does it")
    model, tokenizer = load_model(options.model)
    save(model, folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write = Prompter(tokenizer, next(model.parameters()).device)
    tasks = {name: make_task(name, 40, 0, options.questions) for name in TASKS}
    experiments = {name: Experiment(model, write, task, WORDS, seed=0) for name, task in tasks.items()}
    stacks = {name: one.train("mimic", options.epochs) for name, one in experiments.items()}
    for name, stack in stacks.items():
        mc.save_shifts(stack, folder / name)

    pairs = [(name, pair) for name, task in tasks.items() for pair in task.held_out]
    asked = [(*one, stack) for one in pairs for stack in (NO_STACK, *stacks)]
    with server(folder, list(stacks)) as url:
        bodies = [request(write(pair).question.ids, stack) for _, pair, stack in asked]
        tokens = at_once(f"{url}/v1/completions", bodies)
    answers = dict(zip(asked, tokens, strict=True))

    print("\nquestion (wanted): answers of vLLM")
    for name, pair in pairs:
        lines = {stack: tokenizer.decode(answers[name, pair, stack]).strip() for stack in (NO_STACK, *stacks)}
        said = [f"{stack} {text.partition(NEWLINE)[0]!r}" for stack, text in lines.items()]
        print(f"  {pair[0]} ({pair[1]}): {', '.join(said)}")
    for stack in (NO_STACK, *stacks):
        with mc.patch(model, stacks[stack]) if stack in stacks else nullcontext():
            for name, pair in pairs:
                wanted, found = experiments[name].answer_tokens(pair), answers[name, pair, stack]
                if wanted != found:
                    where = f"{pair[0]!r} with {stack}"
                    raise DemoError(f"{where}: vLLM answers {found}, transformers {wanted}; please report this bug")
    print(
        f"The {len(asked)} answers, asked for at the same time, have the tokens of the patched model of transformers."
    )


def save(model: Any, path: Path) -> None:
    """Save a model also if its weights came from a GGUF file: transformers calls it quantised then, and refuses."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(path)


def request(ids: Sequence[int], stack: str) -> dict[str, Any]:
    """The body of a request for a greedy answer."""
    fixed = {"model": "model", "temperature": 0, "max_tokens": WORDS.answer_tokens, "return_token_ids": True}
    chosen = {} if stack == NO_STACK else {"vllm_xargs": {"shifts": stack}}
    return {**fixed, **chosen, "prompt": list(ids)}


def at_once(url: str, bodies: Sequence[dict[str, Any]]) -> list[list[int]]:
    """The tokens of all answers, asked at the same time."""

    def ask(body: dict[str, Any]) -> list[int]:
        asked = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked) as answer:
            return json.load(answer)["choices"][0]["token_ids"]

    with ThreadPoolExecutor(len(bodies)) as threads:
        return list(threads.map(ask, bodies))


@contextmanager
def server(folder: Path, stacks: Sequence[str]) -> Iterator[str]:
    """vLLM's server of the model and the stacks in `folder`, for as long as the block runs: its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["env", "VLLM_CPU_KVCACHE_SPACE=1", sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", "model", "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512", "--enforce-eager"]
    command += ["--additional-config", json.dumps({"shifts": {name: name for name in stacks}})]
    print(f"\n{' '.join(command[:-1])} '{command[-1]}'", flush=True)
    log, url = folder / "log", f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
    try:
        while not is_there(f"{url}/health"):
            if process.poll() is not None:
                raise DemoError(f"vLLM's server ended: {log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


def is_there(url: str) -> bool:
    """Whether a server answers."""
    try:
        return urllib.request.urlopen(url).status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


if __name__ == "__main__":
    main()
