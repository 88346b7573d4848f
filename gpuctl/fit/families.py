"""The layers of each family of models. May import: gpuctl.errors, gpuctl.fit, the standard library.

`Style` is what a family does that its configuration does not say (a bias, a norm on the queries); the tables are from
the engine's model definitions (vLLM 0.32, `vllm/model_executor/models`) and from transformers 5.19, whose defaults
stand in where a configuration leaves a field out (transformers writes only what differs).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from gpuctl.errors import usage_error
from gpuctl.fit.architecture import (
    Architecture,
    Attention,
    Experts,
    Latent,
    Layer,
    Split,
    Tensor,
    UnknownFamilyError,
)
from gpuctl.fit.fields import Fields

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ELEMENT_BYTES = {
    "float32": 4,  # which the engine runs as bfloat16 unless told otherwise
    "float16": 2,
    "bfloat16": 2,
    "half": 2,
    "float": 4,
    "float8_e4m3fn": 2,  # the weights say so; what is computed with is bfloat16
    "int8": 2,
    "uint8": 2,
}

# Layers of an ordinary decoder, as `layer_types` has them; what a sparse one leaves out is not left out of the cache.
_KINDS = {"full_attention", "sliding_attention", "chunked_attention", "deepseek_sparse_attention"}
_STRETCH = 10_000  # how much longer than trained a context can be made: no model is near


@dataclass(frozen=True)
class Style:
    """How a family's layers are made. A bias that is None is there if `attention_bias` or `mlp_bias` says so."""

    qkv_bias: bool | None = None
    o_bias: bool | None = None
    mlp_bias: bool | None = None
    gated: bool = True
    norms: int = 2
    norm_bias: bool = False
    norm_weight: bool = True
    qk_norm: str = (
        ""  # "head": one vector of a head's width; "full": one of all heads' width; "heads": one a head
    )
    tied: bool = False
    head_bias: bool = False
    sinks: bool = False  # a learned logit for each head
    positions: int = 0  # learned positions, and how many rows more than the context they have
    pattern: str = ""  # which layers have a window, where the configuration has no layer_types
    expert_bias: bool = False
    router_bias: bool = False  # added to the router's choice, in float32
    gated_shared: bool = False
    narrow: bool = False  # experts are not as wide as intermediate_size, so their own width has to be there


