"""The small value of every field that is a size, by its name; the same name means the same thing nearly everywhere."""

from __future__ import annotations

from typing import Any


def each(names: str, value: Any) -> dict[str, Any]:
    """The same value for each of some names, written in a row."""
    return dict.fromkeys(names.split(), value)


SPECIAL_IDS = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1, "forced_eos": 2, "sep": 3, "mask": 4, "eod": 5}
VOCABULARY = 128
CODES = 16  # of a discrete image tokenizer
FIRST_TEXT_ID = 8


class SpecialIds:
    """Gives each special token of a model an id of its own, counted down from the end of the vocabulary."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        self._next = vocabulary - 1
        self._by_stem: dict[str, int] = dict(SPECIAL_IDS)

    def of(self, stem: str) -> int:
        """The id of what a config calls `<stem>_token_id`, the same at every call."""
        if stem not in self._by_stem:
            self._by_stem[stem] = self._next
            self._next -= 1
        return self._by_stem[stem]

    @property
    def text(self) -> range:
        """The ids that mean nothing special."""
        return range(FIRST_TEXT_ID, self._next + 1)


# The kind that layers of one kind are mixed with, where a class's default is the first alone.
PARTNERS = {"linear_attention": "full_attention", "mamba": "attention"}
# Fields that are lists with one entry a layer.
LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")

SIZES: dict[str, Any] = {
    # width
    **each("hidden_size d_model n_embd emb_dim hidden_dim embed_dim embedding_size dim", 32),
    **each("input_embedding_size output_embedding_size projection_dim image_text_hidden_size out_hidden_size", 32),
    **each("text_hidden_size vision_output_dim hidden_size_global adapter_out_dim output_dim", 32),
    **each("projector_hidden_size projection_hidden_size backbone_hidden_size projection_hidden_dim", 32),
    **each("intermediate_size ffn_dim ffn_hidden_size d_ff dff d_inner decoder_ffn_dim encoder_ffn_dim", 48),
    **each("dim_ff feed_forward_size intermediate_size_mlp dense_intermediate_size projection_intermediate_size", 48),
    **each("moe_intermediate_size moe_hidden_size expert_ffn_hidden_size shared_expert_intermediate_size", 16),
    **each("shared_intermediate_size moe_shared_expert_intermediate_size share_expert_dim", 16),
    **each("shared_experts_intermediate_size prefix_dense_intermediate_size hidden_size_per_layer_input", 16),
    # depth
    **each("num_hidden_layers num_layers n_layer n_layers layers decoder_layers encoder_layers depth", 4),
    **each("num_decoder_layers num_encoder_layers num_blocks", 4),
    # attention
    **each("num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads", 4),
    **each("encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads", 4),
    **each("swa_num_attention_heads num_sliding_attention_heads", 4),
    **each("num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_global_key_value_heads", 2),
    **each("head_dim d_kv attention_head_dim swa_head_dim kv_channels dim_head attention_head_size v_head_dim", 8),
    **each("qk_nope_head_dim query_pre_attn_scalar global_head_dim", 8),
    **each("qk_rope_head_dim rotary_dim", 4),
    **each("q_lora_rank kv_lora_rank o_lora_rank", 16),
    **each("sliding_window sliding_window_size attention_window_size local_attention keep_window_size", 5),
    **each("attention_chunk_size floor_scale log_scaling_n_floor", 6),
    **each("local_attention_window_len", 6),
    **each("max_window_layers", 2),
    **each("use_sliding_window", True),
    **each("index_topk index_n_heads", 4),
    **each("index_head_dim", 8),
    # mixture of experts
    **each("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
    **each("num_experts_per_tok moe_k moe_topk moe_top_k top_k_experts", 2),
    **each("n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group", 1),
    **each("first_k_dense_replace num_dense_layers moe_layer_start_index", 1),
    **each("zero_expert_num", 2),
    **each("mlp_only_layers", [0]),
    # state space and linear attention
    **each("state_size mamba_d_state ssm_state_size", 8),
    **each("mamba_chunk_size chunk_size", 4),
    **each("mamba_d_head mamba_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim", 8),
    **each("use_mamba_kernels", False),
    **each("mamba_n_heads mamba_num_heads", 8),
    **each("linear_num_key_heads linear_num_heads", 2),
    **each("linear_num_value_heads", 4),
    **each("mamba_n_groups n_groups mamba_ngroups", 1),
    # vocabulary and positions
    **each("vocab_size vocab_size_per_layer_input unpadded_vocab_size", VOCABULARY),
    **each("max_position_embeddings n_positions max_seq_len n_ctx context_length max_target_positions", 128),
    **each("max_source_positions", 64),
    # images
    **each("image_size img_size", 16),
    **each("patch_size", 4),
    **each("image_seq_length num_image_tokens mm_tokens_per_image", 16),
    **each("num_query_tokens latent_query_num", 4),
    **each("num_position_embeddings num_patches max_num_patches position_embedding_size seq_len", 16),
    **each("pos_emb_height pos_emb_width posemb_grid_size", 4),
    **each("fullatt_block_indexes global_attn_indexes intermediate_layers_indices", [1]),
    **each("deepstack_visual_indexes", [0, 1]),
    **each("base_channels dim_model_base", 32),
    **each("num_filters", 4),
    **each("logit_scale", 1.0),
    **each("latent_channels codebook_dim output_channels", 8),
    **each("channel_multiplier", [1, 1, 1]),
    **each("resampler_n_latents resampler_num_latents", 4),
    **each("resampler_depth aligner_num_add_layers", 1),
    **each("resampler_n_heads resampler_heads", 2),
    **each("resampler_head_dim resampler_dim_head", 8),
    **each("downsample_hidden_size alignment_intermediate_size nemo_conv_channels ext_pw_out_channel", 16),
    **each("depthwise_separable_out_channel", 16),
    **each("num_res_blocks", 1),
    **each("codebook_size num_embeddings", CODES),
    **each("patch_embed_hidden_size", 48),
    **each("window_size", 16),
}

# What differs in the parts around the text decoder.
_TOWER: dict[str, Any] = {
    **each("hidden_size d_model embed_dim projection_hidden_size", 16),
    **each("intermediate_size ffn_dim mlp_dim d_ff encoder_ffn_dim", 24),
    **each("num_hidden_layers num_layers depth encoder_layers num_blocks", 2),
    **each("num_attention_heads num_heads attention_heads encoder_attention_heads num_key_value_heads", 2),
}
BY_ROLE: dict[str, dict[str, Any]] = {
    "vision": _TOWER,
    "audio": _TOWER,
    "vq": _TOWER,
    "qformer": {**_TOWER, "encoder_hidden_size": 16},
    "perceiver": _TOWER,
}
# Set also where the class leaves it open.
EVEN_IF_NONE = {"num_key_value_heads", "sliding_window", "mlp_only_layers"} | {
    f"{stem}_token_id" for stem in SPECIAL_IDS
}
