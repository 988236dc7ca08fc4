"""Virtual keys and values in C++, beside attention over the longer context."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str
)
@pytest.mark.parametrize("n", [1, 5, 16, 35])
@pytest.mark.parametrize(("t", "d", "e"), [(70, 34, 46), (3, 64, 32)])
def test_virtual_pairs_are_a_longer_context(
    native_ops: ModuleType, dtype: torch.dtype, limit: float, n: int, t: int, d: int, e: int
) -> None:
    q, k = (torch.randn(2, t, 3, d, dtype=dtype).transpose(1, 2) for _ in range(2))
    v, keys, values = torch.randn(2, 3, t, e, dtype=dtype), 2 * torch.randn(3, n, d), torch.randn(3, n, e)
    mask = torch.ones(2, 1, t, t, dtype=torch.bool)
    mask[1, :, :, 0] = mask[:, :, 1] = False  # padding attends to nothing
    scale = -0.3

    def attended(*own: Tensor, allowed: Tensor = mask) -> Tensor:
        x = (q.double() @ own[0].mT * scale).masked_fill(~allowed, -torch.inf)
        return (x.softmax(-1).nan_to_num() @ own[1]).transpose(1, 2)

    longer = [torch.cat([own.expand(2, 3, n, -1), x.double()], 2) for own, x in ((keys, k), (values, v))]
    seen = torch.cat([mask.any(-1, keepdim=True).expand(2, 1, t, n), mask], -1)
    wanted, alone = attended(*longer, allowed=seen), attended(k.double(), v.double())
    lse = (q.double() @ k.double().mT * scale).masked_fill(~mask, -torch.inf).logsumexp(-1).float()
    out = alone.to(dtype)
    for weight in (1.0, 0.4, 0.0):
        found = native_ops.virtual_context(out, q, lse, keys, values, torch.tensor([weight]), scale)
        expected = alone + weight * (wanted - alone)
        assert found.dtype == dtype
        assert (found - expected).abs().max() <= limit * max(1, float(expected.abs().max())) * 1.5
        assert torch.equal(found[:, 1], out[:, 1])
    assert torch.equal(found, out), "weight 0 changes nothing"


def test_virtual_pairs_that_are_not_taken(native_ops: ModuleType) -> None:
    def call(q: Tensor, n: int = 2, **changes: Tensor) -> Tensor | None:
        x = {
            "lse": q.new_zeros(1, 2, 3, dtype=torch.float32),
            "keys": torch.randn(2, n, 8),
            "values": torch.randn(2, n, 8),
        }
        x |= changes
        return native_ops.virtual_context(q.transpose(1, 2), q, *x.values(), torch.ones(1), 1.0)

    q = torch.randn(1, 2, 3, 8)
    assert call(q) is not None
    assert call(q.double()) is None
    assert call(q.clone().requires_grad_()) is None
    assert call(q, n=0) is None
    assert call(q, keys=torch.randn(2, 3, 8)) is None
    assert call(q, keys=torch.randn(1, 2, 2, 8)) is None, "keys of each sample"
    assert call(q, values=torch.randn(2, 2, 8, dtype=torch.float64)) is None