_QWEN3 = Style(qk_norm="head", o_bias=False)
STYLES: dict[str, Style] = {
    "llama": Style(),
    "aquila": Style(),
    "arcee": Style(gated=False),
    "apertus": Style(gated=False, qk_norm="head"),
    "baichuan": Style(qkv_bias=False, o_bias=False),
    "bailing_moe": Style(),
    "cohere": Style(norms=1, tied=True),
    "cohere2": Style(norms=1, tied=True, pattern="cohere2"),
    "cwm": Style(),
    "deepseek": Style(),
    "dots1": Style(narrow=True, qk_norm="head", router_bias=True),
    "ernie4_5": Style(qkv_bias=False, o_bias=False, mlp_bias=False, tied=True),
    "ernie4_5_moe": Style(
        narrow=True, qkv_bias=False, o_bias=False, mlp_bias=False, tied=True, router_bias=True
    ),
    "exaone": Style(qkv_bias=False, o_bias=False),
    "exaone4": Style(qk_norm="head", pattern="exaone4"),
    "gemma": Style(tied=True),
    "gemma2": Style(norms=4, tied=True, pattern="even"),
    "gemma3_text": Style(norms=4, tied=True, qk_norm="head", pattern="gemma3"),
    "glm": Style(qkv_bias=None, o_bias=False),
    "glm4": Style(norms=4, o_bias=False),
    "glm4_moe": Style(narrow=True, o_bias=False, router_bias=True, qk_norm="flag"),
    "gpt_bigcode": Style(
        qkv_bias=True, o_bias=True, mlp_bias=True, gated=False, norm_bias=True, tied=True, positions=1
    ),
    "gpt_neox": Style(qkv_bias=True, o_bias=True, mlp_bias=True, gated=False, norm_bias=True),
    "gpt_oss": Style(sinks=True, expert_bias=True, pattern="even"),
    "gpt2": Style(
        qkv_bias=True, o_bias=True, mlp_bias=True, gated=False, norm_bias=True, tied=True, positions=1
    ),
    "granite": Style(),
    "granitemoe": Style(),
    "granitemoeshared": Style(),
    "helium": Style(),
    "hunyuan_v1_dense": Style(qk_norm="head", tied=True),
    "hunyuan_v1_moe": Style(qk_norm="head", tied=True),
    "internlm2": Style(),
    "internlm3": Style(),
    "llama4_text": Style(pattern="llama4", o_bias=None),
    "mimo": Style(qkv_bias=True, o_bias=False),
    "mimo_v2_flash": Style(narrow=True, sinks=True, router_bias=True, pattern="mimo", o_bias=False),
    "minicpm": Style(),
    "minimax_m2": Style(qk_norm="full", router_bias=True),
    "ministral": Style(qkv_bias=False, o_bias=False, pattern="all"),
    "ministral3": Style(qkv_bias=False, o_bias=False, pattern="all"),
    "mistral": Style(qkv_bias=False, o_bias=False, pattern="all"),
    "mixtral": Style(qkv_bias=False, o_bias=False, pattern="all"),
    "nemotron": Style(gated=False, norm_bias=True),
    "olmo": Style(norm_weight=False),
    "olmo2": Style(qk_norm="full"),
    "olmo3": Style(qk_norm="full", pattern="olmo3"),
    "olmoe": Style(qk_norm="full"),
    "opt": Style(
        qkv_bias=True, o_bias=True, mlp_bias=True, gated=False, norm_bias=True, tied=True, positions=3
    ),
    "orion": Style(norm_bias=True),
    "phi": Style(
        qkv_bias=True, o_bias=True, mlp_bias=True, gated=False, norms=1, norm_bias=True, head_bias=True
    ),
    "phi3": Style(qkv_bias=False, o_bias=False, pattern="all"),
    "phimoe": Style(norm_bias=True, head_bias=True, pattern="all"),
    "qwen2": Style(qkv_bias=True, o_bias=False),
    "qwen2_moe": Style(narrow=True, qkv_bias=True, o_bias=False, gated_shared=True),
    "qwen3": _QWEN3,
    "qwen3_moe": Style(qk_norm="head", o_bias=False, narrow=True),
    "seed_oss": Style(),
    "smollm3": Style(tied=True),
    "solar": Style(),
    "stablelm": Style(norm_bias=True),
    "starcoder2": Style(gated=False, norm_bias=True, tied=True, pattern="all"),
    "step3p5": Style(narrow=True, qk_norm="head", router_bias=True),
    "step3p7": Style(narrow=True, qk_norm="head", router_bias=True),
}
_QWEN3_VL = _QWEN3
SAME: dict[str, str] = {
    "code_llama": "llama",
    "gemma3": "gemma3_text",
    "iquestcoder": "llama",
    "mistral3": "mistral",
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_audio": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_omni_moe_text": "qwen3_moe",
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe_text": "qwen3_5",
    "qwen3_5_moe": "qwen3_5",
    "glm4v_text": "glm4",
    "glm4v_moe_text": "glm4_moe",
    "gemma4_text": "gemma4",
    "llama4": "llama4_text",
    "minimax_m3_vl_text": "minimax_m3",
    "minimax_m3_vl": "minimax_m3",
    "kimi_k2": "deepseek_v3",
    "deepseek_v32": "deepseek_v3",
    "glm_moe_dsa": "deepseek_v3",
    "glm4_moe_lite": "deepseek_v3",
    "mistral4": "deepseek_v3",
    "deepseek_ref": "deepseek_v4",
    "mixtral_moe": "mixtral",
}

# What transformers leaves out of a file because it is the default of the type's configuration class (5.19).
DEFAULTS: dict[str, dict[str, object]] = {
    "gemma": {"head_dim": 256, "vocab_size": 256000},
    "gemma2": {"head_dim": 256, "sliding_window": 4096, "vocab_size": 256000},
    "gemma3_text": {
        "head_dim": 256,
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
    },
    "gpt_oss": {"attention_bias": True, "sliding_window": 128, "num_experts_per_tok": 4},
    "glm": {"attention_bias": True, "head_dim": 128},
    "glm4": {"attention_bias": True, "head_dim": 128},
    "phi3": {"max_position_embeddings": 4096},
    "starcoder2": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"head_dim": 128},
    "qwen3_5": {"vocab_size": 248320, "head_dim": 256, "attn_output_gate": True},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {"shared_expert_intermediate_size": 5632, "moe_intermediate_size": 1408},
    "mistral": {"vocab_size": 32000, "num_key_value_heads": 8},
    "olmoe": {"num_experts": 64, "num_experts_per_tok": 8},
}


