"""A tiny random model of any causal architecture that transformers has, from its own default configuration."""

from __future__ import annotations

from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "n_embed": 32,
    "embed_dim": 32,
    "emb_dim": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "hidden_dim": 32,
    "attention_hidden_size": 64,
    "lru_width": 32,
    "dim": 32,
    "dim_model": 32,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_blocks": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 2,
    "head_dim": 8,
    "dim_head": 8,
    "global_head_dim": 8,
    "rotary_dim": 4,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "n_inner": 48,
    "ffn_hidden_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "block_multiple_of": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "o_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 16,
    "attention_head_dim": 16,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 64,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "n_ctx": 256,
    "seq_length": 256,
    "max_sequence_length": 256,
    "sliding_window": 7,
    "window_size": 7,
    "attention_window_size": 7,
    "attention_chunk_size": 7,
    "state_size": 8,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "mamba_dt_rank": 4,
    "time_step_rank": 4,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "type_vocab_size": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 512,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "num_nextn_predict_layers": 0,
    "num_memory_blocks": 2,
    "zero_expert_num": 1,
    "expert_ffn_hidden_size": 24,
    "image_size": 28,
    "patch_size": 14,
}
LARGEST = 5_000_000
# what a class's default would not show, or refuses
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v2": {"head_dim": 8},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "num_layers": 2,
        "attention_layers": ["global", "local"],
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "roc_bert": {"pronunciation_embed_dim": 16, "shape_embed_dim": 16, "pronunciation_vocab_size": 512},
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"chunk_size": 64},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
# tried in turn until a model can be made, and scores a text
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 4, "head_dim": 16},
    {"num_key_value_heads": 2, "head_dim": 8, "num_attention_heads": 4},
)
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PER_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "layer_type", "no_rope_layers")


def _kinds(kinds: list[Any], layers: int = 4) -> list[Any]:
    """Return as many layers, with every kind among them that the architecture has."""
    distinct = list(dict.fromkeys(kinds))
    return (distinct * layers)[: max(layers, len(distinct))]


def _changed(config: Any, variant: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration's values with its sizes made small."""
    known = config.to_dict()
    made = {k: SIZES[k] for k in known if k in SIZES and known[k] is not None}
    made |= {k: v for k, v in SPECIAL.items() if k in known}
    lists = {k: _kinds(known[k]) for k in PER_LAYER if isinstance(known.get(k), list) and known[k]}
    if lists:
        layers = max(map(len, lists.values()))
        made |= {k: (v * layers)[:layers] for k, v in lists.items()}
        made |= {k: layers for k in ("num_hidden_layers", "n_layer", "num_layers") if k in made}
    made |= {k: 0.0 for k, v in known.items() if isinstance(v, float) and "drop" in k}
    return made | {k: v for k, v in variant.items() if k in known} | OVERRIDES.get(config.model_type, {})


def _config(kind: Any, variant: dict[str, Any]) -> Any:
    default = kind()
    parts = {k: getattr(default, k) for k in getattr(kind, "sub_configs", {}) if getattr(default, k, None) is not None}
    if not parts or "text_config" not in parts:
        return kind(**_changed(default, variant))
    return kind(**{k: _changed(part, variant) for k, part in parts.items()}, **SPECIAL)


def _made(kind: Any, variant: dict[str, Any], scale: float) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    config = _config(kind, variant)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters are not tiny")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(scale * torch.randn(parameter.shape))
        model(input_ids=torch.arange(5, 25)[None])
    return model


def tiny(kind: type, scale: float = 0.2, **changes: Any) -> Any:
    """Return a random model of a configuration class, with changes to it; weights are wide enough to show what is wrong.

    Raises whatever the class does if it cannot be made, or cannot score a text.
    """
    failure: Exception | None = None
    for variant in VARIANTS:
        try:
            return _made(kind, {**variant, **changes}, scale)
        except Exception as err:  # of whatever kind transformers' classes raise
            failure = failure or err
    raise failure or ValueError("no variant")


def causal_configs() -> dict[str, type]:
    """Return transformers' configuration classes of causal language models by model type."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return {kind.model_type: kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING}
