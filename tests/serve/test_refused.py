"""What was not seen to be exact is refused by name, before an engine starts or when a stack is loaded."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false, reportOptionalSubscript=false

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mimic_core as mc
from tests.support import serving, serving_kernels

vllm = pytest.importorskip("vllm", reason="vLLM has an environment of its own")
from vllm.config import CompilationMode, CUDAGraphMode  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402

import mimic_core.vllm as mv  # noqa: E402
from mimic_core.vllm import limits, models, paged, plugin, requests  # noqa: E402


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """That of an engine that is not started."""
    path = tmp_path_factory.mktemp("refused") / "model"
    serving.model_at(path, "llama")
    return EngineArgs(str(path), dtype="float32", **mv.engine_args()).create_engine_config()


# What of a config says that something is asked for, the value that says so, and the words of the error.
ASKED: list[tuple[str, Any, str]] = [
    ("parallel_config.tensor_parallel_size", 2, "tensor_parallel_size=2: leave it at 1"),
    ("parallel_config.pipeline_parallel_size", 2, "pipeline_parallel_size=2"),
    ("parallel_config.data_parallel_size", 2, "data_parallel_size=2"),
    ("parallel_config.decode_context_parallel_size", 2, "decode_context_parallel_size=2"),
    ("parallel_config._api_process_count", 2, "api_server_count=2"),
    ("parallel_config.enable_dbo", True, "dual batch overlap: leave enable_dbo out"),
    ("compilation_config.mode", CompilationMode.VLLM_COMPILE, "torch.compile: pass enforce_eager=True"),
    ("compilation_config.cudagraph_mode", CUDAGraphMode.FULL, "CUDA graphs: pass enforce_eager=True"),
    (
        "speculative_config",
        SimpleNamespace(method="eagle3"),
        "speculative decoding by 'eagle3': leave speculative_config out",
    ),
    ("kv_transfer_config", object(), "a KV connector"),
    ("model_config.runner_type", "pooling", "pooling"),
    ("cache_config.kv_sharing_fast_prefill", True, "KV sharing fast prefill"),
]


@pytest.mark.parametrize(("path", "value", "message"), ASKED, ids=[path for path, _, _ in ASKED])
def test_an_engine_that_is_asked_for_more(
    config: Any, path: str, value: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits.check(config)
    *owners, name = path.split(".")
    owner = config
    for one in owners:
        owner = getattr(owner, one)
    monkeypatch.setitem(vars(owner), name, value)
    with pytest.raises(mc.BackendUnavailableError, match=message):
        limits.check(config)


def test_another_platform_or_model_runner(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setattr("vllm.platforms.current_platform", platform())
    with pytest.raises(mc.BackendUnavailableError, match=r"another platform than the CPU.*VLLM_USE_V2_MODEL_RUNNER=0"):
        limits.check(config)


def platform(is_cuda: bool = False) -> SimpleNamespace:
    return SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: is_cuda)


def test_cuda_is_asked_for(config: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("vllm.platforms.current_platform", platform(is_cuda=True))
    with pytest.raises(mc.BackendUnavailableError, match=r"CUDA, which was never tried.*put 'shifts_on_untried"):
        limits.check(config)
    monkeypatch.setattr(config, "additional_config", mv.engine_args(on_untried_cuda=True)["additional_config"])
    limits.check(config)
    assert "never tried on a card" in caplog.text


def test_another_version(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"0.32.0": True, "0.32.1+cpu": True, "0.33.0": False, "0.3.2": False, "1.32": False}
    assert {version: plugin.is_supported(version) for version in versions} == versions
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    # As if the plugin had been loaded beside that version: the methods are put back afterwards.
    monkeypatch.setattr(EngineArgs, "create_engine_config", EngineArgs.create_engine_config)
    plugin.register()
    asked = EngineArgs(config.model_config.model, dtype="float32", **mv.engine_args())
    with pytest.raises(mc.BackendUnavailableError, match=r"serves stacks with vllm>=0.32,<0.33; found vllm 0.33.0"):
        asked.create_engine_config()
    EngineArgs(config.model_config.model, dtype="float32", enforce_eager=True).create_engine_config()


def test_a_plugin_that_vllm_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mimic_core.vllm.sources.PUT", set())
    with pytest.raises(mc.PatchStateError, match="if VLLM_PLUGINS is set, name mimic_core in it"):
        mv.engine_args()


def test_a_class_that_was_not_tried(config: Any) -> None:
    found = models.known_to_transformers(config)
    with pytest.raises(mc.UnsupportedModelError, match="not seen to be exact in vLLM's class Linear"):
        models.layers_of(torch.nn.Linear(1, 1), found)


def test_layers_that_run_several_times(config: Any) -> None:
    found = models.known_to_transformers(config)
    first, *others = found.spec.layers
    looped = found._replace(spec=replace(found.spec, layers=(first, replace(first, index=1, run=1), *others)))
    tried = type(models.TRIED[0], (torch.nn.Module,), {})
    with pytest.raises(
        mc.UnsupportedModelError, match="runs several times in a forward, and a stack has heads for each"
    ):
        models.layers_of(tried(), looped)


def test_a_stack_in_an_engine_that_serves_none() -> None:
    assert requests.choice(None, {"strength": 3}) is None, "somebody else's"
    with pytest.raises(VLLMValidationError, match="asks for the stack 'vqa', but the engine serves none"):
        requests.choice(None, {"shifts": "vqa"})
    engine = SimpleNamespace(llm_engine=SimpleNamespace(input_processor=SimpleNamespace(mimic_core_stacks=None)))
    with pytest.raises(mc.PatchStateError, match="was not started to serve stacks"):
        mv.names(engine)


@pytest.mark.parametrize("shifts", [["vqa"], "vqa", {"vqa": 3}])
def test_stacks_that_are_not_named(config: Any, shifts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config.additional_config, "shifts", shifts)
    with pytest.raises((mc.WrongTypeError, mc.CheckpointError), match="vqa|found 3"):
        requests.begin(lambda *_: None, SimpleNamespace(), config)


def attention(**options: Any) -> Any:
    """What `paged.check` looks at of vLLM's attention, in the form it has with a tiny Llama."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

    impl = object.__new__(CPUAttentionBackendImpl)
    of_impl = {"alibi_slopes": None, "sinks": None, "logits_soft_cap": 0}
    vars(impl).update({key: options.pop(key, value) for key, value in of_impl.items()})
    usual = {"impl": impl, "attn_backend": CPUAttentionBackend, "attn_type": "decoder", "kv_cache_dtype": "auto"}
    usual |= {"kv_sharing_target_layer_name": None, "use_mm_prefix": False, "isa": "vec"}
    usual |= {"kv_cache": torch.zeros(1, 2, 32, 64)}
    return type("Attention", (SimpleNamespace,), {})(**{**usual, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, "keys in fp8"),
        ({"alibi_slopes": torch.ones(4)}, "alibi"),
        ({"kv_sharing_target_layer_name": "0"}, "keys shared with another layer"),
        ({"use_mm_prefix": True}, "not causal for images"),
        ({"attn_type": "encoder"}, "attention of the kind 'encoder'"),
        ({"impl": object()}, "the attention backend CPU_ATTN"),
    ],
)
def test_a_gated_head_where_the_lse_is_not_known(options: dict[str, Any], message: str) -> None:
    paged.check(attention(), "here")
    with pytest.raises(mc.BackendUnavailableError, match=rf"here: this head needs the LSE.*{message}"):
        paged.check(attention(**options), "here")