# What a decoder of a type that is not in the tables has to say of itself to be taken as an ordinary one.
_ORDINARY = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


# What begins the names of fields of models that keep something else than keys and values.
_STATEFUL = ("mamba", "ssm", "linear_", "conv", "rwkv", "kda", "time_mix")


def _is_extraordinary(f: Fields) -> bool:
    """Whether the fields speak of layers that an ordinary decoder does not have."""
    kinds = {str(kind) for kind in f.items("layer_types") or ()}
    if kinds - {"full_attention", "sliding_attention"}:
        return True
    return any(name.startswith(_STATEFUL) and f.get(name) is not None for name in f.config)


@dataclass
class Parts:
    """What a builder has made of a decoder, before towers are put beside it."""

    hidden: int
    vocabulary: int
    heads: int
    intermediate: int
    layers: tuple[Layer, ...]
    first: list[Tensor]
    last: list[Tensor]
    tied: bool
    context: int | None
    family: str = "dense"
    experts: Experts | None = None
    assumptions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Mixture:
    """The experts of a model, and which layers have them."""

    count: int
    active: int
    inner: int
    shared: int  # width of the shared experts together
    layers: frozenset[int]
    width: int  # what the experts take in and give out; the model's width but for latent experts

    @property
    def experts(self) -> Experts:
        return Experts(self.count, self.active, self.inner, self.width)


def vector(name: str, width: int, *, split: Split = Split.NONE, fixed: int | None = None) -> Tensor:
    """A norm's weight, a bias, or what else has one number for each place."""
    return Tensor((name,), width, split=split, fixed_bytes=fixed)


def linear(name: str, rows: int, columns: int, split: Split = Split.NONE) -> Tensor:
    """A linear layer's weight."""
    return Tensor((name,), rows, columns, split, linear=True)


def attention(
    f: Fields, style: Style, hidden: int, cache: Attention, *, gate: bool = False, prefix: str = "self_attn"
) -> list[Tensor]:
    """Query, key and value in one, and the output. `gate`: the query's matrix also makes a gate for the output."""
    queries, kv = cache.heads * cache.key * (2 if gate else 1), cache.kv_heads * (cache.key + cache.value)
    bias = f.flag("attention_bias", "qkv_bias", "use_qkv_bias", default=False)
    qkv = Tensor(
        tuple(f"{prefix}.{name}" for name in ("q_proj", "k_proj", "v_proj")),
        queries + kv,
        hidden,
        Split.ROWS,
        linear=True,
        kv_rows=kv,
        kv_heads=cache.kv_heads,
    )
    made = [qkv, linear(f"{prefix}.o_proj", hidden, cache.heads * cache.value, Split.COLUMNS)]
    if bias if style.qkv_bias is None else style.qkv_bias:
        made.append(
            Tensor(
                (f"{prefix}.qkv_bias",), queries + kv, split=Split.ROWS, kv_rows=kv, kv_heads=cache.kv_heads
            )
        )
    if bias if style.o_bias is None else style.o_bias:
        made.append(vector(f"{prefix}.o_bias", hidden))
    kind = style.qk_norm
    if kind == "flag":
        kind = "head" if f.flag("use_qk_norm") else ""
    if kind == "head":
        made += [vector("q_norm", cache.key), vector("k_norm", cache.key)]
    elif kind == "full":
        made += [
            vector("q_norm", cache.heads * cache.key, split=Split.ROWS),
            vector("k_norm", cache.kv_heads * cache.key, split=Split.ROWS),
        ]
    if style.sinks:
        made.append(vector("sinks", cache.heads, split=Split.ROWS))
    return made


def feed_forward(f: Fields, style: Style, hidden: int, inner: int, name: str = "mlp") -> list[Tensor]:
    """A dense feed-forward layer; gate and up in one."""
    names = (f"{name}.gate_proj", f"{name}.up_proj") if style.gated else (f"{name}.up_proj",)
    made = [
        Tensor(names, len(names) * inner, hidden, Split.ROWS, linear=True),
        linear(f"{name}.down_proj", hidden, inner, Split.COLUMNS),
    ]
    if f.flag("mlp_bias", default=False) if style.mlp_bias is None else style.mlp_bias:
        made += [
            vector(f"{name}.up_bias", len(names) * inner, split=Split.ROWS),
            vector(f"{name}.down_bias", hidden),
        ]
    return made


