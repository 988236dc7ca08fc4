"""What docs/serve.md says of each feature of an engine, and the tests that show it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

COMMAND = "python -m tests.serve"
PAGE = Path(__file__).parents[2] / "docs" / "serve.md"
BEGIN, END = "<!-- features -->", "<!-- end of features -->"


class Feature(NamedTuple):
    """A row of the table.

    Attributes:
        tests: Names in tests/serve, of one test each, or of all cases of a test.
    """

    name: str
    verdict: str
    tests: tuple[str, ...] = ()


_SERVED, _BESIDE, _REFUSED = "test_served.py::test_", "test_beside.py::test_", "test_refused.py::test_"
_MODELS = f"{_SERVED}models"
_MIXED = f"{_SERVED}a_batch_mixes_stacks_strengths_and_none"
_CUT = f"{_SERVED}requests_are_cut_preempted_and_share_blocks"
_ASKED = f"{_REFUSED}an_engine_that_is_asked_for_more"
_GATED = f"{_REFUSED}a_gated_head_where_the_lse_is_not_known"
_IMAGES = "test_images.py::test_images_and_stacks_in_one_batch"
_CUDA = ("test_cuda.py", f"{_REFUSED}cuda_is_asked_for")


def _asked(*names: str) -> tuple[str, ...]:
    return tuple(f"{_ASKED}[{name}]" for name in names)


FEATURES = (
    Feature(
        "LIVE at `mlp_out`, `layer_out` and `attn_out`; MimIC, `shared`, `gate=False`, `mlp_vector`", "exact", (_MIXED,)
    ),
    Feature("any strength; stacks and none mixed in one batch", "exact", (_MIXED, f"{_SERVED}steps_of_the_same_size")),
    Feature("virtual keys, Hyper-ICL, ICV, CAA, I2CL, M2IV and plain vectors", "exact", (f"{_SERVED}every_head",)),
    Feature(
        "task and function vectors, MTV, LoReFT, IA3; any head but IA3 at some positions alone (`positions`)",
        "exact",
        (f"{_SERVED}every_head", _MIXED, f"{_SERVED}a_prompt_ends_where_it_ended"),
    ),
    Feature(
        "stacks of several heads; two that compose the same heads in different orders are refused",
        "exact",
        (f"{_SERVED}every_head", f"{_SERVED}a_stack_that_can_not_be_served"),
    ),
    Feature(
        "heads of your own with `takes_samples` and without `needs_at`; others are refused",
        "exact",
        (f"{_SERVED}a_head_of_ones_own",),
    ),
    Feature(
        '`log_z2="all_keys"`, edits of keys and values by heads of your own',
        "refused",
        (f"{_SERVED}a_stack_that_can_not_be_served",),
    ),
    Feature("Llama, Mistral, Granite, Phi-3, Qwen2, Qwen3, Gemma 3 (text), GPT-2, OPT", "exact", (_MODELS,)),
    Feature("mixtures of experts: Mixtral, Qwen3-MoE", "exact", (f"{_MODELS}[mixtral]", f"{_MODELS}[qwen3_moe]")),
    Feature(
        "softcaps of the logits (Gemma 2) and sinks (GPT-OSS)", "exact", (f"{_MODELS}[gemma2]", f"{_MODELS}[gpt_oss]")
    ),
    Feature(
        '`model_impl="transformers"`: decoders of text (tried: Gemma 2 and 3, Granite, Llama, Mistral, OPT, '
        "Phi-3, Qwen2, Qwen3)",
        "exact",
        (f"{_BESIDE}models_of_transformers",),
    ),
    Feature(
        "other classes of vLLM, and other mixtures of experts", "refused", (f"{_REFUSED}a_class_that_was_not_tried",)
    ),
    Feature(
        "images: Llava, LLaVA-NeXT and LLaVA-OneVision with SigLIP and Qwen2, Idefics3 and SmolVLM with Llama, "
        "Qwen2.5-VL, Qwen3-VL; prompts with two images, one and none",
        "exact",
        (_IMAGES,),
    ),
    Feature("the same with other parts; video", "not tried"),
    Feature(
        "Gemma 3 with images: in an image, vLLM's attention on a CPU is causal and that of transformers is not, so "
        "answers differ without a stack too",
        "refused",
        (f"{_REFUSED}a_class_that_was_not_tried",),
    ),
    Feature("fp32", "exact", (_MIXED,)),
    Feature(
        "bf16, fp16, weights of 4 bits (GPTQ)",
        "LSE and shift are compared with fp64 at each call",
        (f"{_SERVED}half_precision_shifts",),
    ),
    Feature(
        "bf16, whole answers",
        "as near to transformers in fp32 as without a stack",
        (f"{_BESIDE}half_precision_is_as_near",),
    ),
    Feature("weights quantised in another way", "not tried"),
    Feature(
        "bf16 with gated heads on processors with AMX: keys are stored in another way",
        "refused",
        (f"{_REFUSED}keys_that_are_stored_in_another_way",),
    ),
    Feature("chunked prefill, preemption, sliding windows", "exact", (_CUT, f"{_MODELS}[mistral]")),
    Feature("prefix caching", "exact", (f"{_SERVED}blocks_", f"{_SERVED}no_salt_of_a_client")),
    Feature("`n` > 1, log probabilities of the prompt", "exact", (f"{_SERVED}several_answers",)),
    Feature("repetition penalty, allowed tokens, stop tokens", "exact", (f"{_BESIDE}other_ways_to_choose_tokens",)),
    Feature("answers in parts (`stream`)", "exact", ("test_http.py::test_an_answer_in_parts",)),
    Feature("structured output", "not tried"),
    Feature(
        "speculative decoding by n-grams or a draft model: the model is shifted, the guesses are not",
        "exact",
        (f"{_BESIDE}tokens_that_were_guessed",),
    ),
    Feature("speculative decoding in other ways", "refused", _asked("speculative_config")),
    Feature("LoRA beside a stack, or alone", "exact", (f"{_BESIDE}lora_beside_a_stack",)),
    Feature(
        "a request without LoRA where LoRA is on: on a CPU, vLLM gives it the LoRA of another request",
        "refused",
        (f"{_BESIDE}lora_beside_a_stack",),
    ),
    Feature(
        "a prompt that comes in parts (streaming input) with a stack at some positions alone",
        "refused",
        (f"{_SERVED}a_wrong_request_is_refused",),
    ),
    Feature(
        "beams with a stack, over HTTP; offline, `BeamSearchParams` can't ask for one",
        "refused",
        ("test_http.py::test_a_wrong_request_gets_status_400",),
    ),
    Feature("gated heads with alibi, MLA, fp8 key cache, keys shared between layers", "refused", (_GATED,)),
    Feature(
        "CUDA, eager, with FlashAttention or FlashInfer: refused unless asked for",
        "[not tried on a card](#on-a-gpu)",
        _CUDA,
    ),
    Feature(
        "gated heads on CUDA with Triton's kernels, those of TensorRT-LLM, other backends, a softcap or sinks",
        "refused",
        (f"{_REFUSED}a_gated_head_on_a_gpu", f"{_REFUSED}a_gated_head_with_flashinfer"),
    ),
    Feature(
        "`torch.compile`, CUDA graphs, platforms other than the CPU and CUDA, model runner V2",
        "refused",
        (
            *_asked("compilation_config.mode", "compilation_config.cudagraph_mode"),
            f"{_REFUSED}another_platform_or_model_runner",
        ),
    ),
    Feature(
        "tensor, pipeline, data and context parallel, several API servers",
        "refused",
        _asked(
            "parallel_config.tensor_parallel_size",
            "parallel_config.pipeline_parallel_size",
            "parallel_config.data_parallel_size",
            "parallel_config.decode_context_parallel_size",
            "parallel_config._api_process_count",
        ),
    ),
    Feature(
        "KV connectors, dual batch overlap, pooling, KV sharing fast prefill",
        "refused",
        _asked(
            "kv_transfer_config",
            "parallel_config.enable_dbo",
            "model_config.runner_type",
            "cache_config.kv_sharing_fast_prefill",
        ),
    ),
    Feature(
        "200 clients at a time with eight stacks; the server is killed between, and started again",
        "exact",
        ("test_http.py::test_two_hundred_at_a_time",),
    ),
    Feature(
        "a stack is added, replaced or removed while requests run: they go on with theirs, which stays in memory",
        "exact",
        (f"{_SERVED}stacks_come_and_go", "test_http.py::test_the_operator_adds"),
    ),
    Feature("a step in which an edit did not run", "an error, and the engine ends", (f"{_SERVED}a_step_in_which",)),
)


def table(outcomes: Mapping[str, str], made_by: str) -> str:
    """The table, from the outcome of each test that ran: "passed", "failed" or "skipped"."""
    lines = [f"Made by `{COMMAND}` {made_by}.", "", "| feature | | tests |", "|---|---|---|"]
    for feature in FEATURES:
        found = [outcome for name, outcome in outcomes.items() if any(name.startswith(x) for x in feature.tests)]
        passed = found.count("passed")
        is_shown = not feature.tests or (passed and passed == len(found))
        verdict = feature.verdict if is_shown else f"**{passed} of {len(found)} tests passed**"
        lines.append(f"| {feature.name} | {verdict} | {passed or ''} |")
    return "\n".join(lines)