def test_a_gated_head_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    serving_kernels.use_flash(monkeypatch)
    from vllm.v1.attention.backends import flash_attn, triton_attn

    paged.check(attention(impl=flash_attn.FlashAttentionImpl(4, 32, 1.0, 2, None, None, "auto")), "here")
    for name, message in {"alibi_slopes": "alibi", "sinks": "attention sinks", "logits_soft_cap": "a softcap"}.items():
        impl = flash_attn.FlashAttentionImpl(4, 32, 1.0, 2, None, None, "auto")
        setattr(impl, name, torch.ones(()))
        with pytest.raises(mc.BackendUnavailableError, match=f"exactly with {message}"):
            paged.check(attention(impl=impl), "here")
    impl = object.__new__(triton_attn.TritonAttentionImpl)
    with pytest.raises(mc.BackendUnavailableError, match="returns none: pass attention_backend='FLASH_ATTN'"):
        paged.check(attention(impl=impl), "here")


def test_a_gated_head_with_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    serving_kernels.use_flashinfer(monkeypatch)
    from vllm.v1.attention.backends import flashinfer

    impl = object.__new__(flashinfer.FlashInferImpl)
    impl.supports_xqa_or_trtllm_gen_decode = False
    paged.check(attention(impl=impl), "here")
    impl.supports_xqa_or_trtllm_gen_decode = True
    with pytest.raises(mc.BackendUnavailableError, match="TensorRT-LLM return none: pass attention_config="):
        paged.check(attention(impl=impl), "here")


def test_keys_that_are_stored_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the instruction set of another processor."""
    monkeypatch.setattr(paged, "keys_of", lambda cache: cache.view(2, 2, 64, 32)[:, :, :32].transpose(2, 3))
    with pytest.raises(mc.BackendUnavailableError, match="keys as the instruction set 'vec' stores them"):
        paged.check(attention(), "here")