def expert_layer(f: Fields, style: Style, hidden: int, mix: Mixture, prefix: str = "mlp") -> list[Tensor]:
    """A mixture of experts: the router, all experts in two tensors, and the shared ones."""
    outer = mix.width
    gates = 2 if style.gated else 1
    names = ("gate_proj", "up_proj") if style.gated else ("up_proj",)
    many, taken = mix.count, mix.active
    made = [
        Tensor((f"{prefix}.gate",), mix.count, hidden),
        Tensor(
            tuple(f"{prefix}.experts.0.{name}" for name in names),
            gates * mix.inner,
            outer,
            Split.ROWS,
            linear=True,
            copies=many,
            active=taken,
        ),
        Tensor(
            (f"{prefix}.experts.0.down_proj",),
            outer,
            mix.inner,
            Split.COLUMNS,
            linear=True,
            copies=many,
            active=taken,
        ),
    ]
    if outer != hidden:
        made += [
            linear(f"{prefix}.fc1_latent_proj", outer, hidden),
            linear(f"{prefix}.fc2_latent_proj", hidden, outer),
        ]
    if style.router_bias:
        made.append(vector(f"{prefix}.gate.e_score_correction_bias", mix.count, fixed=4))
    if style.expert_bias:
        made += [
            vector(f"{prefix}.router.bias", mix.count),
            Tensor(("up_bias",), gates * mix.inner, split=Split.ROWS, copies=many, active=taken),
            Tensor(("down_bias",), outer, copies=many, active=taken),
        ]
    if mix.shared:
        name = "shared_expert" if style.gated_shared else "shared_experts"
        made += feed_forward(f, style, hidden, mix.shared, f"{prefix}.{name}")
        if style.gated_shared:
            made.append(Tensor((f"{prefix}.shared_expert_gate",), 1, hidden))
    return made


def norms(style: Style, hidden: int) -> list[Tensor]:
    """A layer's norms over its width."""
    if not style.norm_weight:
        return []
    return [vector("norm", hidden * (2 if style.norm_bias else 1))] * style.norms


