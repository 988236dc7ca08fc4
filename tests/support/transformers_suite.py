"""transformers' own tests of model classes, run over the tiny models of `tests/zoo`, patched or not.

The source distribution of transformers has `tests/test_modeling_common.py`: over a hundred tests of any model class. It
does not have the test files of the single models, so the tests get their config and inputs from `tests.zoo.tiny`.
"""

from __future__ import annotations

import copy
import importlib
import random
import subprocess
import sys
import tarfile
import unittest
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import mimic_core as mc
from tests.zoo.tiny import TinyModel, tiny

_PACKAGE = "transformers_source_tests"


class _Empty:
    """Stands in for a class of a module that the source distribution does not have."""


# What test_modeling_common imports from modules that the source distribution lacks.
_LACKING = {
    "exporters.test_export": {"ExportTesterMixin": _Empty},
    "generation.test_utils": {"GenerationTesterMixin": _Empty},
}


def fetch(folder: Path) -> Path:
    """Download the source distribution of the installed transformers, unless the folder has it.

    Also installs `parameterized` into the folder, which transformers' tests import.

    Returns:
        The unpacked source distribution.
    """
    version = transformers.__version__
    source = folder / f"transformers-{version}"
    pip = [sys.executable, "-m", "pip"]
    if not (folder / "site" / "parameterized").is_dir():
        site = ["install", "--quiet", "--no-deps", "--target", str(folder / "site"), "parameterized"]
        subprocess.run([*pip, *site], check=True)
    if not source.is_dir():
        options = ["--quiet", "--no-binary", "transformers", "--no-deps", "--dest", str(folder)]
        subprocess.run([*pip, "download", *options, f"transformers=={version}"], check=True)
        with tarfile.open(folder / f"transformers-{version}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return source


def common(source: Path) -> ModuleType:
    """`tests/test_modeling_common.py` of an unpacked source distribution, as a module of a package of its own."""
    name = f"{_PACKAGE}.test_modeling_common"
    if name not in sys.modules:
        site = source.parent / "site"
        if site.is_dir():
            sys.path.append(str(site))
        _stand_in(_PACKAGE).__path__ = [str(source / "tests")]
        for path, names in _LACKING.items():
            if not (source / "tests" / f"{path.replace('.', '/')}.py").is_file():
                _stand_in(f"{_PACKAGE}.{path.partition('.')[0]}")
                vars(_stand_in(f"{_PACKAGE}.{path}")).update(names)
    return importlib.import_module(name)


def _stand_in(name: str) -> ModuleType:
    module = sys.modules[name] = ModuleType(name)
    return module


class _Tester:
    """What transformers' tests ask for the config, the inputs and the sizes of a model."""

    is_training = True

    def __init__(self, made: TinyModel) -> None:
        self._made = made
        inputs = self._inputs()
        self.batch_size = 2
        self.seq_length = inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1]
        self.encoder_seq_length = self.decoder_seq_length = self.key_length = self.seq_length
        text = made.model.config.get_text_config()
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            setattr(self, name, getattr(text, name, None))

    def _inputs(self) -> dict[str, Tensor]:
        return self._made.inputs(images=self._made.has_images)

    def get_config(self) -> Any:
        """A config in which no attention implementation is chosen yet."""
        config = copy.deepcopy(self._made.model.config)
        for one in (config, *(getattr(config, name, None) for name in config.sub_configs)):
            if one is not None:
                one._attn_implementation_internal = None
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Tensor]]:
        return self.get_config(), self._inputs()

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


# What is put on a model: called with the model at each forward, returns a context for the forward.
Kind = Callable[[nn.Module], AbstractContextManager[Any]]


def _stack(head: str, scale: float) -> Kind:
    """A stack, put on at the model's first forward. Scale 0: one that changes nothing.

    Each model gets the same numbers. So what the tests say of two models with the same weights holds for both patched.
    """

    def put(model: nn.Module) -> AbstractContextManager[Any]:
        if not mc.handles(model):  # a copy of a patched model is patched already
            with torch.random.fork_rng(devices=[]):
                shifts = mc.build_shifts(model, head)
            draw = torch.Generator().manual_seed(0)
            for name, parameter in shifts.named_parameters():
                if scale:
                    parameter.data = scale * torch.randn(parameter.shape, generator=draw)
                elif name.endswith(("vector", ".weight")):
                    parameter.data.zero_()
            mc.patch(model, shifts)
        return nullcontext()

    return put


