"""How modules are named in the wild: the rules by which a place gets its role. Data and pure functions; no table per model.

A role is decided from the last parts of a module's path, read inside the container it lives in (attention, MLP, or neither).
The same word means different things in different containers ("dense", "proj", "wo", "c_proj"), hence three lists. Structure
(class, position, shapes) is read in `survey.py` and overrules names where both speak.
"""

from __future__ import annotations

import re

CATEGORY = {
    **dict.fromkeys(("q", "k", "v", "o", "qkv", "kv"), "attention"),
    **dict.fromkeys(("gate", "up", "down", "gate_up", "router", "o_down"), "mlp"),
    **dict.fromkeys(("norm", "q_norm", "k_norm"), "norm"),
    **dict.fromkeys(("embed", "position", "patch", "token", "type", "condition"), "embedding"),
    "head": "head",
    "conv": "conv",
    **dict.fromkeys(("time", "modulation", "projector", "proj", "scale", "other"), "other"),
}
ROLES = tuple(CATEGORY)
CATEGORIES = ("attention", "mlp", "norm", "embedding", "head", "conv", "other")


def _tail(names: str) -> re.Pattern:
    """One of these at the end of a dotted path; spaces separate, `a.b` asks for the parent too."""
    return re.compile(r"(^|\.)(" + "|".join(n.replace(".", r"\.") for n in names.split()) + r")$")


IN_ATTENTION = (
    ("qkv", _tail("qkv qkv_proj to_qkv to_added_qkv c_attn query_key_value Wqkv wqkv W_pack in_proj in_proj_weight")),
    ("kv", _tail("kv kv_proj to_kv key_value kv_a_proj_with_mqa kv_b_proj")),
    ("q", _tail("q q_proj query query_proj to_q wq Wq q_lin q_attn linear_q q_a_proj q_b_proj add_q_proj")),
    ("k", _tail("k k_proj key key_proj to_k wk Wk k_lin linear_k add_k_proj")),
    ("v", _tail("v v_proj value value_proj to_v wv Wv v_lin linear_v add_v_proj")),
    ("o", _tail("o o_proj out_proj output_proj c_proj dense proj to_out to_out.0 to_add_out wo Wo out_lin linear_out")),
)
IN_MLP = (
    ("router", _tail("router router.gate router.classifier router.layer shared_expert_gate gate.wg")),
    ("gate_up", _tail("gate_up_proj gate_up w12 weights_in Wi")),
    ("gate", _tail("gate_proj wi_0 gate linear_gate")),
    ("up", _tail("up_proj fc1 fc_in c_fc wi wi_1 w3 dense_h_to_4h intermediate.dense lin1 linear1 linear_in net.0.proj "
                 "proj_mlp ff_proj intermediate_dense up")),
    ("down", _tail("down_proj fc2 fc_out c_proj wo w2 dense_4h_to_h output.dense lin2 linear2 linear_out net.2 output_dense "
                   "ff_out down weights_out Wo")),
)

ATTENTION_NAME = re.compile(r"attn|attention", re.I)
ATTENTION_CLASS = re.compile(r"Attention\w*$|Attn\w*$")
NOT_ATTENTION = re.compile(r"Block|Layer|Model|Encoder|Decoder|Down|Up|Mid|Transformer|Pooling", re.I)
MLP_NAME = re.compile(r"^(mlp|ffn?|ff_context|feed_?forward|(shared_)?experts?|intermediate|\w*_mlp)$|DenseReluD|moe", re.I)
MLP_CLASS = re.compile(r"MLP|FeedForward|FFN|Experts|Expert$|Intermediate|DenseGatedAct|DenseAct|SparseMoe")
CROSS = re.compile(r"cross|encoder_attn|EncDec|encoder_decoder", re.I)
CONTEXT_STREAM = re.compile(r"add_[qkv]_proj|to_add_out|norm_added_|ff_context|norm\w*_context|to_added_qkv")

POSITION = re.compile(r"pos(ition|itions|itional)?(_|$)|wpe|relative_attention_bias|rel_pos|(^|_)pos(_|$)|(^|_)position", re.I)
TYPE = re.compile(r"token_type|segment", re.I)
TOKEN = re.compile(r"(cls|mask|dist\w*|class|reg\w*|query|latent)s?_(token|embedding)s?|probe|class_embedding|latents$", re.I)
PATCH = re.compile(r"patch|x_embedder", re.I)
TIME = re.compile(r"^time|timestep|^temb|time_emb", re.I)
CONDITION = re.compile(r"class_embed|text_embedder|context_embedder|guidance_embed|add_embedding|caption_proj|label_emb|"
                       r"encoder_hid_proj|image_embedder|pooled|y_embedder", re.I)
MODULATION = re.compile(r"norm\w*\.linear$|modulation|ada_?ln|scale_shift_table|proj_out_1$", re.I)
SCALE = re.compile(r"logit_(scale|bias)|layer_?scale|lambda|gamma$|(^|\.)scale$", re.I)
PROJECTOR = re.compile(r"projector|merger|connector|aligner", re.I)
HEAD = re.compile(r"^(lm_head|head|heads|cls|classifier|score|qa_outputs|proj_out\w*|conv_out|final_layer|visual_projection|"
                  r"text_projection|generator|predictions|pooler|fc|vocab_transform)$")
EMBEDDINGS = re.compile(r"embed|pre_?lay|pre_?norm|wte|wpe", re.I)

# Fused weights. Rows of a `query_key_value` are grouped by key head - (kv_heads, heads / kv_heads + 2, head_dim), which for
# as many key heads as heads is (heads, 3, head_dim); all other fused attention weights are whole q, then k, then v.
GROUPED = re.compile(r"(^|\.)(query_key_value|wqkv)$")
# Fused gates are (gate, up) except in these classes and names, which are (up, gate).
UP_FIRST = re.compile(r"^(GEGLU|SwiGLU)$")
UP_FIRST_NAME = re.compile(r"(^|\.)Wi$")

# Execution order of stacks whose definition order says otherwise.
STACK_ORDER = {"mid": 1, "denoiser": 1, "decoder": 2, "up": 2, "single": 2}
_STACK_WORDS = (
    ("down", r"(^|\.)down_blocks"), ("up", r"(^|\.)up_blocks"), ("mid", r"(^|\.)mid_blocks?"),
    ("vision", r"vision|visual|image_(encoder|model)"), ("audio", r"audio"), ("text", r"text_(model|encoder)"),
    ("decoder", r"language_model|decoder"), ("single", r"single_transformer_blocks"),
)


def stack_name(path: str, model_type: str, main_input: str, causal: bool, diffuses: bool, known: bool) -> str:
    """What a stack of blocks is called: by the words on its path, then by what its model eats and how it attends.

    A module of no `known` library keeps its own name for its list.
    """
    words = path + " " + model_type
    for name, pattern in _STACK_WORDS:
        if re.search(pattern, words):
            return name
    if main_input == "pixel_values":
        return "vision"
    if main_input in ("input_values", "input_features") and "encoder" not in path:
        return "audio"
    if diffuses:
        return "denoiser"
    if not known:
        return next((p for p in reversed(path.split(".")) if not p.isdigit()), "blocks")
    if "encoder" in path:
        return "encoder"
    return "decoder" if causal else "encoder"


def role_in(rules, path: str) -> str | None:
    return next((role for role, pattern in rules if pattern.search(path)), None)
