"""What a wrong call of the ops is told: what was asked, what was found, what to do."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mimic_core import BackendUnavailableError, MimicError, ShapeError, UnknownNameError, errors, losses, ops
from tests.support.op_cases import Case, inputs_of

X = inputs_of(Case()).tensors
Q, K, V = X["q"], X["k"], X["v"]
SHIFT = {name: X[name] for name in ("vector", "gate_weight", "gate_bias")}
MASK = torch.ones(2, 1, 5, 7, dtype=torch.bool)


def plain(function: Any) -> Any:
    """The function as users get it: shape annotations, where tests check them, would speak before its own errors."""
    return inspect.unwrap(function)


WRONG_ATTENTION = [
    ("rank", {"q": Q[0]}, r"q, k and v must have four axes each; expected q \[b h t d\], k \[b g s d\], v \[b g s e\]"),
    ("value rank", {"v": V[..., None]}, r"four axes each.*v \[2, 2, 7, 8, 1\]"),
    ("batch", {"q": Q[:1]}, "q, k and v differ in the batch size"),
    ("length", {"v": V[:, :, :6]}, r"k and v in heads or length.*v \[2, 2, 6, 8\] torch.float32 cpu"),
    ("value heads", {"v": V[:, :1]}, "k and v in heads or length"),
    ("heads", {"q": Q[:, :3]}, r"3 attention heads are not a multiple of 2 key/value heads; .*given q \[2, 3, 5, 8\]"),
    ("no key heads", {"k": K[:, :0], "v": V[:, :0]}, "4 attention heads are not a multiple of 0 key/value heads"),
    ("width", {"k": K[..., :5]}, r"q and k heads differ in width.*q \[2, 4, 5, 8\].*k \[2, 2, 7, 5\]"),
    ("dtype", {"k": K.double()}, r"the same floating-point dtype.*q .* torch.float32 cpu, k .* torch.float64 cpu"),
    ("integers", {"q": Q.int(), "k": K.int(), "v": V.int()}, "the same floating-point dtype.*torch.int32"),
    ("device", {"k": K.to("meta"), "v": V.to("meta")}, r"different devices.*torch.float32 cpu, k .* meta"),
    ("mask device", {"mask": MASK.to("meta")}, r"different devices.*mask \[2, 1, 5, 7\] torch.bool meta"),
    ("mask keys", {"mask": MASK[..., :6]}, r"does not broadcast to \[b h t s\].*mask \[2, 1, 5, 6\] torch.bool cpu"),
    ("mask heads", {"mask": MASK.expand(2, 2, 5, 7)}, r"does not broadcast.*mask \[2, 2, 5, 7\]"),
    ("mask rank", {"mask": MASK[None]}, r"does not broadcast.*mask \[1, 2, 1, 5, 7\]"),
    ("mask dtype", {"mask": MASK.long()}, r"mask.*bool.*mask \[2, 1, 5, 7\] torch.int64"),
    ("mask and causal", {"mask": MASK, "is_causal": True}, "give a mask or is_causal, not both"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        pytest.param(op, change, message, id=f"{op}-{name}")
        for op in ("attention_with_lse", "attention_lse", "shifted_attention")
        for name, change, message in WRONG_ATTENTION
        if op != "attention_lse" or set(change) != {"v"}  # it takes no values
    ],
)
def test_wrong_attention(op: str, change: dict[str, Any], message: str):
    arguments = {"q": Q, "k": K, "v": V, **change}
    if op == "shifted_attention":
        arguments |= SHIFT
    if op == "attention_lse":
        arguments.pop("v")
    with pytest.raises(ShapeError, match=message):
        plain(getattr(ops, op))(**arguments)


@pytest.mark.parametrize("scale", [0.0, math.inf, -math.inf, math.nan])
def test_scale_that_leaves_no_logits(scale: float):
    for run in _every_op(Q, K, V, backend="auto", scale=scale)[:3]:  # the last takes no scale
        with pytest.raises(ValueError, match=f"^scale should be finite and not 0, found {scale}$"):
            run()


WRONG_SHIFT = [
    ("vector", {"vector": torch.zeros(4, 9)}, r"vector should be \[4, 8\]; given .*vector \[4, 9\] torch.float32 cpu"),
    ("shared vector", {"vector": torch.zeros(8)}, r"vector should be \[4, 8\]; given .*vector \[8\]"),
    ("weight", {"gate_weight": torch.zeros(2, 8)}, r"gate_weight should be \[4, 8\]; given .*gate_weight \[2, 8\]"),
    ("bias", {"gate_bias": torch.zeros(4, 1)}, r"gate_bias should be \[4\]; given .*gate_bias \[4, 1\]"),
    (
        "device",
        {"vector": SHIFT["vector"].to("meta")},
        r"different devices; given .*vector \[4, 8\] torch.float32 meta",
    ),
]
WRONG_OUTPUT = [
    ("lse", {"lse": torch.zeros(2, 5, 4)}, r"lse should be \[2, 4, 5\]; given .*lse \[2, 5, 4\]"),
    ("lse with an axis", {"lse": torch.zeros(2, 4, 5, 1)}, r"lse should be \[2, 4, 5\]; given .*lse \[2, 4, 5, 1\]"),
    ("lse device", {"lse": torch.zeros(2, 4, 5, device="meta")}, "different devices"),
    (
        "not transposed",
        {"attn_out": Q},
        r"attention output is \[2, 4, 5, 8\], but for this query it must be \[2 5 4 e\]",
    ),
    (
        "query rank",
        {"query": Q[0]},
        r"must have four axes each; given attention output \[2, 5, 4, 8\], query \[4, 5, 8\]",
    ),
    ("vectors of samples alone", {"vector": torch.zeros(2, 4, 8)}, r"gate_weight should be \[2, 4, 8\]"),
    ("vectors of 3 samples", {"vector": torch.zeros(3, 4, 8)}, r"vector should be \[2, 4, 8\]"),
    ("output rank", {"attn_out": Q.flatten(2)}, "must have four axes each"),
    ("value width", {"attn_out": torch.zeros(2, 5, 4, 6)}, r"vector should be \[4, 6\]"),
]


@pytest.mark.parametrize(("_id", "change", "message"), WRONG_SHIFT, ids=[case[0] for case in WRONG_SHIFT])
def test_wrong_shift_of_attention(_id: str, change: dict[str, Tensor], message: str):
    with pytest.raises(ShapeError, match=message):
        plain(ops.shifted_attention)(Q, K, V, **{**SHIFT, **change})


@pytest.mark.parametrize(
    ("_id", "change", "message"), WRONG_SHIFT + WRONG_OUTPUT, ids=[case[0] for case in WRONG_SHIFT + WRONG_OUTPUT]
)
def test_wrong_gated_shift(_id: str, change: dict[str, Tensor], message: str):
    arguments = {"attn_out": Q.transpose(1, 2), "query": Q, "lse": torch.zeros(2, 4, 5), **SHIFT}
    with pytest.raises(ShapeError, match=message):
        plain(ops.gated_shift)(**{**arguments, **change})


@pytest.mark.parametrize(
    ("vector", "scale"),
    [((5,), ()), ((3, 6), ()), ((2, 6), (3,)), ((6,), (2,)), ((2, 1, 6), ()), ((6,), (1,))],
    ids=str,
)
def test_wrong_norm_preserving_add(vector: tuple[int, ...], scale: tuple[int, ...]):
    with pytest.raises(ShapeError, match=r"vector should be \[6\], or one for each sample of x \[2, 4, 6\]"):
        plain(ops.norm_preserving_add)(torch.zeros(2, 4, 6), torch.zeros(vector), torch.zeros(scale))


def _every_op(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> list[Any]:
    vector, weight, bias = (x.to(q.device) for x in SHIFT.values())
    return [
        lambda: ops.attention_with_lse(q, k, v, **options),
        lambda: ops.attention_lse(q, k, **options),
        lambda: ops.shifted_attention(q, k, v, vector, weight, bias, **options),
        lambda: ops.resolve_backend(q, k, v, options.get("mask"), options["backend"]),
    ]


def test_unknown_backend_is_told_what_there_is():
    for run in _every_op(Q, K, V, backend="flash"):
        with pytest.raises(
            UnknownNameError,
            match=r"^no backend is called 'flash'; there are: auto, cpu, cuda, sdpa, reference, flex$",
        ):
            run()


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("cpu", "the tensors are on meta"),
        ("cpu", "the mask requires a gradient and the kernel passes none to it"),
        ("cpu", "the kernel does not take an empty batch or sequence"),
        ("sdpa", "the mask requires a gradient and the chunked LSE passes none to it"),
        ("cuda", "the tensors are on cpu"),
        ("flex", "the mask requires a gradient"),
        ("flex", "flex_attention does not take an empty batch or sequence"),
    ],
)
def test_unavailable_backend_never_falls_back(backend: str, reason: str):
    q, k, v = (x.to("meta") if "meta" in reason else x for x in (Q, K, V))
    q = q[:, :, :0] if "empty" in reason else q
    options = {"mask": torch.zeros(5, 7, requires_grad=True)} if "mask" in reason else {}
    for run in _every_op(q, k, v, backend=backend, **options):
        with pytest.raises(
            BackendUnavailableError,
            match=f"^backend '{backend}' was asked for and can't run this call: {reason}; "
            'backend="auto" chooses one that can$',
        ):
            run()


def test_auto_on_another_device_is_not_the_cpu_kernel():
    q, k, v, vector, weight, bias = (X[name].to("meta") for name in ("q", "k", "v", *SHIFT))
    said = ops.resolve_backend(q, k, v)
    assert said == ("sdpa", "the first choice")
    assert ops.shifted_attention(q, k, v, vector, weight, bias).shape == (2, 5, 4, 8)


BUILTINS = {
    "UnsupportedModelError": LookupError,
    "WrongTypeError": TypeError,
    "UnknownNameError": LookupError,
    "ShapeError": ValueError,
    "PatchStateError": RuntimeError,
    "BackendUnavailableError": RuntimeError,
    "CheckpointError": ValueError,
}


def test_every_error_is_a_mimic_error_and_its_builtin():
    defined = {name: x for name, x in vars(errors).items() if isinstance(x, type) and x is not MimicError}
    assert defined.keys() == BUILTINS.keys()
    for name, error in defined.items():
        assert issubclass(error, MimicError)
        assert issubclass(error, BUILTINS[name])
        assert str(error("no 'quotes' of its own")) == "no 'quotes' of its own"
        assert str(error()) == ""


def test_the_builtin_catches_it():
    with pytest.raises(LookupError) as caught:
        losses.recipe("nothing")
    assert str(caught.value) == "no recipe is called 'nothing'; there are: mimic, live, lm"
