"""What stands beside a decoder: towers for images and sound, and what joins them to it. Imports: gpuctl.fit, stdlib.

Shapes are those of transformers 5.19 and of the engine's own classes. A tower of a kind that is not here is counted as
an ordinary vision transformer of its width and depth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuctl.fit.architecture import Split, Tensor

if TYPE_CHECKING:
    from gpuctl.fit.fields import Fields


def _linear(name: str, rows: int, columns: int, *, bias: bool = True, copies: int = 1) -> list[Tensor]:
    made = [Tensor((name,), rows, columns, Split.ROWS, linear=True, copies=copies)]
    if bias:
        made.append(Tensor((f"{name}.bias",), rows, copies=copies))
    return made


def _plain(name: str, rows: int, columns: int = 1, copies: int = 1) -> Tensor:
    return Tensor((name,), rows, columns, copies=copies)


def _blocks(
    name: str,
    hidden: int,
    inner: int,
    layers: int,
    *,
    bias: bool = True,
    gated: bool = False,
    norm: int = 2,
    norms: int = 2,
    kv: int | None = None,
) -> list[Tensor]:
    """The layers of a vision transformer; `norm` is how many vectors a norm has."""
    gates = 2 if gated else 1
    keys = hidden if kv is None else kv
    return [
        *_linear(f"{name}.qkv_proj", hidden + 2 * keys, hidden, bias=bias, copies=layers),
        *_linear(f"{name}.out_proj", hidden, hidden, bias=bias, copies=layers),
        *_linear(f"{name}.mlp.fc1", gates * inner, hidden, bias=bias, copies=layers),
        *_linear(f"{name}.mlp.fc2", hidden, inner, bias=bias, copies=layers),
        _plain("norm", norm * norms * hidden, copies=layers),
    ]


def _qwen(v: Fields, text: int, kind: str) -> list[Tensor]:
    """The towers of Qwen2-VL to Qwen3.5: patches of two frames, four patches merged into a token."""
    layers = v.count("depth")
    hidden = v.count("embed_dim") if kind == "qwen2_vl" else v.count("hidden_size")
    patch, frames, merge = v.count("patch_size", default=14), v.count("temporal_patch_size", default=2), 2
    merge = v.count("spatial_merge_size", default=2)
    wide = hidden * merge * merge
    out = (
        v.count("out_hidden_size", "hidden_size", default=text)
        if kind != "qwen2_vl"
        else v.count("hidden_size")
    )
    columns = v.count("in_channels", "in_chans", default=3) * frames * patch * patch
    if kind == "qwen2_5_vl":
        return [
            *_linear("visual.patch_embed", hidden, columns, bias=False),
            *_linear("visual.blocks.qkv", 3 * hidden, hidden, copies=layers),
            *_linear("visual.blocks.proj", hidden, hidden, copies=layers),
            *_linear("visual.blocks.mlp.gate_up", 2 * v.count("intermediate_size"), hidden, copies=layers),
            *_linear("visual.blocks.mlp.down_proj", hidden, v.count("intermediate_size"), copies=layers),
            _plain("norm", 2 * hidden, copies=layers),
            *_linear("visual.merger.mlp.0", wide, wide),
            *_linear("visual.merger.mlp.2", out, wide),
            _plain("norm", hidden),
        ]
    inner = v.number("intermediate_size") or int(hidden * 4)
    made = [
        *_linear("visual.patch_embed", hidden, columns, bias=kind != "qwen2_vl"),
        *_blocks("visual.blocks", hidden, inner, layers),
        *_linear("visual.merger.linear_fc1", wide, wide),
        *_linear("visual.merger.linear_fc2", out, wide),
        _plain("norm", 2 * hidden),
    ]
    if kind != "qwen2_vl":
        made.append(_plain("visual.pos_embed", v.count("num_position_embeddings", default=2304), hidden))
        for _ in v.items("deepstack_visual_indexes") or ():
            made += [
                *_linear("visual.deepstack_merger_list.linear_fc1", wide, wide),
                *_linear("visual.deepstack_merger_list.linear_fc2", out, wide),
                _plain("norm", 2 * wide),
            ]
    return made


def _siglip(v: Fields, *, name: str, clip: bool = False) -> list[Tensor]:
    hidden, layers = v.count("hidden_size", default=768), v.count("num_hidden_layers", default=12)
    inner = v.count("intermediate_size", default=4 * hidden)
    patch, image = v.count("patch_size", default=16), v.count("image_size", default=224)
    places = (image // patch) ** 2 + (1 if clip else 0)
    return [
        *_linear(f"{name}.patch_embedding", hidden, 3 * patch * patch, bias=not clip),
        _plain("positions", places, hidden),
        *_blocks(f"{name}.layers", hidden, inner, layers),
        _plain("norm", (5 if clip else 2) * hidden),
    ]


def _pixtral(v: Fields) -> list[Tensor]:
    hidden, layers = v.count("hidden_size", default=1024), v.count("num_hidden_layers", default=24)
    patch = v.count("patch_size", default=16)
    inner = v.count("intermediate_size", default=4096)
    return [
        *_linear("vision_tower.patch_conv", hidden, 3 * patch * patch, bias=False),
        *_blocks("vision_tower.layers", hidden, inner, layers, bias=False, gated=True, norm=1),
        _plain("norm", hidden),
    ]


def _gemma4(v: Fields, text: int) -> list[Tensor]:
    hidden, layers = v.count("hidden_size"), v.count("num_hidden_layers")
    return [
        _plain("vision_tower.positions", 2 * v.count("position_embedding_size", default=10240), hidden),
        *_linear("vision_tower.input_proj", hidden, 3 * v.count("patch_size", default=16) ** 2, bias=False),
        *_blocks(
            "vision_tower.layers",
            hidden,
            v.count("intermediate_size"),
            layers,
            bias=False,
            gated=True,
            norm=1,
            norms=4,
        ),
        *_linear("embed_vision.embedding_projection", text, hidden, bias=False),
    ]


def _llama4(v: Fields, text: int) -> list[Tensor]:
    hidden, layers = v.count("hidden_size", default=768), v.count("num_hidden_layers", default=34)
    inner = v.count("intermediate_size", default=5632)
    patch, image = v.count("patch_size", default=14), v.count("image_size", default=448)
    projected, output = (
        v.count("projector_input_dim", default=4096),
        v.count("projector_output_dim", default=4096),
    )
    return [
        *_linear("vision_model.patch_embedding", hidden, 3 * patch * patch, bias=False),
        _plain("positions", (image // patch) ** 2 + 2, hidden),
        *_blocks("vision_model.layers", hidden, inner, layers),
        _plain("norm", 4 * hidden),
        *_linear("vision_model.vision_adapter.fc1", projected, inner, bias=False),
        *_linear("vision_model.vision_adapter.fc2", output, projected, bias=False),
        *_linear("multi_modal_projector", text, v.count("vision_output_dim", default=7680), bias=False),
    ]


def _moonvit(v: Fields, text: int) -> list[Tensor]:
    hidden = v.count("vt_hidden_size", "hidden_size", default=1152)
    layers = v.count("vt_num_hidden_layers", "num_hidden_layers", default=27)
    inner = v.count("vt_intermediate_size", "intermediate_size", default=4304)
    patch = v.count("patch_size", default=14)
    height, width = v.count("init_pos_emb_height", default=64), v.count("init_pos_emb_width", default=64)
    wide = 4 * hidden
    bias = v.flag("linear_bias", default=True)
    return [
        *_linear("vision_tower.patch_embed", hidden, 3 * patch * patch),
        _plain("positions", height * width, hidden),
        *_blocks("vision_tower.blocks", hidden, inner, layers, bias=bias),
        *_linear("mm_projector.0", wide, wide),
        *_linear("mm_projector.2", text, wide),
        _plain("norm", 4 * hidden),
    ]


def _intern(v: Fields, text: int) -> list[Tensor]:
    hidden, layers = v.count("hidden_size"), v.count("num_hidden_layers")
    image, patch = v.get("image_size"), v.get("patch_size")
    image = image[0] if isinstance(image, list) and image else image
    patch = patch[0] if isinstance(patch, list) and patch else patch
    image = image if isinstance(image, int) else 448
    patch = patch if isinstance(patch, int) and patch > 0 else 14
    wide = 4 * hidden
    return [
        *_linear("vision_model.patch_embedding", hidden, 3 * patch * patch),
        _plain("positions", (image // patch) ** 2 + 2, hidden),
        *_blocks("vision_model.layers", hidden, v.count("intermediate_size"), layers),
        _plain("scales", 2 * hidden, copies=layers),
        _plain("norm", 2 * wide),
        *_linear("mlp1.1", text, wide),
        *_linear("mlp1.3", text, text),
    ]


def _conformer(a: Fields, text: int) -> list[Tensor]:
    """Gemma 4's encoder of sound."""
    hidden, layers = a.count("hidden_size", default=1024), a.count("num_hidden_layers", default=12)
    kernel, out = a.count("conv_kernel_size", default=5), a.count("output_proj_dims", default=1536)
    name = "audio_tower.layers"
    return [
        *_linear("audio_tower.input_proj_linear", hidden, hidden, bias=False),
        _plain("audio_tower.subsample", 128 * 9 + 32 * 128 * 9 + 160),
        *_linear(f"{name}.feed_forward.ffw_layer_1", 4 * hidden, hidden, bias=False, copies=2 * layers),
        *_linear(f"{name}.feed_forward.ffw_layer_2", hidden, 4 * hidden, bias=False, copies=2 * layers),
        *_linear(f"{name}.self_attn.qkv_proj", 3 * hidden, hidden, bias=False, copies=layers),
        *_linear(f"{name}.self_attn.post", hidden, hidden, bias=False, copies=layers),
        *_linear(f"{name}.self_attn.relative_k_proj", hidden, hidden, bias=False, copies=layers),
        *_linear(f"{name}.lconv1d.linear_start", 2 * hidden, hidden, bias=False, copies=layers),
        *_linear(f"{name}.lconv1d.linear_end", hidden, hidden, bias=False, copies=layers),
        _plain("norm", (9 + kernel) * hidden, copies=layers),
        *_linear("audio_tower.output_proj", out, hidden),
        *_linear("embed_audio.embedding_projection", text, out, bias=False),
    ]


