"""What the names of fields can't say, by config class (without its "Config"): the whole model's, or a part's."""

from __future__ import annotations

from typing import Any

from transformers import GraniteMoeHybridConfig

from .sizes import CODES, PARTNERS, SpecialIds, each

NEW_ID = "a new id"  # stands for a token id that nothing else has


def _mrope(**more: Any) -> dict[str, Any]:
    """Rotary embeddings in three sections (time, height, width) for a head of width 8."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], **more}


def _chameleon_codes(ids: SpecialIds) -> dict[str, int]:
    """The token of each image code; their names spell the code in letters."""
    names = ["".join(chr(ord("A") + int(digit)) for digit in str(code)) for code in range(CODES)]
    return {"<image>": ids.of("image"), **{f"IMGIMG{name}Z": ids.of(f"code {name}") for name in names}}


def _emu3_codes(ids: SpecialIds) -> dict[str, int]:
    names = [f"<|visual token {code:06d}|>" for code in range(CODES)]
    return {"<image>": ids.of("image"), "<|extra_200|>": ids.of("row"), **{name: ids.of(name) for name in names}}


# Half of the head rotates: four pairs for the three sections.
_HALF_MROPE = {"head_dim": 16, "rope_parameters": _mrope(partial_rotary_factor=0.5)}

_ERNIE_VL = {"moe_intermediate_size": [16, 12], "rope_parameters": _mrope(mrope_section=[1, 1, 2])}


def _granite_layers(ids: SpecialIds) -> list[str]:
    """Both kinds, in the words of the installed version."""
    first = (GraniteMoeHybridConfig().layers_block_type or ["mamba"])[0]
    return [first, PARTNERS[first]] * 2


_FULL_SLIDING = ["full_attention", "sliding_attention"] * 2
_DENSE_SPARSE = ["dense", "sparse", "sparse", "sparse"]
_FULL_SHARED = {"indexer_types": ["full", "shared"] * 2}  # the second takes the keys that the first selected

_GEMMA4: dict[str, Any] = {
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
}
# Towers of the timm library stand aside for one of transformers that gives the same shapes.
_FEATURE_MAP = {"config_class": "resnet", "hidden_size": 16}

# What several have alike.
_ALIKE: dict[str, dict[str, Any]] = {
    **each(
        "Cosmos3EdgeText Glm4vText GlmOcrText PaddleOCRText Qwen2_5_VLText "
        "Qwen2_5OmniText Qwen2VLText Qwen3OmniMoeText Qwen3VLMoeText Qwen3VLText",
        {"rope_parameters": _mrope()},
    ),
    **each(
        "DeepseekOcr2Vision UnlimitedOcrVision",
        {"sam_config": {"image_size": 32, "window_size": 2, "downsample_channels": [16, 16]}},
    ),
    **each("Ernie4_5_VL_MoeText Ernie4_5_VLMoeText", _ERNIE_VL),
    **each("Glm4vMoeText Qwen3_5MoeText Qwen3_5Text", _HALF_MROPE),
    **each("GlmMoeDsa MistralLarge4Text", _FULL_SHARED),
    **each("GotOcr2Vision PPChart2TableVision SamVision", {"image_size": 32, "window_size": 2}),
    **each("HunYuanDenseV1 HunYuanMoEV1 Ministral", {"head_dim": 8}),
    **each("Lfm2 Lfm2Moe", {"layer_types": ["conv", "full_attention"] * 2}),
    **each("LlavaNext LlavaNextVideo LlavaOnevision", {"image_grid_pinpoints": [[16, 32]]}),
    **each("MuseGlimmer MuseSpark", {"out_hidden_size": 64}),
    **each("MusicgenDecoder MusicgenMelodyDecoder", {"num_codebooks": 1}),
    **each("Qwen2_5OmniThinker Qwen3OmniMoeThinker", {"vision_start_token_id": NEW_ID, "vision_end_token_id": NEW_ID}),
}

CONFIGS: dict[str, dict[str, Any]] = _ALIKE | {
    "Apertus1p5": {"text_config": {"vocab_size": 160}, "image_token_offset": 128, "audio_token_offset": 144},
    "Aria": {"projector_patch_to_query_dict": {16: 4}},
    "Bamba": {"attn_layer_indices": [1, 3]},
    "BigBird": {"attention_type": "original_full"},  # the sparse one wants whole blocks
    "Blip2": {"image_token_index": NEW_ID},
    # Not its own, but its cache counts layers by it.
    "Blt": {"num_hidden_layers": 8, "encoder_hash_byte_group_vocab": 50},
    "Chameleon": {"vocabulary_map": _chameleon_codes},
    "Cohere2Moe": {"mlp_layer_types": _DENSE_SPARSE},
    "CohereCompassText": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": _mrope(), "full_attention": _mrope()},
    },
    # Its modeling code reads more than its config class has.
    "DbrxAttention": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "DbrxFFN": {"ffn_hidden_size": 32},
    "DeepseekOcr2Text": {"num_experts_per_tok": 2, "mlp_layer_types": _DENSE_SPARSE},
    "DeepseekV4": {
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "DeepseekV2": {"first_k_dense_replace": 1, "num_experts_per_tok": 2},
    "DiffusionGemma": {"canvas_length": 8},
    "DiffusionGemmaText": _GEMMA4,
    "Dory": {"n_input_layers": 1, "n_output_layers": 1},
    "Dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "Dots3NoteAudio": {"adapter_input_size": 16},
    "Dots3NoteText": {
        "head_dim": 12,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "Dots3NoteVision": {"adapter_in_dim": 16},
    "Emu3": {"vocabulary_map": _emu3_codes},
    "Emu3VQVAE": {"hidden_size": 32},
    "FalconH1": {"mamba_d_ssm": 64},
    "FastVlm": {"vision_config": _FEATURE_MAP},
    "Florence2Vision": {
        "depths": [1, 1],
        "patch_size": [3, 3],
        "patch_stride": [2, 2],
        "patch_padding": [1, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [8, 16],
        "num_heads": [2, 2],
        "num_groups": [2, 2],
        "window_size": 2,
        "projection_dim": 32,
    },
    "Gemma3n": {
        "vision_config": _FEATURE_MAP | {"vocab_size": 8, "vocab_offset": 128, "rms_norm_eps": 1e-6},
        "vision_soft_tokens_per_image": 4,
    },
    "Gemma3nText": {
        "intermediate_size": 48,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "Gemma4": {"vision_config": {"config_class": "gemma4_vision"}},
    "Gemma4Text": _GEMMA4 | {"attention_k_eq_v": True, "num_kv_shared_layers": 2, "enable_moe_block": True},
    "Gemma4Unified": {"vision_config": {"config_class": "gemma4_unified_vision"}},
    "Gemma4UnifiedText": _GEMMA4 | {"attention_k_eq_v": True, "num_kv_shared_layers": 2},
    "Gemma4UnifiedVision": {"mm_embed_dim": 16, "mm_posemb_size": 16, "output_proj_dims": 16, "pooling_kernel_size": 2},
    "Gemma4Vision": {"pooling_kernel_size": 2},
    "Glm5NextText": {
        "layer_types": ["linear_attention", "indexed_attention", "indexed_attention", "linear_attention"],
        "indexer_types": ["full", "full", "shared", "full"],
        "index_kpool": 2,
        "qk_rope_head_dim": 0,
        "head_dim": 0,
    },
    "GPTNeo": {"attention_types": [[["global", "local"], 2]], "window_size": 5},
    "Granite4Vision": {
        "vision_config": {"hidden_size": 64},
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0], [-2, 1]],
        "spatial_target_layers": [2, 3, 2, 3],
        "image_grid_pinpoints": [[16, 32]],
    },
    "GraniteMoeHybrid": {"layer_types": _granite_layers},
    "HunYuanVLText": {"head_dim": 8, "rope_parameters": _mrope(mrope_section=[1, 1, 1, 1])},
    "HunYuanVLVision": {"max_image_size": 16, "min_image_size": 16},
    "HYV4VLText": {"rope_parameters": _mrope(mrope_section=[1, 1, 0])},
    "HYV4VLVision": {"max_image_size": 16},
    "Idefics2Perceiver": {"num_key_value_heads": 2},
    "Inkling2LoopText": {
        "loop_layer_index_start": 2,
        "loop_layer_index_end": 4,
        "n_layers_per_attn_res_block": 2,
        "num_hidden_layers": 6,
        "loop_gate_rank": 8,
        "rel_extent": 16,
    },
    "Inkling2Text": {"rel_extent": 16, "n_layers_per_attn_res_block": 2},
    "InklingAudio": {"n_mel_bins": 8, "mel_vocab_size": 16},
    "InklingText": {"mlp_layer_types": _DENSE_SPARSE, "rel_extent": 16, "logits_mup_width_multiplier": 2.0},
    "InklingVision": {"num_hidden_layers": 4},
    "InstructBlip": {"image_token_index": NEW_ID},
    "InstructBlipVideo": {"image_token_index": NEW_ID, "video_token_index": NEW_ID},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 3, "expert_layer_offset": 0},
    "Kimi_K25": {"projection_hidden_size": 16},
    "Laguna": {"layer_types": _FULL_SLIDING, "num_attention_heads_per_layer": [4, 2, 2, 4]},
    "Llama4": {"pad_token_id": 0},
    "Llama4Text": {"moe_layers": [0, 3]},
    "Llama4Vision": {"intermediate_size": 64, "projector_input_dim": 32, "projector_output_dim": 32},
    "LongcatFlash": {"num_layers": 2, "head_dim": 4},
    "Mamba2": {"num_heads": 8},
    "Mellum": {"layer_types": _FULL_SLIDING, "mlp_layer_types": _DENSE_SPARSE},
    "MiniMax": {"block_size": 4},
    "MiniMaxM3VLText": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "mlp_layer_types": _DENSE_SPARSE,
        "index_block_size": 2,
        "index_topk_blocks": 2,
    },
    "MllamaVision": {"intermediate_layers_indices": [0]},
    "Molmo2Adapter": {"hidden_size": 16, "vision_feature_layer": [-1, -2]},
    "Molmo2Vision": {"image_size": [16, 16]},
    "MuseSparkAudio": {
        "num_hidden_layers": 4,
        "patch_sizes": [4, 2, 2, 2],
        "hidden_sizes": [8, 8, 8, 8],
        "depths": [1, 1, 1, 1],
    },
    "MuseSparkText": {"mlp_layer_types": _DENSE_SPARSE},
    "NemotronH": {"num_hidden_layers": 7},
    "NemotronH_Omni_Reasoning_V3_": {
        "vision_hidden_size": 16,
        "image_token_id": NEW_ID,
        "vision_config": {"video_temporal_patch_size": 2},
    },
    "PerceptionLM": {"vision_config": {"config_class": "vit", "model_args": {"embed_dim": 16}}},
    "PI0": {"chunk_size": 4, "max_state_dim": 8, "max_action_dim": 8},
    "Pix2StructVision": {"hidden_size": 32},
    "PPFormulaNetVision": {
        "image_size": 32,
        "window_size": 2,
        "post_conv_in_channels": 8,
        "post_conv_mid_channels": 8,
        "post_conv_out_channels": 16,
        "decoder_hidden_size": 32,
    },
    "Qwen2VLVision": {"hidden_size": 32},
    "Qwen4ExpText": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "split_ngram_parts": 1,
        "hc_count": 2,
        "hc_lowrank": 8,
    },
    "Radio": {"max_img_size": 32, "num_registers": 1, "num_cls_tokens": 1},
    "Reformer": {
        "hash_seed": 0,
        "is_decoder": True,
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
    },
    # An activation that isn't in place, as the model's features are scaled in place.
    "ResNet": {
        "hidden_act": "gelu",
        "embedding_size": 16,
        "hidden_sizes": [16, 16],
        "depths": [1, 1],
        "image_size": 16,
    },
    "RoCBert": {
        "pronunciation_vocab_size": 128,
        "shape_vocab_size": 128,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "SmolLM3": {"layer_types": _FULL_SLIDING, "no_rope_layer_interval": 2},
    "Step3p7Text": {"layer_types": _FULL_SLIDING, "num_sliding_attention_heads": 2},
    "T5Gemma2": {"decoder": {"hidden_size": 32}},
    "Udop": {"decoder_start_token_id": 1},
    # Its eager attention knows no grouped heads.
    "UnlimitedOcrText": {"first_k_dense_replace": 1, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    # Two names: transformers 5.24's, and 5.1's.
    "VipLlava": {"vision_feature_layer": [-1, -2], "vision_feature_layers": [-1, -2]},
    "VisionEncoderDecoder": {
        "encoder": {"config_class": "vit"},
        "decoder": {"config_class": "bert", "is_decoder": True, "add_cross_attention": True},
    },
    "WavTokenizerEncoder": {
        "codebook_dim": 16,
        "decoder_hidden_size": 32,
        "decoder_intermediate_size": 24,
        "decoder_num_layers": 1,
        "decoder_attention_num_groups": 8,
    },
    # Longer chunks than any text: the kernel for whole chunks is broken in transformers 5.1.
    "xLSTM": {"hidden_size": 64, "qk_dim_factor": 1.0, "num_heads": 4, "chunk_size": 64},
    "Xmod": {"default_language": "en_XX"},
    "Zamba": {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 0},
    # Without rotary embeddings transformers 5.1 fails.
    "Zamba2": {"use_mem_rope": True},
    "Zaya": {
        "num_experts_per_tok": 1,
        "router_hidden_size": 16,
        "layer_types": ["hybrid", "hybrid_sliding"] * 2,
    },
}

# Model types that no tiny model is made of, and why.
UNSUPPORTED = {
    "gemma4_assistant": "it drafts from the hidden states and keys of another model and takes no text",
    "gemma4_unified_assistant": "it drafts from the hidden states and keys of another model and takes no text",
    "pixtral": "it is a vision tower; the class that transformers names for it takes another config",
}
