"""Which of transformers' classes are built so that fusing is safe: what reads a norm, what an MLP computes, …

A table, not a guess; and :mod:`hwkern._probe` runs every block both ways before a fusion stays. Keys are class names:
only classes of ``transformers.models`` are looked up here (and torch's own norms and activations).
"""

from __future__ import annotations

from dataclasses import dataclass

from hwkern._fold import STRUCTURES

_LLAMA = STRUCTURES["LlamaDecoderLayer"]
#: Class of block → (norm, the layers that read it and are all that do). Smoothing's table, and blocks whose norm can be
#: computed but not divided (Gemma's weight is 1 + w) or has one reader.
BLOCKS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    **STRUCTURES,
    "GemmaDecoderLayer": _LLAMA,
    "GraniteDecoderLayer": _LLAMA,
    "Phi3DecoderLayer": (
        ("input_layernorm", ("self_attn.qkv_proj",)),
        ("post_attention_layernorm", ("mlp.gate_up_proj",)),
    ),
    **dict.fromkeys(
        ("CLIPEncoderLayer", "SiglipEncoderLayer"),
        (
            ("layer_norm1", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("layer_norm2", ("mlp.fc1",)),
        ),
    ),
    "PhiDecoderLayer": (  # attention and MLP side by side, after one norm
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")),
    ),
    **dict.fromkeys(
        ("OPTDecoderLayer", "WhisperEncoderLayer", "WhisperDecoderLayer"),
        (
            ("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("final_layer_norm", ("fc1",)),
        ),
    ),
    "T5LayerSelfAttention": (("layer_norm", ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v")),),
    "T5LayerFF": (
        ("layer_norm", ("DenseReluDense.wi",)),
        ("layer_norm", ("DenseReluDense.wi_0", "DenseReluDense.wi_1")),
    ),
    "TransformerBlock": (),  # DistilBERT's
    "BertLayer": (),
    "RobertaLayer": (),
    "XLMRobertaLayer": (),
    "ElectraLayer": (),
}
#: Class of attention → the layers that read its first argument, of which it uses the shape's first dimensions besides.
ATTENTIONS = {
    **dict.fromkeys(
        ("BertSelfAttention", "RobertaSelfAttention", "XLMRobertaSelfAttention", "ElectraSelfAttention"),
        ("query", "key", "value"),
    ),
    "DistilBertSelfAttention": ("q_lin", "k_lin", "v_lin"),
}


@dataclass(frozen=True)
class Mlp:
    """``output(activation(inputs[0](x)) * inputs[1](x))``, or without a second input; or ``inputs[0]`` holds both."""

    inputs: tuple[str, ...]
    activation: str
    output: str
    dropout: str = ""
    gated: bool = True


_GATED = Mlp(("gate_proj", "up_proj"), "act_fn", "down_proj")
_PLAIN = Mlp(("fc1",), "activation_fn", "fc2", gated=False)
MLPS = {
    **dict.fromkeys(("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "GemmaMLP", "GraniteMLP"), _GATED),
    "Phi3MLP": Mlp(("gate_up_proj",), "activation_fn", "down_proj"),
    "GPT2MLP": Mlp(("c_fc",), "act", "c_proj", "dropout", gated=False),
    "FFN": Mlp(("lin1",), "activation", "lin2", "dropout", gated=False),  # DistilBERT's
    "T5DenseActDense": Mlp(("wi",), "act", "wo", gated=False),
    "T5DenseGatedActDense": Mlp(("wi_0", "wi_1"), "act", "wo"),
    **dict.fromkeys(("ViTMLP", "CLIPMLP", "SiglipMLP", "PhiMLP"), _PLAIN),
}
#: Class → (dense layer, its activation), which is all that its forward does.
DENSE = dict.fromkeys(
    ("BertIntermediate", "RobertaIntermediate", "XLMRobertaIntermediate", "ElectraIntermediate", "ViTIntermediate"),
    ("dense", "intermediate_act_fn"),
)
#: Class of norm → (kind as in ops.norm_quantize, attribute with eps, offset).
NORMS = {
    "LayerNorm": ("layer", "eps", 0.0),
    "RMSNorm": ("rms", "eps", 0.0),
    "GemmaRMSNorm": ("rms", "eps", 1.0),
    **dict.fromkeys(
        (
            *("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm", "GraniteRMSNorm"),
            "T5LayerNorm",
        ),
        ("rms_rounded", "variance_epsilon", 0.0),
    ),
}
#: Class of activation → its name in ops; those with one formula in several spellings are compared by the probe.
ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "ReLU": "relu",
}
#: Class of block → its attention, second norm and MLP: h = x + attention(norm(x)); h + mlp(second(h)), where x comes
#: first and everything else by name, which goes to the attention. Smoothing's first norm is the first.
_RESIDUALS = ("self_attn", "post_attention_layernorm", "mlp")
RESIDUALS = dict.fromkeys(
    ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "GemmaDecoderLayer"),
    _RESIDUALS,
)
#: Model whose `layers` are those of RESIDUALS: their attention is causal, within config.sliding_window if there is one.
DECODERS = dict.fromkeys(("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "GemmaModel"))