def _whisper(a: Fields) -> list[Tensor]:
    """An encoder of sound, as Whisper has it."""
    hidden = a.count("d_model", "hidden_size")
    layers = a.count("encoder_layers", "num_hidden_layers")
    inner = a.count("encoder_ffn_dim", "intermediate_size", default=4 * hidden)
    return [
        *_linear("audio_tower.conv1", hidden, 3 * a.count("num_mel_bins", default=128)),
        *_linear("audio_tower.conv2", hidden, 3 * hidden),
        _plain("positions", a.count("max_source_positions", default=1500), hidden),
        *_blocks("audio_tower.layers", hidden, inner, layers),
        _plain("norm", 2 * hidden),
    ]


def _glm4v(v: Fields, text: int) -> list[Tensor]:
    """The towers of GLM-4.1V and 4.5V: gated layers without biases, four patches merged into a token."""
    hidden, layers, merge = v.count("hidden_size"), v.count("depth"), v.count("spatial_merge_size", default=2)
    patch, frames = v.count("patch_size", default=14), v.count("temporal_patch_size", default=2)
    out, wide = v.count("out_hidden_size", default=text), v.count("intermediate_size")
    places = (v.count("image_size", default=336) // patch) ** 2
    return [
        *_linear("visual.patch_embed", hidden, v.count("in_channels", default=3) * frames * patch * patch),
        _plain("positions", places, hidden),
        *_blocks("visual.blocks", hidden, out, layers, bias=False, gated=True, norm=1),
        *_linear("visual.downsample", out, hidden * merge * merge),
        *_linear("visual.merger.proj", out, out, bias=False),
        *_linear("visual.merger.gate_up_proj", 2 * wide, out, bias=False),
        *_linear("visual.merger.down_proj", out, wide, bias=False),
        _plain("norm", 2 * hidden + 2 * out),
    ]


def _joint(outer: Fields, v: Fields, text: int, kind: str) -> list[Tensor]:
    """What brings a tower's output to the decoder's width."""
    hidden = v.count("hidden_size", default=1024)
    name = "multi_modal_projector"
    if kind in ("gemma3", "paligemma"):
        made = _linear(name, text, hidden, bias=kind == "paligemma")
        return [*made, _plain("norm", hidden)] if kind == "gemma3" else made
    taken = outer.get("vision_feature_layer")
    columns = hidden * (len(taken) if isinstance(taken, list) else 1)
    bias = outer.flag("multimodal_projector_bias", default=kind != "mistral3")
    made = []
    if kind in ("mistral3", "lighton_ocr"):
        merge = outer.count("spatial_merge_size", default=2)
        made += _linear(f"{name}.merging_layer", hidden, hidden * merge * merge, bias=False)
        made.append(_plain("norm", hidden))
    if kind in ("cohere2_vision", "lfm2_vl"):  # neighbours are put together first
        shrunk = hidden * outer.count("downsample_factor", default=2) ** 2
        inner = outer.count("alignment_intermediate_size", "projector_hidden_size", default=text)
        gates = 2 if kind == "cohere2_vision" else 1
        return [
            *_linear(f"{name}.linear_1", inner, shrunk),
            *_linear(f"{name}.linear_2", text, inner // gates),
        ]
    if kind == "minimax_m3_vl":
        wide = outer.count("projector_hidden_size", default=text)
        return [
            *_linear(f"{name}.linear_1", wide, hidden),
            *_linear(f"{name}.linear_2", text, wide),
            *_linear(f"{name}.merge_linear_1", wide, 4 * text),
            *_linear(f"{name}.merge_linear_2", text, wide),
        ]
    made += _linear(f"{name}.linear_1", text, columns, bias=bias)
    made += _linear(f"{name}.linear_2", text, text, bias=bias)
    if kind.startswith("llava_next"):
        made.append(_plain("image_newline", text))
    return made


def build(f: Fields, text: int) -> list[Tensor]:
    """The tensors of a model's towers, for a decoder of width `text`; none where there is no tower."""
    kind = f.text("model_type")
    if kind.endswith("_text"):
        return []
    v = f.below("vision_config", "vision_encoder")
    made: list[Tensor] = []
    if v is not None and v.config:
        made += _vision(f, v, text, kind)
    elif kind in ("gemma3", "mistral3", "llava", "llava_next", "llama4"):
        made += _vision(f, type(f)({}, f.what, "vision_config"), text, kind)
    a = f.below("audio_config")
    if a is not None and a.text("model_type") == "gemma4_audio":
        made += _conformer(a, text)
    elif a is not None and a.has("encoder_layers", "num_hidden_layers") and a.has("d_model", "hidden_size"):
        made += _whisper(a)
        made += _linear("audio_projector", text, a.count("d_model", "hidden_size"))
    return made


def _vision(f: Fields, v: Fields, text: int, kind: str) -> list[Tensor]:
    own = v.text("model_type")
    if kind.startswith("qwen"):
        for name in ("qwen2_5_vl", "qwen2_vl"):
            if kind.startswith(name):
                return _qwen(v, text, name)
        return _qwen(v, text, "qwen3_vl")
    if kind == "llama4":
        return _llama4(v, text)
    if own.startswith("glm4v"):
        return _glm4v(v, text)
    if own == "gemma4_vision" or kind == "gemma4":
        return _gemma4(v, text)
    if kind.startswith("kimi"):
        return _moonvit(v, text)
    if kind in ("internvl_chat", "internvl", "interns1"):
        return _intern(v, text)
    if own == "pixtral" or kind == "mistral3":
        return [*_pixtral(v), *_joint(f, v, text, kind)]
    if own == "clip_vision_model" and kind == "minimax_m3_vl":
        hidden = v.count("hidden_size")
        columns = 3 * 2 * v.count("patch_size") ** 2
        return [
            *_linear("vision_tower.patch", hidden, columns, bias=False),
            *_blocks(
                "vision_tower.layers", hidden, v.count("intermediate_size"), v.count("num_hidden_layers")
            ),
            _plain("norm", 2 * hidden),
            *_joint(f, v, text, kind),
        ]
    clip = own == "clip_vision_model"
    return [*_siglip(v, name="vision_tower", clip=clip), *_joint(f, v, text, kind)]


def image_bytes(f: Fields, text: int) -> int:
    """Bytes that are held of images for each token that they become, while the engine profiles.

    Pixels (three 16-bit numbers for each, of all frames) and the tower's output.
    """
    v = f.below("vision_config", "vision_encoder")
    if v is None:
        return 0
    patch = v.get("patch_size")
    patch = patch if isinstance(patch, int) and patch > 0 else 14
    kind = f.text("model_type")
    image = v.get("image_size")
    if kind in ("gemma3", "paligemma") and isinstance(image, int):
        pixels = image * image // f.count("mm_tokens_per_image", default=256)
    else:
        merge = v.number("spatial_merge_size", default=0) or f.number("spatial_merge_size", default=2)
        pixels = (patch * merge) ** 2 * v.count("temporal_patch_size", default=1)
    return (3 * pixels + text) * 2
