"""How a model's weights are stored, from its configuration. May import: gpuctl.errors, gpuctl.fit, standard library.

A scheme says how many bits a weight takes and what scales come with it; a quantisation says which modules have which
scheme, and which are left as they are.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scheme:
    """How a matrix is stored: `bits` a weight, and a scale of `scale_bits` for each group of inputs.

    `group` is the inputs that share a scale; 0: one scale a row; -1: one for the matrix. `rows` is how many rows share
    it too (128 for blocks of 128 x 128). `zero_bits` is a zero point's size, one for each scale. `needs` is the least
    compute capability that runs it, with the engine's fallbacks counted as running.
    """

    name: str
    bits: int
    group: int = 0
    rows: int = 1
    scale_bits: int = 32
    zero_bits: int = 0
    needs: tuple[int, int] = (7, 5)

    def bytes_of(self, rows: int, columns: int) -> int:
        """Bytes of a matrix of rows (outputs) x columns (inputs) with its scales."""
        if self.group == -1:
            scales = 1
        elif self.group == 0:
            scales = rows
        else:
            scales = -(-columns // self.group) * -(-rows // self.rows)
        return (rows * columns * self.bits + 7) // 8 + (scales * (self.scale_bits + self.zero_bits) + 7) // 8


@dataclass(frozen=True)
class Quantization:
    """What is stored how: the first rule that names a module decides; `ignored` modules stay as they are."""

    method: str
    scheme: Scheme
    ignored: tuple[str, ...] = ()
    kv_cache: str | None = None


# `--quantization fp8` of a 16-bit checkpoint: one scale for each merged matrix (vLLM, quantization/fp8.py).
ON_THE_FLY = {"fp8": Scheme("fp8", 8, group=-1, needs=(7, 5))}
