"""Bytes that the weights take on a GPU. May import: gpuctl.fit, the standard library.

What an engine reports as the size of its weights is what the CUDA allocator of PyTorch holds for them, so that is what
is computed: each of the engine's tensors on one GPU, rounded as the allocator rounds it
(c10/cuda/CUDACachingAllocator.cpp: 512 B; from 10 MiB, segments of whole 2 MiB whose rest, up to 1 MiB, is not split
off).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuctl.fit.architecture import Split

if TYPE_CHECKING:
    from gpuctl.fit.architecture import Architecture, Layer, Tensor
    from gpuctl.fit.quantization import Quantization

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


def bytes_on_gpu(
    tensor: Tensor, tensor_parallel: int, element_bytes: int, quantization: Quantization | None
) -> int:
    """Bytes that the allocator holds for a tensor on one GPU."""
    rows, columns = shape_on_gpu(tensor, tensor_parallel)
    if quantization is not None and tensor.linear:
        return held(tensor.copies * quantization.scheme.bytes_of(rows, columns))
    return held(rows * columns * tensor.copies * (tensor.fixed_bytes or element_bytes))


def per_stage(
    architecture: Architecture,
    tensor_parallel: int,
    pipeline_parallel: int,
    element_bytes: int,
    quantization: Quantization | None,
) -> list[int]:
    """Bytes of the weights on one GPU of each pipeline stage."""
    known: dict[int, int] = {}

    def size(layer: Layer) -> int:
        if id(layer) not in known:
            known[id(layer)] = sum(
                bytes_on_gpu(t, tensor_parallel, element_bytes, quantization) for t in layer.tensors
            )
        return known[id(layer)]

    def total(tensors: tuple[Tensor, ...]) -> int:
        return sum(bytes_on_gpu(t, tensor_parallel, element_bytes, quantization) for t in tensors)

    made = []
    parts = stages(len(architecture.layers), pipeline_parallel)
    for i, part in enumerate(parts):
        here = sum(size(architecture.layers[j]) for j in part)
        if i == 0:
            here += total(architecture.first) + total(architecture.beside)
        if i == len(parts) - 1:
            here += total(architecture.last)
            if architecture.tied and i > 0:
                here += total(architecture.first[:1])
        made.append(here)
    return made
