"""What each vision-language family needs to be tiny, and what its processor makes of a prompt: data only.

`tests/families.py` reads it: a family's default configuration shrinks to the sizes of `TEXT`, `VISION` and their like,
then takes the family's `overrides`. An image is `(3, IMAGE_SIZE, IMAGE_SIZE)`, a grid of 4 x 4 patches, and most
families merge 2 x 2 of them into a token.
"""

NUM_LAYERS = 4
HIDDEN_SIZE = 64
VOCAB_SIZE = 160
PAD, BOS, EOS = 0, 1, 2
WORDS = range(3, 100)
SPARE_ROWS = range(100, 126)  # rows of the embedding table that no token uses
UNUSED, START, END = 127, 128, 129  # of special tokens that no prompt has; around an image
CODES = range(130, 140)  # of an image in the vocabularies of apertus1p5, chameleon and emu3
IMAGE, VIDEO, AUDIO = 150, 151, 152
IMAGE_SIZE, PATCH_SIZE = 28, 7

TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}

# The same sizes under the names that other configurations have for them, and sizes of what only some models have.
TEXT_ALIASES = {
    "chunk_size": 8,
    "d_model": HIDDEN_SIZE,
    "decoder_ffn_dim": 64,
    "decoder_layers": 2,
    "embed_dim": HIDDEN_SIZE,
    "encoder_ffn_dim": 64,
    "encoder_layers": 2,
    "ffn_dim": 64,
    "first_k_dense_replace": 1,
    "hc_lowrank": 16,
    "head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "kv_lora_rank": 16,
    "layers": NUM_LAYERS,
    "linear_head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 8,
    "mamba_head_dim": 16,
    "mamba_num_heads": 8,
    "moe_hidden_size": HIDDEN_SIZE,
    "moe_intermediate_size": 32,
    "moe_k": 2,
    "moe_num_experts": 4,
    "moe_shared_expert_intermediate_size": 32,
    "n_group": 1,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_kv_shared_layers": 2,
    "num_local_experts": 4,
    "projection_dim": HIDDEN_SIZE,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "query_pre_attn_scalar": 16,
    "rel_extent": 64,
    "rotary_dim": 8,
    "share_expert_dim": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "ssm_state_size": 16,
    "swa_head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "topk_group": 1,
    "unpadded_vocab_size": VOCAB_SIZE,
    "v_head_dim": 16,
    "vocab_size_per_layer_input": VOCAB_SIZE,
}
VISION_ALIASES = {
    "deepstack_visual_indexes": [0, 1],
    "depth": 2,
    "embed_dim": 32,
    "fullatt_block_indexes": [1],
    "global_attn_indexes": [1],
    "head_dim": 16,
    "mlp_dim": 48,
    "n_layers": 2,
    "num_global_layers": 1,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "num_position_embeddings": 64,
    "out_hidden_size": HIDDEN_SIZE,
    "output_channels": 16,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "position_embedding_size": 64,
    "projection_dim": HIDDEN_SIZE,
    "projection_hidden_dim": 48,
    "projection_intermediate_size": 64,
    "text_hidden_size": HIDDEN_SIZE,
    "vision_output_dim": 64,
    "vocab_size": 40,
    "window_size": IMAGE_SIZE,
}
AUDIO_SIZES = {
    "conf_num_hidden_layers": 1,
    "d_model": 32,
    "downsample_hidden_size": 16,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "encoder_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "out_hidden_size": HIDDEN_SIZE,
    "output_dim": HIDDEN_SIZE,
}
JOINT = {  # what joins the two, at the top of a configuration
    "alignment_intermediate_size": 64,
    "mm_tokens_per_image": 4,
    "num_query_tokens": 4,
    "projector_hidden_size": 48,
    "vision_soft_tokens_per_image": 4,
}


def _around(num_tokens):
    return [START, *[IMAGE] * num_tokens, END]


MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
MROPE_INTERLEAVED = {**MROPE, "mrope_interleaved": True}
MROPE_FULL = {**MROPE_INTERLEAVED, "partial_rotary_factor": 1.0}
MM_TYPES = {"mm_token_type_ids": [IMAGE]}
T5 = {"d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4}
PINPOINTS = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
ENCODER_DECODER = "AMVL reads decoder-only models: the prompt of an encoder-decoder is no prefix of its answer"


# Fields of each family; see `Family` in tests/families.py.
FAMILY_DATA = {
    "apertus1p5": dict(
        since="5.24",
        overrides={
            "image_token_offset": CODES.start,
            "vision_config": {
                "codebook_size": len(CODES),
                "base_channels": 32,
                "embed_dim": 16,
                "latent_channels": 16,
                "channel_multiplier": [1, 1, 1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [],
            },
            "audio_token_offset": CODES.stop,
            "audio_config": {
                "model_type": "wavtokenizer_encoder",
                "codebook_size": 10,
                "codebook_dim": 32,
                "hidden_size": 32,
                "num_filters": 8,
                "upsampling_ratios": [2, 2],
            },
        },
        image_inputs="sized_pixels",
        # Around the image, its size in words and the token after it; between its three rows, the end of a line.
        image_tokens=[START, *WORDS[:3], UNUSED, *([IMAGE] * 3 + [UNUSED]) * 2, *[IMAGE] * 3, END],
    ),
    "aria": dict(
        overrides={"projector_patch_to_query_dict": {16: 4}}, image_inputs="masked_pixels", image_tokens=[IMAGE] * 4
    ),
    "aya_vision": dict(image_tokens=_around(4)),
    "blip": dict(
        image_tokens=[],
        one_image_per_row="row and image of the same index meet in its cross-attention",
        no_text_only_rows="row and image of the same index meet in its cross-attention",
        padding_matters="its decoder counts positions from the first column, padding included",
    ),
    "blip-2": dict(
        overrides={"image_token_index": IMAGE},
        image_tokens=[IMAGE] * 4,
        no_text_only_batches="`pixel_values` is a required argument of its forward",
    ),
    "chameleon": dict(
        overrides={
            "vocabulary_map": {"<image>": IMAGE, **{f"IMGIMG{chr(65 + i)}Z": code for i, code in enumerate(CODES)}},
            "vq_config": {
                "num_embeddings": len(CODES),
                "base_channels": 32,
                "embed_dim": 16,
                "latent_channels": 16,
                "channel_multiplier": [1, 1, 1, 1],
                "resolution": IMAGE_SIZE,
                "num_res_blocks": 1,
                "attn_resolutions": [],
            },
        },
        image_tokens=_around(9),
    ),
    "cohere2_vision": dict(image_tokens=_around(4)),
    "cohere_compass": dict(
        overrides={
            "text_config.rope_parameters": dict.fromkeys(["full_attention", "sliding_attention"], MROPE_INTERLEAVED)
        },
        image_inputs="patch_pairs",
        token_types=MM_TYPES,
    ),
    "cosmos3_edge": dict(
        overrides={"text_config.rope_parameters": MROPE}, image_inputs="patches", token_types=MM_TYPES
    ),
    "cosmos3_omni": dict(
        overrides={"text_config.rope_parameters": MROPE_INTERLEAVED}, image_inputs="patch_pairs", token_types=MM_TYPES
    ),
    "deepseek_ocr2": dict(
        overrides={
            "text_config.mlp_layer_types": ["dense", "sparse"] * 2,
            "text_config.num_experts_per_tok": 2,
            "vision_config.sam_config.downsample_channels": [16, 32],
        },
        image_inputs="global_views",
        image_tokens=[IMAGE] * 145,
    ),
    "deepseek_vl": dict(image_tokens=[IMAGE] * 16),
    "deepseek_vl_hybrid": dict(image_inputs="two_resolutions", image_tokens=[IMAGE] * 16),
    "diffusion_gemma": dict(
        overrides={
            "text_config.num_experts": 4,
            "text_config.top_k_experts": 2,
            "text_config.moe_intermediate_size": 32,
            "text_config.global_head_dim": 32,
        },
        refused="it denoises blocks of tokens, AMVL continues a prompt token by token",
    ),
    "dots3_note": dict(
        overrides={
            "text_config.swa_q_lora_rank": 16,
            "text_config.swa_kv_lora_rank": 16,
            "text_config.swa_qk_nope_head_dim": 16,
            "text_config.swa_v_head_dim": 16,
            "text_config.swa_head_dim": 32,
            "text_config.swa_num_attention_heads": 4,
            "text_config.swa_num_key_value_heads": 4,
            "text_config.num_key_value_heads": 4,
            "vision_config.moe_intermediate_size": 32,
            "vision_config.num_local_experts": 4,
            "vision_config.adapter_in_dim": 32,
            "vision_config.adapter_out_dim": HIDDEN_SIZE,
            "audio_config.adapter_input_size": 32,
            "audio_config.adapter_out_dim": HIDDEN_SIZE,
        },
        image_inputs="patches",
    ),
    "emu3": dict(
        overrides={
            "vocabulary_map": {
                "<image>": IMAGE,
                "<|extra_200|>": 149,
                **{f"<|visual token {i:06d}|>": code for i, code in enumerate(CODES)},
            },
            "vq_config": {
                "codebook_size": len(CODES),
                "embed_dim": 16,
                "latent_channels": 16,
                "base_channels": 32,
                "channel_multiplier": [1, 1, 1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "hidden_size": 32,
            },
        },
        image_inputs="sized_pixels",
        image_tokens=_around(12),
        training_matters="its image tokenizer has batch norms",
    ),
    "ernie4_5_vl_moe": dict(
        overrides={"text_config.rope_parameters": {**MROPE, "mrope_section": [2, 2, 4]}},
        image_inputs="patches",
        token_types={**MM_TYPES, "moe_mm_token_type_ids": [IMAGE, START, END]},
    ),
    "evolla": dict(refused="it reads proteins, not images"),
    "exaone4_5": dict(image_inputs="patch_pairs"),
    "fast_vlm": dict(image_tokens=[IMAGE] * 4),
    "florence2": dict(
        overrides={
            "vision_config": {
                "depths": [1],
                "patch_size": [7],
                "patch_stride": [4],
                "patch_padding": [3],
                "patch_prenorm": [False],
                "embed_dim": [32],
                "num_heads": [2],
                "num_groups": [2],
                "projection_dim": HIDDEN_SIZE,
            }
        },
        refused=ENCODER_DECODER,
    ),
    "fuyu": dict(overrides={"patch_size": IMAGE_SIZE // 2}, image_inputs="fuyu", image_tokens=[IMAGE] * 4),
    "gemma3": dict(token_types={"token_type_ids": [IMAGE]}),
    "gemma3n": dict(
        overrides={"text_config.intermediate_size": [64] * NUM_LAYERS}, token_types={"token_type_ids": [IMAGE]}
    ),
    "gemma4": dict(
        overrides={
            "vision_config": {
                "model_type": "gemma4_vision",
                **VISION,
                "head_dim": 16,
                "num_key_value_heads": 2,
                "position_embedding_size": 64,
                "patch_size": 7,
                "pooling_kernel_size": 2,
            },
            "audio_config": None,
            "text_config.global_head_dim": 32,
            "text_config.use_bidirectional_attention": "vision",
        },
        image_inputs="gemma4",
        token_types=MM_TYPES,
    ),
    "gemma4_unified": dict(
        overrides={
            "vision_config": {
                "model_type": "gemma4_unified_vision",
                "patch_size": 14,
                "pooling_kernel_size": 1,
                "mm_embed_dim": 32,
                "mm_posemb_size": 64,
                "output_proj_dims": 32,
            },
            "audio_config": None,
            "text_config.global_head_dim": 32,
        },
        image_inputs="gemma4",
        token_types=MM_TYPES,
    ),
    "git": dict(
        image_tokens=[],
        one_image_per_row="the image of each row is put before its text, without tokens that would say where",
        no_text_only_rows="it repeats the images until there is one for each row",
    ),
    "glm46v": dict(overrides={"text_config.rope_parameters": MROPE}, image_inputs="patch_pairs", token_types=MM_TYPES),
    "glm4v": dict(overrides={"text_config.rope_parameters": MROPE}, image_inputs="patch_pairs", token_types=MM_TYPES),
    "glm4v_moe": dict(
        overrides={"text_config.rope_parameters": {**MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
        image_inputs="patch_pairs",
        token_types=MM_TYPES,
    ),
    "glm5_next": dict(
        overrides={"text_config.num_key_value_heads": 4, "text_config.qk_rope_head_dim": 0},
        image_inputs="patch_pairs",
        token_types=MM_TYPES,
    ),
    "glm_ocr": dict(
        overrides={"text_config.rope_parameters": MROPE}, image_inputs="patch_pairs", token_types=MM_TYPES
    ),
    "glmga": dict(overrides={"text_config.rope_parameters": MROPE}, image_inputs="patch_pairs", token_types=MM_TYPES),
    "got_ocr2": dict(image_tokens=_around(1)),
    "granite4_vision": dict(
        overrides={
            **PINPOINTS,
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-1, 0], [-2, 2]],
            "spatial_target_layers": [1, 3],
            "qformer_config.num_hidden_layers": 1,
            "vision_config.hidden_size": 128,
        },
        image_inputs="tiles",
        image_tokens=[IMAGE] * 14,
    ),
    "granite_docling": dict(image_inputs="granite_docling", image_tokens=[IMAGE]),
    "hunyuan_vl": dict(
        overrides={
            "text_config.rope_parameters": {
                "rope_type": "dynamic",
                "factor": 1.0,
                "alpha": 1000.0,
                "rope_theta": 1e4,
                "mrope_section": [2, 2, 2, 2],
            },
            "text_config.head_dim": 16,
            "vision_config.max_image_size": 2 * IMAGE_SIZE,
        },
        image_inputs="patches",
        image_tokens=_around(8),
        token_types=MM_TYPES,
        place_matters="the fourth axis of its positions numbers the images of the batch, not those of the row",
    ),
    "hy_v4_vl": dict(
        since="5.24",
        overrides={
            "text_config.rope_parameters": MROPE,
            "text_config.indexer_types": ["full", "shared"] * 2,
            "vision_config.max_image_size": 2 * IMAGE_SIZE,
        },
        image_inputs="patches",
        image_tokens=_around(6),
        token_types=MM_TYPES,
    ),
    "hyperclovax_vision_v2": dict(image_inputs="patch_pairs"),
    "idefics": dict(image_inputs="idefics", image_tokens=[START, IMAGE, START], blank_images=True),
    "idefics2": dict(
        overrides={"perceiver_config.resampler_n_latents": 4, "perceiver_config.resampler_head_dim": 16},
        image_inputs="pixels_of_rows",
        image_tokens=[START, *[IMAGE] * 4, START],
    ),
    "idefics3": dict(image_inputs="pixels_of_rows", image_tokens=[START, *[IMAGE] * 4, START]),
    "inkling2": dict(image_inputs="inkling2"),
    "inkling2_loop": dict(
        since="5.24",
        overrides={
            "text_config.n_layers_per_attn_res_block": 1,
            "text_config.loop_layer_index_start": 1,
            "text_config.loop_layer_index_end": 3,
            "text_config.loop_gate_rank": 16,
        },
        image_inputs="inkling2",
    ),
    "inkling_mm_model": dict(overrides={"vision_config.patch_size": IMAGE_SIZE // 2}, image_inputs="inkling"),
    "instructblip": dict(
        overrides={"image_token_index": IMAGE, "qformer_config.vocab_size": VOCAB_SIZE},
        image_inputs="instructblip",
        image_tokens=[IMAGE] * 4,
        one_image_per_row="its Q-Former reads the words of a row once, for one image",
        no_text_only_rows="its Q-Former reads the words of a row together with its image",
    ),
    "instructblipvideo": dict(
        overrides={"video_token_index": IMAGE, "qformer_config.vocab_size": VOCAB_SIZE},
        image_inputs="instructblipvideo",
        image_tokens=[IMAGE] * 8,
        one_image_per_row="its Q-Former reads the words of a row once, for one image",
        no_text_only_rows="its Q-Former reads the words of a row together with its image",
    ),
    "internvl": dict(),
    "janus": dict(
        overrides={
            "vq_config.base_channels": 32,
            "vq_config.num_embeddings": 16,
            "vq_config.channel_multiplier": [1, 1],
        },
        image_tokens=_around(16),
    ),
    "kimi_k25": dict(
        overrides={"projection_hidden_size": 32, "text_config.num_key_value_heads": 4}, image_inputs="patch_images"
    ),
    "kosmos-2": dict(
        overrides={"latent_query_num": 4},
        image_inputs="kosmos_2",
        no_text_only_batches="its forward asks for `pixel_values` or `image_embeds`",
    ),
    "kosmos-2.5": dict(
        overrides={"latent_query_num": 4, "vision_config.patch_embed_hidden_size": 3 * PATCH_SIZE**2},
        image_inputs="kosmos_2_5",
    ),
    "lfm2_vl": dict(
        overrides={"text_config.layer_types": ["conv", "full_attention"] * 2},
        image_inputs="lfm2_vl",
    ),
    "lfm3_vl": dict(image_inputs="patch_pairs"),
    "lighton_ocr": dict(image_inputs="sized_pixels", image_tokens=[IMAGE] * 4),
    "llama4": dict(
        overrides={
            "vision_config.intermediate_size": 128,
            "vision_config.projector_input_dim": 64,
            "vision_config.projector_output_dim": 64,
        },
        broken={"5.24": "its forward reads `image_outputs`, which the outputs of its language model do not have"},
    ),
    "llava": dict(image_tokens=[IMAGE] * 16),
    "llava_next": dict(overrides=PINPOINTS, image_inputs="tiles", image_tokens=[IMAGE] * 52),
    "llava_next_video": dict(overrides=PINPOINTS, image_inputs="tiles", image_tokens=[IMAGE] * 52),
    "llava_onevision": dict(overrides=PINPOINTS, image_inputs="llava_onevision", image_tokens=[IMAGE] * 52),
    "minicpm_ocr": dict(overrides={"image_token_id": IMAGE, "insert_layer_id": 0}, image_inputs="minicpm"),
    "minicpmv4_6": dict(
        overrides={"image_token_id": IMAGE, "insert_layer_id": 0}, image_inputs="minicpm", image_tokens=_around(1)
    ),
    "minicpmv4_7": dict(
        overrides={"image_token_id": IMAGE, "insert_layer_id": 0},
        image_inputs="minicpm",
        image_tokens=_around(1),
        token_types=MM_TYPES,
    ),
    # Left padding shifts its blocks of keys, a TODO of its modelling file: the default of 128 keys holds whole prompts.
    "minimax_m3_vl": dict(image_inputs="patch_pairs"),
    "mistral3": dict(image_inputs="sized_pixels", image_tokens=[IMAGE, IMAGE, UNUSED, IMAGE, IMAGE, END]),
    "mistral4": dict(
        overrides={"head_dim": 32, "num_key_value_heads": 4},
        image_tokens=[],
        text_only="the class that transformers maps to it is a language model without a vision tower",
    ),
    "mistral_large4": dict(
        overrides={"text_config.num_key_value_heads": 4},
        image_inputs="sized_pixels",
        image_tokens=[IMAGE, IMAGE, UNUSED, IMAGE, IMAGE, END],
    ),
    "mllama": dict(
        overrides={
            "vision_config.intermediate_layers_indices": [0, 1],
            "vision_config.vision_output_dim": 96,
            "text_config.cross_attention_layers": [1, 3],
        },
        image_inputs="mllama",
        image_tokens=[IMAGE],
        filling_matters="a token before the first image attends evenly to all images of its row, filling included",
    ),
    "molmo2": dict(
        overrides={"adapter_config.vision_feature_layer": [1, 0], "vision_config.num_position_embeddings": 16},
        image_inputs="molmo2",
        token_types={"mm_token_type_ids": [IMAGE, START, END]},
    ),
    "muse_glimmer": dict(overrides={"out_hidden_size": 128}, image_inputs="patch_pairs"),
    "muse_spark": dict(
        overrides={
            "text_config.qk_scale_factor": 1.0,  # its 5.5 makes attention so sharp that rounding shows
            "out_hidden_size": 128,
            "audio_config.patch_sizes": [16],
            "audio_config.hidden_sizes": [32],
            "audio_config.depths": [1],
        },
        image_inputs="patch_pairs",
    ),
    "nemotron_h_omni": dict(
        overrides={
            "vision_hidden_size": 32,
            "vision_config.max_img_size": 2 * IMAGE_SIZE,
            "vision_config.video_temporal_patch_size": 2,
            "text_config.layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "img_context_token_id": IMAGE,
        },
        image_inputs="nemotron",
    ),
    "ovis2": dict(
        overrides={"hidden_size": HIDDEN_SIZE, "visual_indicator_token_ids": [140, 141, 142, 143, 144]},
        image_tokens=[140, *[IMAGE] * 16, 142, 141],
    ),
    "paddleocr_vl": dict(
        overrides={"text_config.rope_parameters": MROPE}, image_inputs="patch_images", token_types=MM_TYPES
    ),
    "paligemma": dict(
        overrides={"projection_dim": HIDDEN_SIZE}, image_tokens=[IMAGE] * 16, token_types={"token_type_ids": []}
    ),
    "perception_lm": dict(
        overrides={
            "vision_config.architecture": "vit_pe_core_large_patch14_336",
            "vision_config.model_args": {"embed_dim": 32},
            "vision_use_cls_token": False,
        },
        image_inputs="tiled_pixels",
        image_tokens=[IMAGE] * 4,
    ),
    "pi0": dict(refused="it denoises the actions of a robot and has no tokens to answer with"),
    "pix2struct": dict(
        overrides={
            "text_config": {"vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN_SIZE, **T5},
            "vision_config": {"hidden_size": 32, "patch_embed_hidden_size": 32, "seq_len": 64, **T5},
        },
        refused=ENCODER_DECODER,
    ),
    "pp_chart2table": dict(image_tokens=_around(1)),
    "pp_formulanet": dict(
        overrides={
            "vision_config.post_conv_mid_channels": 16,
            "vision_config.post_conv_out_channels": 32,
            "vision_config.decoder_hidden_size": HIDDEN_SIZE,
        },
        refused=ENCODER_DECODER,
    ),
    "qianfan_ocr": dict(),
    "qwen2_5_omni_thinker": dict(
        overrides={"text_config.rope_parameters": MROPE, "vision_start_token_id": START}, image_inputs="patch_pairs"
    ),
    "qwen2_5_vl": dict(
        overrides={"text_config.rope_parameters": MROPE}, image_inputs="patch_pairs", token_types=MM_TYPES
    ),
    "qwen2_vl": dict(
        overrides={"text_config.rope_parameters": MROPE, "vision_config.hidden_size": HIDDEN_SIZE},
        image_inputs="patch_pairs",
        token_types=MM_TYPES,
    ),
    "qwen3_5": dict(
        overrides={"text_config.rope_parameters": MROPE_FULL}, image_inputs="patch_pairs", token_types=MM_TYPES
    ),
    "qwen3_5_moe": dict(
        overrides={"text_config.rope_parameters": MROPE_FULL}, image_inputs="patch_pairs", token_types=MM_TYPES
    ),
    "qwen3_omni_moe_thinker": dict(
        overrides={"text_config.rope_parameters": MROPE_INTERLEAVED, "vision_start_token_id": START},
        image_inputs="patch_pairs",
    ),
    "qwen3_vl": dict(
        overrides={"text_config.rope_parameters": MROPE_INTERLEAVED}, image_inputs="patch_pairs", token_types=MM_TYPES
    ),
    "qwen3_vl_moe": dict(
        overrides={"text_config.rope_parameters": MROPE_INTERLEAVED}, image_inputs="patch_pairs", token_types=MM_TYPES
    ),
    "qwen4_exp": dict(
        overrides={
            "text_config.rope_parameters": MROPE_FULL,
            "text_config.indexer_n_heads": 2,
            "text_config.indexer_kv_heads": 1,
            "text_config.indexer_head_dim": 16,
            "text_config.indexer_budget": 512,
            "text_config.indexer_compress_ratio": 4,
        },
        image_inputs="patch_pairs",
        token_types=MM_TYPES,
    ),
    "shieldgemma2": dict(token_types={"token_type_ids": [IMAGE]}),
    "smolvlm": dict(image_inputs="pixels_of_rows", image_tokens=[START, *[IMAGE] * 4, START]),
    "step3p7": dict(overrides={"text_config.sliding_window": 8}, image_inputs="global_views", image_tokens=_around(1)),
    "t5gemma2": dict(refused=ENCODER_DECODER),
    "udop": dict(overrides={**T5, "max_2d_position_embeddings": 64}, refused=ENCODER_DECODER),
    "unlimited_ocr": dict(
        overrides={"vision_config.sam_config.downsample_channels": [16, 32]},
        image_inputs="unlimited_ocr",
        image_tokens=[IMAGE] * 3,
    ),
    "video_llama_3": dict(image_inputs="video_llama_3"),
    "video_llava": dict(image_tokens=[IMAGE] * 16),
    "vipllava": dict(overrides={"vision_feature_layer": [-1, -2]}, image_tokens=[IMAGE] * 16),
    "vision-encoder-decoder": dict(refused=ENCODER_DECODER),
}