def _hook(model: nn.Module) -> AbstractContextManager[Any]:
    """A hook that reads, at every site outside attention and one inside it, put on at the first forward."""
    if not mc.handles(model):
        for site in ("query", "mlp_out"):
            mc.hook(model, site, _read)
    return nullcontext()


def _read(value: Tensor, at: mc.At) -> None:
    assert value.shape[0] > 0


def _capture(model: nn.Module) -> AbstractContextManager[Any]:
    """A capture around each forward."""
    return mc.capture(model, ["value", "layer_out"], grad=False)


KINDS: dict[str, Kind] = {
    "MimIC, zero": _stack("mimic", 0.0),
    "MimIC": _stack("mimic", 0.3),
    "LIVE, zero": _stack("live", 0.0),
    "LIVE": _stack("live", 0.3),
    "function vector, zero": _stack("function_vector", 0.0),
    "task vector": _stack("task_vector", 0.3),
    "hook": _hook,
    "capture": _capture,
}
EXACT = ("MimIC, zero", "LIVE, zero", "function vector, zero", "hook", "capture")
"""Those that change no bit. The others change the model's numbers."""


@contextmanager
def at_each_forward(model_class: type[nn.Module], kind: Kind | None) -> Iterator[list[int]]:
    """Inside the `with`, a kind is put on every model of a class at its forwards. Yields the ids of these models."""
    seen: list[int] = []

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plain = type(self) is not model_class or next(self.parameters()).device.type == "meta"
        if not plain:
            seen.append(id(self))
        with nullcontext() if plain or kind is None else kind(self):
            return nn.Module.__call__(self, *args, **kwargs)

    before = model_class.__dict__.get("__call__")
    model_class.__call__ = call
    try:
        yield seen
    finally:
        if before is None:
            del model_class.__call__
        else:
            model_class.__call__ = before


class _Outcome(unittest.TestResult):
    """Of one test: what it raised, or that it was skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.raised: BaseException | None = None
        self.was_skipped = False

    def _keep(self, error: Any) -> None:
        if type(error[1]).__name__ == "Skipped":  # pytest.skip
            self.was_skipped = True
        else:
            self.raised = self.raised or error[1]

    def addSkip(self, test: Any, reason: str) -> None:  # noqa: N802 - unittest's name
        self.was_skipped = True

    def addError(self, test: Any, err: Any) -> None:  # noqa: N802 - unittest's name
        self._keep(err)

    def addFailure(self, test: Any, err: Any) -> None:  # noqa: N802 - unittest's name
        self._keep(err)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:  # noqa: N802 - unittest's name
        if err is not None:
            self._keep(err)


class Suite:
    """transformers' tests of one model type."""

    def __init__(self, model_type: str, source: Path) -> None:
        self.made = tiny(model_type)
        self.model_class = type(self.made.model)
        made = self.made

        class Case(common(source).ModelTesterMixin, unittest.TestCase):
            all_model_classes = (self.model_class,)
            test_torch_exportable = False
            _is_composite = bool(getattr(self.model_class.config_class, "sub_configs", None))

            def setUp(self) -> None:
                self.model_tester = _Tester(made)

        self._case = Case
        self.names = unittest.TestLoader().getTestCaseNames(Case)

    def run(self, name: str, kind: Kind | None) -> tuple[_Outcome, int]:
        """Run one test. Returns its outcome, and how many models the kind was put on."""
        outcome = _Outcome()
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        with ExitStack() as stack:
            seen = stack.enter_context(at_each_forward(self.model_class, kind))
            self._case(name).run(outcome)
        return outcome, len(set(seen))


def refused(error: BaseException | None) -> bool:
    """Whether the library has refused, with an error that says what to do."""
    while error is not None:
        if isinstance(error, mc.MimicError):
            return True
        error = error.__cause__ or error.__context__
    return False
