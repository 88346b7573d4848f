"""Bytes that the weights take on a GPU. May import: gpuctl.fit, the standard library.

What an engine reports as the size of its weights is what the CUDA allocator of PyTorch holds for them, so that is what
is computed: each of the engine's tensors on one GPU, rounded as the allocator rounds it
(c10/cuda/CUDACachingAllocator.cpp: 512 B; from 10 MiB, segments of whole 2 MiB whose rest, up to 1 MiB, is not split
off).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpuctl.fit.architecture import Split
from gpuctl.fit.quantization import Matcher

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gpuctl.fit.architecture import Architecture, Tensor
    from gpuctl.fit.quantization import Quantization, Scheme

_MIB = 2**20
_VOCABULARY_MULTIPLE = (
    64  # vLLM pads the vocabulary to it (vocab_parallel_embedding.py, DEFAULT_VOCAB_PADDING_SIZE)
)


def held(size: int) -> int:
    """Bytes that the allocator holds for a tensor of `size` bytes."""
    size = -(-size // 512) * 512
    if size < 10 * _MIB:
        return size
    rest = -size % (2 * _MIB)
    return size + rest if rest <= _MIB else size


def stages(layers: int, pipeline_parallel: int) -> list[range]:
    """The layers of each pipeline stage; what is left over goes to the stages before the last (`get_pp_indices`)."""
    sizes = [layers // pipeline_parallel] * pipeline_parallel
    for i in range(2, layers % pipeline_parallel + 2):
        sizes[-i] += 1
    made, start = [], 0
    for size in sizes:
        made.append(range(start, start + size))
        start += size
    return made


def shape_on_gpu(tensor: Tensor, tensor_parallel: int) -> tuple[int, int]:
    """(rows, columns) of a tensor on one of the GPUs that share it."""
    rows, columns = tensor.rows, tensor.columns
    if tensor.split is Split.VOCABULARY:
        rows = -(-rows // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
        return -(-rows // tensor_parallel), columns
    if tensor_parallel == 1 or tensor.split is Split.NONE:
        return rows, columns
    if tensor.split is Split.COLUMNS:
        return rows, -(-columns // tensor_parallel)
    kv = tensor.kv_rows
    if kv:
        kv = kv // tensor.kv_heads * max(1, -(-tensor.kv_heads // tensor_parallel))
    return -(-(rows - tensor.kv_rows) // tensor_parallel) + kv, columns


@dataclass(frozen=True)
class Padding:
    """What experts in MXFP4 are padded to, in rows and columns, so that a kernel's tiles are full.

    `inner` is of the experts' own width, `outer` of the model's, where the engine pads the shapes; `rows` and `columns`
    where it pads what it stores.
    """

    inner: int = 1
    outer: int = 1
    rows: int = 1
    columns: int = 1

    def apply(self, tensor: Tensor, rows: int, columns: int) -> tuple[int, int]:
        """The shape of an expert's matrix with its padding."""
        many = len(tensor.names)  # gate and up are one tensor
        if tensor.split is Split.ROWS:
            rows, columns = many * _up(rows // many, self.inner), _up(columns, self.outer)
        else:
            rows, columns = _up(rows, self.outer), _up(columns, self.inner)
        return _up(rows, self.rows), _up(columns, self.columns)


def mxfp4_padding(capability: tuple[int, int] | None, *, stored: bool) -> Padding:
    """The padding on a card of this compute capability.

    Hopper runs OpenAI's Triton kernels, which pad what is stored: to 64 B of inputs and 256 outputs (triton_kernels,
    `hopper_value.py`), and in older versions (not `stored`) to 128 B of inputs alone. Others run Marlin or TRT-LLM's
    (vLLM, `fused_moe/oracle/mxfp4.py: mxfp4_round_up_hidden_size_and_intermediate_size`).
    """
    if capability is None or capability[0] == 9:
        return Padding(rows=256, columns=128) if stored else Padding(columns=256)
    if capability[0] == 10:
        return Padding(inner=256, outer=256)
    return Padding(inner=128, outer=256)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def bytes_on_gpu(
    tensor: Tensor,
    tensor_parallel: int,
    element_bytes: int,
    scheme: Scheme | None,
    padding: Padding | None = None,
) -> int:
    """Bytes that the allocator holds for a tensor and its scales on one GPU."""
    rows, columns = shape_on_gpu(tensor, tensor_parallel)
    if scheme is not None:
        if padding is not None and tensor.copies > 1:
            rows, columns = padding.apply(tensor, rows, columns)
        return held(scheme.bytes_of(rows, columns, tensor.copies)) + held(
            scheme.scales_of(rows, columns, tensor.copies)
        )
    return held(rows * columns * tensor.copies * (tensor.fixed_bytes or element_bytes))


def in_files(architecture: Architecture) -> int:
    """Bytes that the files of the weights have for what the engine loads, as the shapes have it, in 16 bits."""
    matcher = None if architecture.quantization is None else Matcher(architecture.quantization)
    size = 0
    for prefix, tensors in _by_layer(architecture):
        for tensor in tensors:
            if not tensor.parameter:
                continue
            scheme = None
            if matcher is not None and tensor.linear:
                scheme = matcher.scheme([prefix + name for name in tensor.names], expert=tensor.copies > 1)
            if scheme is None:
                size += tensor.elements * (tensor.fixed_bytes or architecture.element_bytes)
            else:
                size += scheme.bytes_of(tensor.rows, tensor.columns, tensor.copies)
                size += scheme.scales_of(tensor.rows, tensor.columns, tensor.copies)
    return size


def _by_layer(architecture: Architecture) -> Iterable[tuple[str, tuple[Tensor, ...]]]:
    yield "", (*architecture.first, *architecture.last, *architecture.beside)
    for i, layer in enumerate(architecture.layers):
        yield f"layers.{i}.", layer.tensors


def per_stage(
    architecture: Architecture,
    tensor_parallel: int,
    pipeline_parallel: int,
    element_bytes: int,
    quantization: Quantization | None,
    padding: Padding | None = None,
) -> list[int]:
    """Bytes of the weights on one GPU of each pipeline stage; `padding` is for experts in MXFP4."""
    matcher = None if quantization is None else Matcher(quantization)
    known: dict[object, int] = {}

    def one(tensor: Tensor, prefix: str) -> int:
        scheme = None
        if matcher is not None and tensor.linear:
            scheme = matcher.scheme([prefix + name for name in tensor.names], expert=tensor.copies > 1)
        key = (id(tensor), scheme)
        if key not in known:
            known[key] = bytes_on_gpu(tensor, tensor_parallel, element_bytes, scheme, padding)
        return known[key]

    def total(tensors: Iterable[Tensor], prefix: str = "") -> int:
        return sum(one(tensor, prefix) for tensor in tensors)

    by_layer = matcher is not None and matcher.by_layer
    sizes: dict[int, int] = {}

    def layer_size(i: int) -> int:
        layer = architecture.layers[i]
        if by_layer:
            return total(layer.tensors, f"layers.{i}.")
        if id(layer) not in sizes:
            sizes[id(layer)] = total(layer.tensors, f"layers.{i}.")
        return sizes[id(layer)]

    made = []
    parts = stages(len(architecture.layers), pipeline_parallel)
    for i, part in enumerate(parts):
        here = sum(layer_size(j) for j in part)
        if i == 0:
            here += total(architecture.first) + total(architecture.beside)
        if i == len(parts) - 1:
            here += total(architecture.last)
            if architecture.tied and i > 0:
                here += total(architecture.first[:1])
        made.append(here)
    return made