def mixture(f: Fields, count: int, hidden: int, inner: int, *, narrow: bool = False) -> Mixture | None:
    """The experts, as the many names for them have it; None in a dense model.

    `inner` is their width where they have none of their own, which `narrow` ones must have.
    """
    experts = f.number("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    if experts < 2:
        if f.has("num_experts_per_tok", "moe_intermediate_size") and "moe" in f.text("model_type").lower():
            f.count("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
        return None
    active = f.count(
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_k",
        "moe_topk",
        "top_k_experts",
        "num_selected_experts",
    )
    if active > experts:
        raise f.wrong("num_experts_per_tok", active, f"no more than the {experts} experts can be taken")
    width = f.count(
        "moe_intermediate_size",
        "expert_ffn_hidden_size",
        "expert_intermediate_size",
        default=None if narrow else inner,
    )
    shared = f.number(
        "shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "shared_intermediate_size",
        "share_expert_dim",
    )
    many = f.number("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
    if f.has("interleave_moe_layer_step"):  # Llama 4: one shared expert as wide as each of the others
        shared = width
    elif f.has("moe_shared_expert_intermediate_size"):
        shared *= max(1, many)
    elif not shared:
        shared = many * width
    latent = f.number("moe_latent_size", "routed_expert_hidden_size") or hidden
    return Mixture(experts, active, width, shared, frozenset(_sparse_layers(f, count)), latent)


def _sparse_layers(f: Fields, count: int) -> list[int]:
    """Which layers have experts."""
    kinds = f.items("mlp_layer_types")
    if kinds is not None:
        return [i for i, kind in enumerate(kinds[:count]) if kind == "sparse"]
    each = f.get("moe_layer_freq")
    if isinstance(each, list | tuple):
        return [i for i, one in enumerate(each[:count]) if one]
    named = f.items("moe_layers")
    if named is not None:
        return [int(i) for i in named if isinstance(i, int)]
    listed = f.text("moe_layers_enum")
    if listed:
        return [int(i) for i in listed.split(",")]
    first = f.number(
        "first_k_dense_replace", "moe_layer_start_index", "num_dense_layers", "moe_first_k_dense"
    )
    step = f.number("moe_layer_freq", "moe_layer_interval", default=1) or 1
    sparse = f.number("decoder_sparse_step", default=0)
    dense = f.items("mlp_only_layers") or []
    if f.has("interleave_moe_layer_step"):
        step = f.count("interleave_moe_layer_step")
        return list(range(step - 1, count, step))
    if sparse:
        return [i for i in range(count) if (i + 1) % sparse == 0 and i not in dense]
    return [i for i in range(first, count) if i % step == 0 or step == 1]


def _dtype(f: Fields) -> str:
    """In which format the weights are, but for what is quantised; "" where that is left open."""
    for name in ("torch_dtype", "dtype"):
        value = f.get(name)
        if value is None or value in ("", "auto"):
            continue
        bare = value.removeprefix("torch.") if isinstance(value, str) else ""
        if bare not in ELEMENT_BYTES:
            raise f.wrong(name, value, f"one of {', '.join(ELEMENT_BYTES)} is needed")
        return bare
    return ""


def windows(f: Fields, style: Style, count: int) -> list[int | None]:
    """The sliding window of each layer, None where it attends to everything."""
    size = f.number("sliding_window") or None
    kinds = f.items("layer_types")
    if (
        style.pattern == "llama4"
    ):  # chunks, but for the layers without a rotary embedding, which are every fourth
        size = f.number("attention_chunk_size") or None
        turned = f.items("no_rope_layers") or [(i + 1) % 4 for i in range(count)]
        return [size if i < len(turned) and turned[i] else None for i in range(count)]
    if kinds is not None:
        if len(kinds) < count:
            raise f.wrong("layer_types", kinds, f"one for each of the {count} layers is needed")
        strange = {str(kind) for kind in kinds[:count]} - _KINDS
        if strange:
            raise UnknownFamilyError(
                f"{f.what}: {f.path('layer_types')}: gpuctl knows no layer of the kind {min(strange)!r}"
            )
        if "sliding_attention" in kinds[:count]:
            size = f.count("sliding_window")
        return [size if kind == "sliding_attention" else None for kind in kinds[:count]]
    pattern = style.pattern
    if size is None or not pattern:
        if size is not None and f.flag("use_sliding_window"):
            begin = f.number("max_window_layers", default=count)
            return [size if i >= begin else None for i in range(count)]
        return [None] * count
    if pattern == "all":
        return [size] * count
    if pattern == "even":
        return [size if i % 2 == 0 else None for i in range(count)]
    if pattern == "mimo":
        hybrid = f.items("hybrid_layer_pattern") or []
        if len(hybrid) < count:
            raise f.wrong("hybrid_layer_pattern", hybrid, f"one for each of the {count} layers is needed")
        return [size if one else None for one in hybrid[:count]]
    if pattern == "exaone4":
        letters = f.text("sliding_window_pattern") or "LLLG"
        return [size if letters[i % len(letters)] == "L" else None for i in range(count)]
    each = f.count(
        "sliding_window_pattern",
        "_sliding_window_pattern",
        default={"gemma3": 6, "cohere2": 4, "olmo3": 4}[pattern],
    )
    return [size if (i + 1) % each else None for i in range(count)]


def rotary(f: Fields, width: int, context: int) -> list[Tensor]:
    """The tables of the rotary embedding: one for each way of turning (vLLM, `layers/rotary_embedding`)."""
    both = [f.table("rope_scaling"), f.table("rope_parameters")]
    scaling: dict[str, object] = {}
    for table in both:
        scaling |= table or {}
    each = [value for value in scaling.values() if isinstance(value, dict)]
    part = scaling.get("partial_rotary_factor", f.get("partial_rotary_factor"))
    turned = int(width * part) if isinstance(part, int | float) and 0 < part <= 1 else width
    if each:  # a table for each kind of layer (Gemma)
        return [Tensor(("rotary",), _rows(f, one, context), turned, parameter=False) for one in each]
    made = [Tensor(("rotary",), _rows(f, scaling, context), turned, parameter=False)]
    if f.has("rope_local_base_freq"):  # layers with a window turn in another way, unscaled
        made.append(Tensor(("rotary",), context, turned, parameter=False))
    return made


def _rows(f: Fields, scaling: Mapping[str, object], context: int) -> int:
    """Positions that a rotary embedding has a row for."""
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
    if factor is None:
        factor = 1
    elif isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= _STRETCH:
        raise f.wrong("rope_scaling.factor", factor, f"a number above 0 and up to {_STRETCH:,} is needed")
    original = scaling.get("original_max_position_embeddings", f.get("original_max_position_embeddings"))
    if scaling.get("mrope_section"):  # of images and films: four times the positions
        return 4 * context
    if kind in ("yarn", "deepseek_yarn") and isinstance(original, int):
        return int(original * factor)
    if kind in ("linear", "dynamic"):
        return int(context * factor)
    if kind in ("longrope", "su") and isinstance(original, int):
        return context + original
    return context


def embeddings(
    f: Fields, style: Style, vocabulary: int, hidden: int
) -> tuple[list[Tensor], list[Tensor], bool]:
    """What stands before the layers, what after them, and whether one matrix serves as both."""
    tied = f.flag("tie_word_embeddings", "tie_embedding", default=style.tied)
    first = [Tensor(("embed_tokens",), vocabulary, hidden, Split.VOCABULARY)]
    last = [vector("norm", hidden * (2 if style.norm_bias else 1))] if style.norm_weight else []
    if not tied:
        last.append(Tensor(("lm_head",), vocabulary, hidden, Split.VOCABULARY))
    if style.head_bias:
        last.append(Tensor(("lm_head.bias",), vocabulary, split=Split.VOCABULARY))
    return first, last, tied


def decoder(f: Fields, style: Style) -> Parts:
    """A decoder of equal layers: multi-head, grouped-query or multi-query attention, dense or with experts."""
    hidden = f.count("hidden_size", "n_embd", "d_model", "word_embed_proj_dim")
    heads = f.count("num_attention_heads", "n_head", "n_heads")
    kv_heads = f.count("num_key_value_heads", "num_kv_heads", "multi_query_group_num", default=heads)
    if f.flag("multi_query") and not f.has("num_key_value_heads"):
        kv_heads = 1
    if heads % kv_heads:
        raise f.wrong(
            "num_key_value_heads", kv_heads, f"the {heads} attention heads are to be divisible by it"
        )
    width = f.number("head_dim", "kv_channels", "attention_head_dim") or hidden // heads
    if width < 1:
        raise f.wrong("num_attention_heads", heads, f"hidden_size {hidden} has no room for as many")
    inner = f.number("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size") or 4 * hidden
    if f.has("intermediate_size_mlp"):
        inner = f.count("intermediate_size_mlp")
    vocabulary = f.count("vocab_size", "padded_vocab_size")
    count = f.count("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    context = context_of(f)
    mix = mixture(f, count, hidden, f.number("intermediate_size") or inner, narrow=style.narrow)
    window = windows(f, style, count)
    value = f.number("v_head_dim") or width
    swa_kv = f.number("swa_num_key_value_heads") or kv_heads
    known: dict[tuple[int | None, bool], Layer] = {}
    layers = []
    for i in range(count):
        sparse = mix is not None and i in mix.layers
        key = (window[i], sparse)
        if key not in known:
            short = window[i] is not None
            chunked = style.pattern == "llama4"
            cache = Attention(heads, swa_kv if short else kv_heads, width, value, window[i], chunked)
            shown = style if short or not f.has("swa_num_key_value_heads") else _without_sinks(style)
            inside = (
                expert_layer(f, style, hidden, mix)
                if mix and sparse
                else feed_forward(f, style, hidden, inner)
            )
            known[key] = Layer(
                (*norms(style, hidden), *attention(f, shown, hidden, cache), *inside), (cache,)
            )
        layers.append(known[key])
    first, last, tied = embeddings(f, style, vocabulary, hidden)
    if style.positions:
        first.append(Tensor(("positions",), (context or 0) + style.positions - 1, hidden))
    elif context:
        first += rotary(f, width, context)
    return Parts(
        hidden,
        vocabulary,
        heads,
        inner,
        tuple(layers),
        first,
        last,
        tied,
        context,
        "moe" if mix else "dense",
        mix.experts if mix else None,
    )


def _without_sinks(style: Style) -> Style:
    return replace(style, sinks=False)


def context_of(f: Fields) -> int | None:
    """The longest context that the model was made for, in tokens."""
    for name in (
        "max_position_embeddings",
        "n_positions",
        "max_seq_len",
        "seq_length",
        "model_max_length",
        "n_ctx",
    ):
        if f.has(name):
            return f.count(name)
    return None


def latent(f: Fields, style: Style) -> Parts:
    """Multi-head latent attention: DeepSeek V2 and V3, Kimi K2, GLM 5, Mistral Large 3.

    The engine keeps, beside the matrix that makes keys and values of the latent, its two halves as it multiplies with
    them (vLLM, `layers/attention/mla_attention.py: process_weights_after_loading`), in the model's own format.
    """
    hidden, heads = f.count("hidden_size"), f.count("num_attention_heads")
    count, vocabulary = f.count("num_hidden_layers"), f.count("vocab_size")
    inner, context = f.count("intermediate_size"), context_of(f)
    mix = mixture(f, count, hidden, inner, narrow=True)
    tensors, cache = latent_attention(f, hidden, heads)
    indexer = index_tensors(f, hidden)
    shared_index = f.items("indexer_types")
    known: dict[tuple[bool, bool], Layer] = {}
    layers = []
    for i in range(count):
        sparse = mix is not None and i in mix.layers
        indexed = bool(indexer) and not (
            shared_index and i < len(shared_index) and shared_index[i] == "shared"
        )
        key = (sparse, indexed)
        if key not in known:
            inside = (
                expert_layer(f, style, hidden, mix)
                if mix and sparse
                else feed_forward(f, style, hidden, inner)
            )
            index = f.number("index_head_dim") if indexed else 0
            kept = replace(cache, index=index + index // 128 * 4)
            known[key] = Layer(
                (*norms(style, hidden), *tensors, *(indexer if indexed else ()), *inside), (kept,)
            )
        layers.append(known[key])
    first, last, tied = embeddings(f, style, vocabulary, hidden)
    if context:
        first += rotary(f, f.count("qk_rope_head_dim"), context)
    experts = mix.experts if mix else None
    return Parts(
        hidden, vocabulary, heads, inner, tuple(layers), first, last, tied, context, "latent", experts
    )


def latent_attention(f: Fields, hidden: int, heads: int) -> tuple[list[Tensor], Latent]:
    """The tensors of latent attention, and what it keeps."""
    rank, turned = f.count("kv_lora_rank"), f.count("qk_rope_head_dim")
    plain, value = f.count("qk_nope_head_dim"), f.count("v_head_dim")
    queries = f.number("q_lora_rank")
    down = Tensor(
        ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
        if queries
        else ("self_attn.kv_a_proj_with_mqa",),
        queries + rank + turned,
        hidden,
        linear=True,
    )
    up = linear(
        "self_attn.q_b_proj" if queries else "self_attn.q_proj",
        heads * (plain + turned),
        queries or hidden,
        Split.ROWS,
    )
    made = [
        down,
        up,
        linear("self_attn.kv_b_proj", heads * (plain + value), rank, Split.ROWS),
        Tensor(("absorbed",), heads * (plain + value), rank, Split.ROWS, parameter=False),
        linear("self_attn.o_proj", hidden, heads * value, Split.COLUMNS),
        vector("kv_a_layernorm", rank),
    ]
    if queries:
        made.append(vector("q_a_layernorm", queries))
    if f.flag("mla_use_output_gate"):
        made.append(linear("self_attn.g_proj", heads * value, hidden, Split.ROWS))
    return made, Latent(heads, rank + turned, expanded=plain + value)


def index_tensors(f: Fields, hidden: int) -> list[Tensor]:
    """The indexer that chooses which tokens a sparse attention sees (DeepSeek V3.2, GLM 5)."""
    if not f.has("index_topk"):
        return []
    heads, width = f.count("index_n_heads"), f.count("index_head_dim")
    return [
        linear("self_attn.indexer.wq_b", heads * width, f.count("q_lora_rank")),
        linear("self_attn.indexer.wk", width, hidden),
        vector("self_attn.indexer.k_norm", 2 * width),
        Tensor(("self_attn.indexer.weights_proj",), heads, hidden),
    ]


def gemma4(f: Fields, style: Style) -> Parts:
    """Gemma 4: layers with a window and layers without have heads of different width, and share caches at the end."""
    hidden, heads = f.count("hidden_size"), f.count("num_attention_heads")
    count, vocabulary = f.count("num_hidden_layers"), f.count("vocab_size")
    width, wide = f.count("head_dim"), f.count("global_head_dim", "head_dim")
    kv, wide_kv = f.count("num_key_value_heads"), f.count("num_global_key_value_heads", "num_key_value_heads")
    inner, context = f.count("intermediate_size"), context_of(f)
    size = f.count("sliding_window")
    kinds = f.items("layer_types")
    sliding = [kind == "sliding_attention" for kind in kinds or ()] or [
        bool((i + 1) % 6) for i in range(count)
    ]
    shared = count - f.number("num_kv_shared_layers")
    mix = mixture(f, count, hidden, inner)
    each = f.number("hidden_size_per_layer_input")
    known: dict[tuple[bool, bool], Layer] = {}
    layers = []
    for i in range(count):
        key = (sliding[i], i >= shared)
        if key not in known:
            cache = (
                Attention(heads, kv, width, width, size)
                if sliding[i]
                else Attention(heads, wide_kv, wide, wide, None)
            )
            doubled = f.flag("use_double_wide_mlp") and i >= shared
            tensors = [*norms(style, hidden), *attention(f, style, hidden, cache)]
            if i >= shared:
                tensors[len(norms(style, hidden))] = linear(
                    "self_attn.q_proj", heads * cache.key, hidden, Split.ROWS
                )
            tensors += feed_forward(f, style, hidden, inner * (2 if doubled else 1))
            if mix:
                tensors += expert_layer(f, style, hidden, mix)
                tensors += [vector("norm", hidden)] * 3 + [vector("router.scale", hidden)]
            if each:
                tensors += [
                    linear("per_layer_input_gate", each, hidden),
                    linear("per_layer_projection", hidden, each),
                    vector("norm", hidden),
                ]
            known[key] = Layer(tuple(tensors), () if i >= shared else (cache,))
        layers.append(known[key])
    first, last, tied = embeddings(f, style, vocabulary, hidden)
    if context:
        first += [
            Tensor(("rotary",), context, width, parameter=False),
            Tensor(("rotary",), context, wide, parameter=False),
        ]
    if each:
        rows = f.number("vocab_size_per_layer_input", default=vocabulary)
        first += [
            Tensor(("embed_tokens_per_layer",), rows, count * each, Split.VOCABULARY),
            linear("per_layer_model_projection", count * each, hidden, Split.ROWS),
            vector("norm", each),
        ]
    return Parts(
        hidden,
        vocabulary,
        heads,
        inner,
        tuple(layers),
        first,
        last,
        tied,
        context,
        "moe" if mix else "dense",
        mix.experts if mix else None,
    )


def build(config: Mapping[str, object], what: str, quantization: Mapping[str, object] | None) -> Architecture:
    """The architecture of a configuration, by its model_type."""
    from gpuctl.fit import hybrids, towers
    from gpuctl.fit import quantization as formats

    f = Fields(config, what)
    outer = f.text("model_type")
    if not outer:
        raise usage_error(f"{what}: model_type is missing", hint="Is it the config.json of a model?")
    text = f.below("text_config", "llm_config", "language_config") or f
    if text.below("text_config"):
        text = text.below("text_config") or text
    model_type = text.text("model_type") or outer
    kind = SAME.get(model_type, model_type)
    text.defaults = DEFAULTS.get(kind, {})
    if text is not f and f.has("tie_word_embeddings") and not text.has("tie_word_embeddings"):
        text.config = {**text.config, "tie_word_embeddings": f.flag("tie_word_embeddings")}
    builders: dict[str, Callable[[Fields, Style], Parts]] = {
        "gemma4": gemma4,
        "deepseek_v2": latent,
        "deepseek_v3": latent,
        **hybrids.BUILDERS,
    }
    own = {
        "gemma4": Style(norms=4, tied=True, qk_norm="head"),
        "deepseek_v3": Style(router_bias=True),
        **hybrids.STYLES,
    }
    known, assumptions = True, []
    style = own.get(kind) or STYLES.get(kind)
    if style is None and kind not in builders:
        if not all(text.has(name) for name in _ORDINARY) or _is_extraordinary(text):
            raise UnknownFamilyError(f"{what}: model_type {model_type!r} is not known to gpuctl")
        known, style = False, Style()
        assumptions.append(
            f"{model_type!r} is not a model type that gpuctl knows: taken as an ordinary decoder"
        )
    parts = builders.get(kind, decoder)(text, style or Style())
    beside = towers.build(f, parts.hidden) if text is not f or f.has("vision_config") else []
    dtype = _dtype(text) or _dtype(f)
    stored = formats.read(f, text, quantization)
    return Architecture(
        model_type=model_type,
        family="multimodal" if beside and parts.family in ("dense", "moe") else parts.family,
        hidden=parts.hidden,
        vocabulary=parts.vocabulary,
        heads=parts.heads,
        intermediate=parts.intermediate,
        layers=parts.layers,
        first=tuple(parts.first),
        last=tuple(parts.last),
        beside=tuple(beside),
        tied=parts.tied,
        element_bytes=2 if dtype not in ELEMENT_BYTES else min(2, ELEMENT_BYTES[dtype]),
        context=parts.context,
        experts=parts.experts,
        quantization=stored,
        image_bytes=towers.image_bytes(f, parts.hidden) if beside else 0,
        drafts=text.number("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules"),
        known=known,
        assumptions=(*assumptions, *parts.assumptions),
    )
