"""Families whose layers are not all alike: recurrences beside attention, and other mixes. Imports: gpuctl.fit, stdlib.

A recurrent layer (Mamba, gated delta net, Kimi delta attention, short convolution) keeps a state of fixed size for
each request instead of something for each token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuctl.errors import usage_error
from gpuctl.fit.architecture import Attention, Cache, Latent, Layer, Recurrent, Split, Tensor
from gpuctl.fit.families import (
    Mixture,
    Parts,
    Style,
    attention,
    context_of,
    embeddings,
    expert_layer,
    feed_forward,
    latent_attention,
    linear,
    mixture,
    norms,
    rotary,
    vector,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpuctl.fit.fields import Fields

_STATE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def _state_bytes(f: Fields, *names: str) -> int | None:
    """Bytes of an element of the state, where the configuration says."""
    return _STATE_BYTES.get(f.text(*names))


def _assemble(
    f: Fields,
    style: Style,
    kinds: Sequence[str],
    make: Callable[[str, int], tuple[list[Tensor], tuple[Cache, ...]]],
    *,
    heads: int,
    inner: int,
    mix: Mixture | None = None,
    turned: int = 0,
    family: str = "hybrid",
) -> Parts:
    """A model of layers of several kinds: those of one kind are made once."""
    hidden, vocabulary, context = f.count("hidden_size"), f.count("vocab_size"), context_of(f)
    known: dict[str, Layer] = {}
    layers = []
    for i, kind in enumerate(kinds):
        if kind not in known:
            tensors, caches = make(kind, i)
            known[kind] = Layer(tuple(tensors), caches)
        layers.append(known[kind])
    first, last, tied = embeddings(f, style, vocabulary, hidden)
    if context and turned:
        first += rotary(f, turned, context)
    experts = mix.experts if mix else None
    return Parts(hidden, vocabulary, heads, inner, tuple(layers), first, last, tied, context, family, experts)


def _kinds(f: Fields, count: int) -> list[str]:
    kinds = f.items("layer_types")
    if kinds is None or len(kinds) < count:
        raise usage_error(
            f"{f.what}: {f.path('layer_types')} does not say what each of the {count} layers is"
        )
    return [str(kind) for kind in kinds[:count]]


def gated_delta(f: Fields, style: Style) -> Parts:
    """Qwen3-Next and Qwen3.5: three layers of gated delta net to one of attention with a gated output."""
    hidden, heads = f.count("hidden_size"), f.count("num_attention_heads")
    count, width = f.count("num_hidden_layers"), f.count("head_dim")
    mix = mixture(f, count, hidden, 0, narrow=True)
    inner = f.count("intermediate_size", default=mix.shared or mix.inner if mix else None)
    cache = Attention(heads, f.count("num_key_value_heads"), width, width)
    step = f.count("full_attention_interval", default=4)
    kinds: list[str] = (
        _kinds(f, count)
        if f.has("layer_types")
        else ["linear_attention" if (i + 1) % step else "full_attention" for i in range(count)]
    )
    keys, values = f.count("linear_num_key_heads"), f.count("linear_num_value_heads")
    key, value = keys * f.count("linear_key_head_dim"), values * f.count("linear_value_head_dim")
    kernel = f.count("linear_conv_kernel_dim")
    recurrent = Recurrent(
        (2 * key + value) * (kernel - 1),
        value * f.count("linear_key_head_dim"),
        _state_bytes(f, "mamba_ssm_dtype", "mamba_ssm_cache_dtype"),
    )
    delta = [
        Tensor(
            ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_qkvz"),
            2 * key + 2 * value,
            hidden,
            Split.ROWS,
            linear=True,
        ),
        Tensor(
            ("linear_attn.in_proj_b", "linear_attn.in_proj_a", "linear_attn.in_proj_ba"),
            2 * values,
            hidden,
            Split.ROWS,
            linear=True,
        ),
        Tensor(("linear_attn.conv1d",), 2 * key + value, kernel, Split.ROWS),
        vector("dt_bias", values, split=Split.ROWS),
        vector("A_log", values, split=Split.ROWS, fixed=4),
        vector("norm", f.count("linear_value_head_dim")),
        linear("linear_attn.out_proj", hidden, value, Split.COLUMNS),
    ]

    def make(kind: str, _: int) -> tuple[list[Tensor], tuple[Cache, ...]]:
        inside = expert_layer(f, style, hidden, mix) if mix else feed_forward(f, style, hidden, inner)
        if kind == "linear_attention":
            return [*norms(style, hidden), *delta, *inside], (recurrent,)
        gate = f.flag("attn_output_gate", default=True)
        return [*norms(style, hidden), *attention(f, style, hidden, cache, gate=gate), *inside], (cache,)

    return _assemble(f, style, kinds, make, heads=heads, inner=inner, mix=mix, turned=width)


def mamba2(f: Fields, hidden: int, prefix: str = "mixer") -> tuple[list[Tensor], Recurrent]:
    """A Mamba-2 mixer: what goes in, the convolution, the recurrence, what comes out."""
    heads = f.count("mamba_num_heads", "mamba_n_heads", "num_heads")
    width = f.count("mamba_head_dim", "mamba_d_head", "head_dim")
    inner, groups = heads * width, f.count("n_groups", "mamba_n_groups", default=1)
    state, kernel = (
        f.count("ssm_state_size", "mamba_d_state", "state_size"),
        f.count("conv_kernel", "mamba_d_conv"),
    )
    mixed = inner + 2 * groups * state
    made = [
        linear(f"{prefix}.in_proj", inner + mixed + heads, hidden, Split.ROWS),
        Tensor((f"{prefix}.conv1d",), mixed, kernel, Split.ROWS),
        vector("dt_bias", heads, split=Split.ROWS),
        vector("A", heads, split=Split.ROWS, fixed=4),
        vector("D", heads, split=Split.ROWS),
        linear(f"{prefix}.out_proj", hidden, inner, Split.COLUMNS),
    ]
    if f.flag("mamba_rms_norm", default=True):
        made.append(vector("norm", inner, split=Split.ROWS))
    if f.flag("use_conv_bias", "mamba_conv_bias", default=True):
        made.append(vector("conv_bias", mixed, split=Split.ROWS))
    if f.flag("mamba_proj_bias", default=False):
        made += [vector("in_bias", inner + mixed + heads, split=Split.ROWS), vector("out_bias", hidden)]
    kept = Recurrent(
        mixed * (kernel - 1),
        heads * width * state,
        _state_bytes(f, "mamba_ssm_cache_dtype", "mamba_ssm_dtype"),
    )
    return made, kept


def nemotron_h(f: Fields, style: Style) -> Parts:
    """Nemotron-H and Nemotron 3: one mixer a layer, M Mamba-2, * attention, - dense, E experts."""
    hidden, heads = f.count("hidden_size"), f.count("num_attention_heads")
    letters = f.text("hybrid_override_pattern")
    if not letters:
        named = {
            "mamba": "M",
            "linear_attention": "M",
            "attention": "*",
            "full_attention": "*",
            "mlp": "-",
            "moe": "E",
        }
        kinds = f.items("layers_block_type") or f.items("layer_types") or []
        letters = "".join(named.get(str(kind), "?") for kind in kinds)
    count = f.count("num_hidden_layers", default=len(letters))
    if len(letters) != count or set(letters) - set("M*-E"):
        raise f.wrong("hybrid_override_pattern", letters, f"{count} letters of M, *, - and E are needed")
    width = f.number("head_dim", "attention_head_dim") or hidden // heads
    mix = mixture(f, count, hidden, 0, narrow=True) if "E" in letters else None
    inner = (
        f.number("intermediate_size") or mix.inner
        if mix and "-" not in letters
        else f.count("intermediate_size")
    )
    cache = Attention(heads, f.count("num_key_value_heads"), width, width)
    mixer, state = mamba2(f, hidden)

    def make(kind: str, _: int) -> tuple[list[Tensor], tuple[Cache, ...]]:
        if kind == "M":
            return [vector("norm", hidden), *mixer], (state,)
        if kind == "*":
            return [vector("norm", hidden), *attention(f, style, hidden, cache, prefix="mixer")], (cache,)
        if kind == "E" and mix:
            return [vector("norm", hidden), *expert_layer(f, style, hidden, mix, "mixer")], ()
        return [vector("norm", hidden), *feed_forward(f, style, hidden, inner, "mixer")], ()

    return _assemble(f, style, letters, make, heads=heads, inner=inner, mix=mix)


def kimi_linear(f: Fields, style: Style) -> Parts:
    """Kimi Linear and Kimi K3: layers of Kimi delta attention, every fourth of latent attention."""
    hidden, heads, count = (
        f.count("hidden_size"),
        f.count("num_attention_heads"),
        f.count("num_hidden_layers"),
    )
    inner = f.count("intermediate_size")
    mix = mixture(f, count, hidden, inner, narrow=True)
    table = f.below("linear_attn_config")
    if table is None:
        raise usage_error(f"{f.what}: {f.path('linear_attn_config')} is missing")
    full = {i for i in table.items("full_attn_layers") or () if isinstance(i, int)}
    own, width, kernel = (
        table.count("num_heads"),
        table.count("head_dim"),
        table.count("short_conv_kernel_size"),
    )
    size = own * width
    wide_gate = table.flag("use_full_rank_gate")
    delta = [
        Tensor(
            tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")),
            3 * size,
            hidden,
            Split.ROWS,
            linear=True,
        ),
        linear("self_attn.f_a_proj", width, hidden),
        linear("self_attn.f_b_proj", size, width, Split.ROWS),
        linear("self_attn.b_proj", own, hidden, Split.ROWS),
        *(
            [linear("self_attn.g_proj", size, hidden, Split.ROWS)]
            if wide_gate
            else [
                linear("self_attn.g_a_proj", width, hidden),
                linear("self_attn.g_b_proj", size, width, Split.ROWS),
            ]
        ),
        Tensor(("conv1d",), 3 * size, kernel, Split.ROWS, fixed_bytes=4),
        vector("dt_bias", size, split=Split.ROWS, fixed=4),
        vector("A_log", own, split=Split.ROWS, fixed=4),
        vector("o_norm", width),
        linear("self_attn.o_proj", hidden, size, Split.COLUMNS),
    ]
    state = Recurrent(3 * size * (kernel - 1), own * width * width, 4)
    latent, kept = latent_attention(f, hidden, heads)
    around = [*norms(style, hidden)]
    if f.has("attn_res_block_size"):
        around += [vector("res_norm", hidden)] * 2 + [vector("res_proj", hidden)] * 2
    kinds = [
        ("full" if i + 1 in full else "delta") + (" moe" if mix and i in mix.layers else "")
        for i in range(count)
    ]

    def make(kind: str, _: int) -> tuple[list[Tensor], tuple[Cache, ...]]:
        inside = (
            expert_layer(f, style, hidden, mix)
            if mix and kind.endswith("moe")
            else feed_forward(f, style, hidden, inner)
        )
        if kind.startswith("full"):
            return [*around, *latent, *inside], (kept,)
        return [*around, *delta, *inside], (state,)

    return _assemble(f, style, kinds, make, heads=heads, inner=inner, mix=mix)


def granite_hybrid(f: Fields, style: Style) -> Parts:
    """Granite 4: Mamba-2 or attention, each with experts and a shared feed-forward layer."""
    hidden, heads, count = (
        f.count("hidden_size"),
        f.count("num_attention_heads"),
        f.count("num_hidden_layers"),
    )
    width = f.number("head_dim") or hidden // heads
    inner = f.number("shared_intermediate_size", "intermediate_size")
    mix = mixture(f, count, hidden, f.count("intermediate_size"))
    cache = Attention(heads, f.count("num_key_value_heads"), width, width)
    kinds = _kinds(f, count)
    recurrent = {"mamba", "linear_attention"}  # as the file has it, and as transformers 5 calls it
    mixer, state = mamba2(f, hidden, "mamba") if recurrent & set(kinds) else ([], None)

    def make(kind: str, _: int) -> tuple[list[Tensor], tuple[Cache, ...]]:
        inside = (
            expert_layer(f, style, hidden, mix)
            if mix
            else feed_forward(f, style, hidden, inner, "shared_mlp")
        )
        if kind in recurrent and state:
            return [*norms(style, hidden), *mixer, *inside], (state,)
        return [*norms(style, hidden), *attention(f, style, hidden, cache), *inside], (cache,)

    return _assemble(f, style, kinds, make, heads=heads, inner=inner, mix=mix, turned=width)


def falcon_h1(f: Fields, style: Style) -> Parts:
    """Falcon-H1: attention and Mamba-2 side by side in every layer."""
    hidden, heads, count = (
        f.count("hidden_size"),
        f.count("num_attention_heads"),
        f.count("num_hidden_layers"),
    )
    width = f.number("head_dim") or hidden // heads
    inner = f.count("intermediate_size")
    cache = Attention(heads, f.count("num_key_value_heads"), width, width)
    mixer, state = mamba2(f, hidden, "mamba")

    def make(_: str, __: int) -> tuple[list[Tensor], tuple[Cache, ...]]:
        inside = feed_forward(f, style, hidden, inner, "feed_forward")
        return [*norms(style, hidden), *attention(f, style, hidden, cache), *mixer, *inside], (cache, state)

    return _assemble(f, style, ["both"] * count, make, heads=heads, inner=inner, turned=width)


def bamba(f: Fields, style: Style) -> Parts:
    """Bamba: Mamba-2, with attention in the layers that are named."""
    hidden, heads, count = (
        f.count("hidden_size"),
        f.count("num_attention_heads"),
        f.count("num_hidden_layers"),
    )
    width = f.number("head_dim") or hidden // heads
    inner = f.count("intermediate_size")
    cache = Attention(heads, f.count("num_key_value_heads"), width, width)
    mixer, state = mamba2(f, hidden, "mamba")
    named = f.items("attn_layer_indices") or []

    def make(kind: str, _: int) -> tuple[list[Tensor], tuple[Cache, ...]]:
        inside = feed_forward(f, style, hidden, inner, "feed_forward")
        if kind == "mamba":
            return [*norms(style, hidden), *mixer, *inside], (state,)
        return [*norms(style, hidden), *attention(f, style, hidden, cache), *inside], (cache,)

    kinds = ["attention" if i in named else "mamba" for i in range(count)]
    return _assemble(f, style, kinds, make, heads=heads, inner=inner, turned=width)


def pure_mamba2(f: Fields, style: Style) -> Parts:
    """Mamba-2 alone (Codestral Mamba)."""
    hidden, count = f.count("hidden_size"), f.count("num_hidden_layers")
    mixer, state = mamba2(f, hidden)

    def make(_: str, __: int) -> tuple[list[Tensor], tuple[Cache, ...]]:
        return [vector("norm", hidden), *mixer], (state,)

    return _assemble(f, style, ["mamba"] * count, make, heads=f.count("num_heads"), inner=hidden)


def lfm2(f: Fields, style: Style) -> Parts:
    """LFM2: short convolutions, with attention in some layers; dense or with experts."""
    hidden, heads, count = (
        f.count("hidden_size"),
        f.count("num_attention_heads"),
        f.count("num_hidden_layers"),
    )
    width = f.number("head_dim") or hidden // heads
    inner = f.count("intermediate_size", "block_ff_dim")
    if f.flag("block_auto_adjust_ff_dim", default=False):
        multiple = f.count("block_multiple_of", default=256)
        inner = -(-int(2 * inner / 3) // multiple) * multiple
    cache = Attention(heads, f.count("num_key_value_heads"), width, width)
    kernel = f.count("conv_L_cache", default=3)
    state = Recurrent(hidden * (kernel - 1), 0)
    mix = mixture(f, count, hidden, inner, narrow=True)
    short = [
        linear("conv.in_proj", 3 * hidden, hidden, Split.ROWS),
        Tensor(("conv.conv",), hidden, kernel, Split.ROWS),
        linear("conv.out_proj", hidden, hidden, Split.COLUMNS),
    ]
    kinds = [kind + (" moe" if mix and i in mix.layers else "") for i, kind in enumerate(_kinds(f, count))]

    def make(kind: str, _: int) -> tuple[list[Tensor], tuple[Cache, ...]]:
        inside = (
            expert_layer(f, style, hidden, mix, "feed_forward")
            if mix and kind.endswith("moe")
            else feed_forward(f, style, hidden, inner, "feed_forward")
        )
        if kind.startswith("conv"):
            return [*norms(style, hidden), *short, *inside], (state,)
        return [*norms(style, hidden), *attention(f, style, hidden, cache), *inside], (cache,)

    return _assemble(f, style, kinds, make, heads=heads, inner=inner, mix=mix, turned=width)


def jamba(f: Fields, style: Style) -> Parts:
    """Jamba: Mamba-1, with attention and experts every so many layers."""
    hidden, heads, count = (
        f.count("hidden_size"),
        f.count("num_attention_heads"),
        f.count("num_hidden_layers"),
    )
    width, inner = hidden // heads, f.count("intermediate_size")
    cache = Attention(heads, f.count("num_key_value_heads"), width, width)
    size = f.count("mamba_expand", default=2) * hidden
    state, kernel = f.count("mamba_d_state", default=16), f.count("mamba_d_conv", default=4)
    rank = f.number("mamba_dt_rank") or -(-hidden // 16)
    mixer = [
        linear("mamba.in_proj", 2 * size, hidden, Split.ROWS),
        Tensor(("mamba.conv1d",), size, kernel + 1, Split.ROWS),
        linear("mamba.x_proj", rank + 2 * state, size, Split.COLUMNS),
        linear("mamba.dt_proj", size, rank, Split.ROWS),
        vector("dt_bias", size, split=Split.ROWS),
        Tensor(("A_log",), size, state, Split.ROWS, fixed_bytes=4),
        vector("D", size, split=Split.ROWS),
        linear("mamba.out_proj", hidden, size, Split.COLUMNS),
        vector("norm", rank + 2 * state),
    ]
    kept = Recurrent(size * (kernel - 1), size * state)
    mix = mixture(f, count, hidden, inner)
    each, begin = f.count("attn_layer_period", default=8), f.number("attn_layer_offset", default=4)
    sparse, offset = f.count("expert_layer_period", default=2), f.number("expert_layer_offset", default=1)
    kinds = [
        ("attention" if (i - begin) % each == 0 else "mamba")
        + (" moe" if mix and (i - offset) % sparse == 0 else "")
        for i in range(count)
    ]

    def make(kind: str, _: int) -> tuple[list[Tensor], tuple[Cache, ...]]:
        inside = (
            expert_layer(f, style, hidden, mix, "feed_forward")
            if mix and kind.endswith("moe")
            else feed_forward(f, style, hidden, inner, "feed_forward")
        )
        if kind.startswith("mamba"):
            return [*norms(style, hidden), *mixer, *inside], (kept,)
        return [*norms(style, hidden), *attention(f, style, hidden, cache), *inside], (cache,)

    return _assemble(f, style, kinds, make, heads=heads, inner=inner, mix=mix)


def deci(f: Fields, style: Style) -> Parts:
    """Nemotron's pruned Llama: each layer with its own heads and width, or without one of the two."""
    hidden, heads = f.count("hidden_size"), f.count("num_attention_heads")
    width = f.number("head_dim") or hidden // heads
    blocks = f.items("block_configs")
    if blocks is None:
        raise usage_error(f"{f.what}: {f.path('block_configs')} is missing")
    kinds, widest = [], 1
    for block in blocks:
        if not isinstance(block, dict):
            raise f.wrong("block_configs", block, "a table for each layer is needed")
        attn, ffn = block.get("attention") or {}, block.get("ffn") or {}
        group = (
            0 if attn.get("no_op") or attn.get("replace_with_linear") else attn.get("n_heads_in_group") or 0
        )
        inner = 0
        if not ffn.get("no_op"):
            inner = (
                ffn.get("intermediate_size")
                or -(-int(2 * (ffn.get("ffn_mult") or 0) * hidden / 3) // 256) * 256
            )
        widest = max(widest, inner)
        kinds.append(f"{group} {inner}")

    def make(kind: str, _: int) -> tuple[list[Tensor], tuple[Cache, ...]]:
        group, inner = (int(part) for part in kind.split())
        made: list[Tensor] = []
        caches: tuple[Cache, ...] = ()
        if group:
            cache = Attention(heads, heads // group, width, width)
            made += [vector("norm", hidden), *attention(f, style, hidden, cache)]
            caches = (cache,)
        if inner:
            made += [vector("norm", hidden), *feed_forward(f, style, hidden, inner)]
        return made, caches

    return _assemble(f, style, kinds, make, heads=heads, inner=widest, turned=width, family="dense")


def deepseek_v4(f: Fields, style: Style) -> Parts:
    """DeepSeek V4: latent vectors compressed 4 or 128 to one, a window of plain ones, and hyper-connections.

    A vector is 584 B as the engine packs it, an indexer's 132 B (vLLM, `models/deepseek_v4/attention.py`).
    """
    hidden, heads, count = (
        f.count("hidden_size"),
        f.count("num_attention_heads"),
        f.count("num_hidden_layers"),
    )
    width, rank = f.count("head_dim"), f.count("q_lora_rank")
    inner = f.count("moe_intermediate_size")
    mix = mixture(f, count, hidden, inner)
    groups, out = f.count("o_groups"), f.count("o_lora_rank")
    streams = f.count("hc_mult")
    size = f.count("sliding_window")
    ratios = [int(r) for r in f.items("compress_ratios") or () if isinstance(r, int)][:count]
    if len(ratios) < count:
        raise usage_error(
            f"{f.what}: {f.path('compress_ratios')} does not have one for each of {count} layers"
        )
    index = f.count("index_head_dim")
    mixes = (2 + streams) * streams
    common = [
        *norms(style, hidden),
        Tensor(("self_attn.wq_a", "self_attn.wkv"), rank + width, hidden, linear=True),
        linear("self_attn.wq_b", heads * width, rank, Split.ROWS),
        linear("self_attn.wo_a", groups * out, heads * width // groups, Split.ROWS),
        linear("self_attn.wo_b", hidden, groups * out, Split.COLUMNS),
        vector("q_norm", rank + width),
        vector("sinks", heads, split=Split.ROWS, fixed=4),
        *[Tensor(("hc",), mixes, streams * hidden, fixed_bytes=4), vector("hc_base", mixes + 3, fixed=4)] * 2,
    ]

    def compressor(ratio: int, dim: int) -> list[Tensor]:
        wide = dim * (2 if ratio == 4 else 1)
        return [
            Tensor(("self_attn.compressor",), 2 * wide, hidden, linear=False),
            Tensor(("compressor.ape",), ratio, wide, fixed_bytes=4),
            vector("compressor.norm", dim),
        ]

    def make(kind: str, _: int) -> tuple[list[Tensor], tuple[Cache, ...]]:
        ratio = int(kind)
        made = [
            *common,
            *(expert_layer(f, style, hidden, mix) if mix else feed_forward(f, style, hidden, inner)),
        ]
        caches: list[Cache] = [Latent(heads, 584, window=size, packed=True)]
        if ratio > 1:
            made += compressor(ratio, width)
            caches.append(Latent(heads, 584, every=ratio, packed=True))
        if ratio == 4:
            made += compressor(ratio, index)
            made += [
                linear("self_attn.indexer.wq_b", f.count("index_n_heads") * index, rank),
                Tensor(("self_attn.indexer.weights_proj",), f.count("index_n_heads"), hidden),
            ]
            caches.append(Latent(heads, index + index // 128 * 4, every=ratio, packed=True))
        return made, tuple(caches)

    parts = _assemble(
        f,
        style,
        [str(r) for r in ratios],
        make,
        heads=heads,
        inner=inner,
        mix=mix,
        turned=f.count("qk_rope_head_dim"),
        family="latent",
    )
    parts.last += [Tensor(("hc_head",), streams, streams * hidden, fixed_bytes=4)]
    return parts


def minimax_m3(f: Fields, style: Style) -> Parts:
    """MiniMax M3: grouped queries with an indexer beside them, dense layers first, then experts."""
    hidden, heads, count = (
        f.count("hidden_size"),
        f.count("num_attention_heads"),
        f.count("num_hidden_layers"),
    )
    width = f.count("head_dim")
    inner = f.count("dense_intermediate_size", "intermediate_size")
    mix = mixture(f, count, hidden, f.count("intermediate_size"))
    cache = Attention(heads, f.count("num_key_value_heads"), width, width)
    sparse = f.below("sparse_attention_config")
    chosen = (sparse.items("sparse_attention_freq") or []) if sparse else []
    kinds = [
        ("moe" if mix and i in mix.layers else "dense") + (" sparse" if i < len(chosen) and chosen[i] else "")
        for i in range(count)
    ]

    def make(kind: str, _: int) -> tuple[list[Tensor], tuple[Cache, ...]]:
        made = [*norms(style, hidden), *attention(f, style, hidden, cache)]
        caches: tuple[Cache, ...] = (cache,)
        if sparse and kind.endswith("sparse"):
            dim, many = sparse.count("sparse_index_dim"), sparse.count("sparse_num_index_heads")
            made += [
                linear("self_attn.index_q_proj", dim * many, hidden),
                linear("self_attn.index_k_proj", dim, hidden),
                vector("index_norm", 2 * dim),
            ]
            caches = (cache, Latent(heads, dim))
        inside = (
            expert_layer(f, style, hidden, mix, "block_sparse_moe")
            if mix and kind.startswith("moe")
            else feed_forward(f, style, hidden, inner)
        )
        return [*made, *inside], caches

    return _assemble(f, style, kinds, make, heads=heads, inner=inner, mix=mix, turned=width, family="moe")


_QWEN_NEXT = Style(qk_norm="head", o_bias=False, gated_shared=True)
BUILDERS: dict[str, Callable[[Fields, Style], Parts]] = {
    "qwen3_next": gated_delta,
    "qwen3_5": gated_delta,
    "nemotron_h": nemotron_h,
    "kimi_linear": kimi_linear,
    "granitemoehybrid": granite_hybrid,
    "falcon_h1": falcon_h1,
    "bamba": bamba,
    "mamba2": pure_mamba2,
    "lfm2": lfm2,
    "lfm2_moe": lfm2,
    "jamba": jamba,
    "nemotron-nas": deci,
    "deepseek_v4": deepseek_v4,
    "minimax_m3": minimax_m3,
}
STYLES: dict[str, Style] = {
    "qwen3_next": _QWEN_NEXT,
    "qwen3_5": _QWEN_NEXT,
    "nemotron_h": Style(gated=False, router_bias=True),
    "kimi_linear": Style(router_bias=True),
    "granitemoehybrid": Style(tied=True),
    "falcon_h1": Style(),
    "bamba": Style(),
    "mamba2": Style(),
    "lfm2": Style(qk_norm="head", tied=True),
    "lfm2_moe": Style(qk_norm="head", tied=True, router_bias=True),
    "jamba": Style(),
    "nemotron-nas": Style(),
    "deepseek_v4": Style(router_bias=True),
    "minimax_m3": Style(qk_norm="head", router_bias=True),
}
