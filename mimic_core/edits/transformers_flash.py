"""transformers' flash attention function, called by its name, as code of others does that is not in transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .call import AttentionCall, Plan
from .packages import Odd, arguments, parameters

_STATES = ("query_states", "key_states", "value_states")
# Those that transformers' attention interface has too, under the same name. They say which keys a query sees, and how.
_OPTIONS = ("is_causal", "dropout", "position_ids", "sliding_window", "softcap", "s_aux", "target_dtype")
_OPTIONS += ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "block_table", "k_cache", "v_cache")
_NOTHING = ("use_top_left_mask", "deterministic", "attn_implementation", "implementation")
_KNOWN = frozenset((*_STATES, *_OPTIONS, *_NOTHING, "attention_mask", "query_length", "softmax_scale"))


class TransformersFlashCall(AttentionCall):
    """A call of `transformers.modeling_flash_attention_utils._flash_attention_forward`, of [b t h d].

    Raises:
        Odd: it has arguments that are not understood.
    """

    def __init__(
        self, original: Callable[..., Tensor], module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        given = arguments(original, args, kwargs)
        if odd := [name for name, x in given.items() if name not in _KNOWN and x is not None]:
            raise Odd(f"got {', '.join(odd)}, which is not understood")
        query, key, value = (given[name] for name in _STATES)
        if query.ndim != 4 or given["query_length"] != query.shape[1]:
            raise Odd(
                f"got queries {list(query.shape)} and query_length {given['query_length']}, but [b t h d] is needed"
            )

        def base(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
            states = (x.transpose(1, 2) for x in (query, key, value))
            return original(**{**given, **dict(zip(_STATES, states, strict=True))}), None

        options = {name: given.get(name, parameters(original).get(name)) for name in _OPTIONS}
        options["scaling"] = given.get("softmax_scale")
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        super().__init__(base, "flash_attention_2", module, query, key, value, given["attention_mask"], options)

    def answer(self, plan: Plan) -> Tensor:
        """What the function returns, with the edits."""
        return self.run(plan)[0]

    @property
    def _is_flash(self) -> bool:
        return True
