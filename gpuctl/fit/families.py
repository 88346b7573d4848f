"""The layers of each family of models. May import: gpuctl.errors, gpuctl.fit, the standard library.

`Style` is what a family does that its configuration does not say (a bias, a norm on the queries); the table is from
the engine's model definitions (vLLM 0.32, `vllm/model_executor/models`) and from transformers 5.19, whose defaults
stand in where a configuration leaves a field out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpuctl.errors import usage_error
from gpuctl.fit.architecture import (
    Architecture,
    Attention,
    Fields,
    Layer,
    Split,
    Tensor,
    UnknownFamilyError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Style:
    """How a family's layers are made. Biases: None is "as the configuration's attention_bias or mlp_bias says"."""

    qkv_bias: bool | None = None
    o_bias: bool | None = None
    mlp_bias: bool | None = None
    gated: bool = True
    norms: int = 2
    norm_bias: bool = False
    qk_norm: str = ""  # "head": one vector of a head's width; "full": one of all heads' width
    tied: bool = False
    head_bias: bool = False
    experts: str = ""  # how the configuration names the mixture: "" is none
    defaults: Mapping[str, object] | None = None


STYLES: dict[str, Style] = {
    "llama": Style(),
    "mistral": Style(qkv_bias=False, o_bias=False),
    "qwen2": Style(qkv_bias=True, o_bias=False),
    "qwen3": Style(qk_norm="head"),
    "gemma": Style(tied=True),
    "gemma2": Style(norms=4, tied=True),
    "phi3": Style(qkv_bias=False, o_bias=False),
    "granite": Style(),
}


def vector(name: str, width: int, *, copies: int = 1, split: Split = Split.NONE) -> Tensor:
    """A norm's weight or a bias."""
    return Tensor((name,), width, split=split, copies=copies, active=copies)


def attention(f: Fields, style: Style, hidden: int, cache: Attention) -> list[Tensor]:
    """Query, key and value in one, and the output, of multi-head, grouped-query or multi-query attention."""
    queries, kv = cache.heads * cache.key, cache.kv_heads * (cache.key + cache.value)
    bias = f.flag("attention_bias", default=False)
    made = [
        Tensor(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            queries + kv,
            hidden,
            Split.ROWS,
            linear=True,
            kv_rows=kv,
            kv_heads=cache.kv_heads,
        ),
        Tensor(("self_attn.o_proj",), hidden, cache.heads * cache.value, Split.COLUMNS, linear=True),
    ]
    if bias if style.qkv_bias is None else style.qkv_bias:
        made.append(
            Tensor(
                ("self_attn.qkv_bias",), queries + kv, split=Split.ROWS, kv_rows=kv, kv_heads=cache.kv_heads
            )
        )
    if bias if style.o_bias is None else style.o_bias:
        made.append(vector("self_attn.o_bias", hidden))
    if style.qk_norm == "head":
        made += [vector("self_attn.q_norm", cache.key), vector("self_attn.k_norm", cache.key)]
    elif style.qk_norm == "full":
        made += [vector("self_attn.q_norm", queries), vector("self_attn.k_norm", cache.kv_heads * cache.key)]
    return made


def mlp(f: Fields, style: Style, hidden: int, inner: int, name: str = "mlp") -> list[Tensor]:
    """A dense feed-forward layer; gate and up in one."""
    names = (f"{name}.gate_proj", f"{name}.up_proj") if style.gated else (f"{name}.up_proj",)
    made = [
        Tensor(names, len(names) * inner, hidden, Split.ROWS, linear=True),
        Tensor((f"{name}.down_proj",), hidden, inner, Split.COLUMNS, linear=True),
    ]
    if f.flag("mlp_bias", default=False) if style.mlp_bias is None else style.mlp_bias:
        made += [
            vector(f"{name}.up_bias", len(names) * inner, split=Split.ROWS),
            vector(f"{name}.bias", hidden),
        ]
    return made


def norms(style: Style, hidden: int) -> list[Tensor]:
    """A layer's norms over its width."""
    return [vector("norm", hidden * (2 if style.norm_bias else 1))] * style.norms


def build(f: Fields) -> Architecture:
    """The architecture of a configuration, by its model_type."""
    model_type = f.text("model_type")
    if not model_type:
        raise usage_error(f"{f.what}: model_type is missing", hint="Is it the config.json of a model?")
    style = STYLES.get(model_type)
    if style is None:
        raise UnknownFamilyError(f"{f.what}: model_type {model_type!r} is not known to gpuctl")
    hidden, heads = f.count("hidden_size"), f.count("num_attention_heads")
    kv_heads = f.count("num_key_value_heads", default=heads)
    width = f.count("head_dim", default=max(1, hidden // heads))
    inner, vocabulary = f.count("intermediate_size"), f.count("vocab_size")
    count, context = f.count("num_hidden_layers"), f.count("max_position_embeddings")
    cache = Attention(heads, kv_heads, width, width)
    layer = Layer(
        (*norms(style, hidden), *attention(f, style, hidden, cache), *mlp(f, style, hidden, inner)), cache
    )
    tied = f.flag("tie_word_embeddings", default=style.tied)
    embedding = Tensor(("model.embed_tokens",), vocabulary, hidden, Split.VOCABULARY)
    head = Tensor(("lm_head",), vocabulary, hidden, Split.VOCABULARY)
    rotary = Tensor(("rotary",), context, width)
    return Architecture(
        model_type=model_type,
        family="dense",
        hidden=hidden,
        vocabulary=vocabulary,
        heads=heads,
        intermediate=inner,
        layers=(layer,) * count,
        first=(embedding, rotary),
        last=(vector("model.norm", hidden), *(() if tied else (head,))),
        beside=(),
        tied=tied,
        element_bytes=2,
        context=context,
    )
