"""A model's shapes, as its config.json has them. May import: gpuctl.errors, gpuctl.fit, the standard library.

`read` makes an `Architecture`: every tensor that the engine keeps, with its shape and how tensor parallelism divides
it, and what each layer keeps of a request. The tensors are the engine's (query, key and value merged into one, the
experts of a layer in one), because it is those that the allocator rounds up; the names are the checkpoint's, because
it is those that a quantisation leaves out. How each family is built is in `families.py` and `towers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from gpuctl.errors import EXIT_USAGE, GpuctlError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpuctl.fit.quantization import Quantization


class UnknownFamilyError(GpuctlError):
    """A configuration of a family that is not in our tables: nothing wrong with it, only nothing known."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem, exit_code=EXIT_USAGE)


class Split(Enum):
    """How tensor parallelism divides a tensor over the GPUs of a stage."""

    ROWS = "rows"
    COLUMNS = "columns"
    VOCABULARY = "vocabulary"
    NONE = "none"


@dataclass(frozen=True)
class Tensor:
    """`copies` matrices of rows (outputs) x columns (inputs), of which a token uses `active`.

    `names` are the modules of the checkpoint that it holds, below their layer: a tensor of query, key and value has
    three. `kv_rows` of the rows come in `kv_heads` pieces, of which every GPU has at least one (keys and values).
    `linear`: a linear layer's weight, to which a quantisation applies; to any other tensor (embedding, norm, bias,
    convolution) it does not. `fixed_bytes` is the size of an element where it is not the model's.
    """

    names: tuple[str, ...]
    rows: int
    columns: int = 1
    split: Split = Split.NONE
    linear: bool = False
    copies: int = 1
    active: int = 1
    kv_rows: int = 0
    kv_heads: int = 0
    fixed_bytes: int | None = None
    parameter: bool = True  # False: a table that is computed, such as the rotary embedding's

    @property
    def elements(self) -> int:
        """Parameters, all GPUs together."""
        return self.rows * self.columns * self.copies


@dataclass(frozen=True)
class Attention:
    """Keys and values of a layer: `kv_heads` x (`key` + `value`) elements for each token.

    `window`: only the last so many tokens are attended to; `chunked`: that window starts anew at its multiples.
    """

    heads: int
    kv_heads: int
    key: int
    value: int
    window: int | None = None
    chunked: bool = False


@dataclass(frozen=True)
class Latent:
    """Latent attention: one vector of `width` elements for each token, the same on every GPU.

    `index` bytes a token are what the indexer of a sparse attention keeps beside it. `every`: there is one vector for
    so many tokens only. `window`: as in `Attention`. `packed`: `width` is in bytes, whatever the cache's format.
    `expanded` is the width of a head's key and value that a prompt's latents are made into.
    """

    heads: int
    width: int
    index: int = 0
    every: int = 1
    window: int | None = None
    packed: bool = False
    expanded: int = 0


@dataclass(frozen=True)
class Recurrent:
    """A state of fixed size for each request: elements of a convolution and of a recurrence, divided over the GPUs.

    `state_bytes` is the size of an element of the recurrence's state; None: the model's.
    """

    convolution: int
    state: int
    state_bytes: int | None = None


Cache = Attention | Latent | Recurrent


@dataclass(frozen=True)
class Layer:
    """One layer: its tensors, and what it keeps of a request."""

    tensors: tuple[Tensor, ...]
    caches: tuple[Cache, ...]


@dataclass(frozen=True)
class Experts:
    """A mixture: how many experts there are, how many a token takes, their inner and outer width."""

    count: int
    active: int
    intermediate: int
    width: int


@dataclass(frozen=True)
class Architecture:
    """A model's shapes, all GPUs together. `context` is the longest that it was made for, in tokens.

    `family` is "dense", "moe", "latent", "hybrid" or "multimodal". `heads` are the attention heads that tensor
    parallelism has to divide. `first` are the tensors before the layers (embeddings), `last` those after them;
    `beside` those of towers (vision, audio). `image_bytes` are what the engine holds of images while it profiles, for
    each token of the batch. `drafts` are layers for speculation that are in the files and that the engine does not
    load unless asked (MTP). `known` is False where the model's type is not one of those built here: then the shapes
    are those that its fields would mean in an ordinary model, and `assumptions` say so.
    """

    model_type: str
    family: str
    hidden: int
    vocabulary: int
    heads: int
    intermediate: int
    layers: tuple[Layer, ...]
    first: tuple[Tensor, ...]
    last: tuple[Tensor, ...]
    beside: tuple[Tensor, ...]
    tied: bool
    element_bytes: int
    context: int | None
    experts: Experts | None = None
    quantization: Quantization | None = None
    image_bytes: int = 0
    drafts: int = 0
    known: bool = True
    assumptions: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """All parameters that the engine loads."""
        return sum(t.elements for t in self.tensors() if t.parameter)

    @property
    def active_parameters(self) -> int:
        """Parameters that a token is multiplied with: the experts that it takes, and the output's matrix.

        An embedding is looked up, and towers see no token of a text.
        """
        inner = sum(
            t.rows * t.columns * t.active for layer in self.layers for t in layer.tensors if t.parameter
        )
        return inner + self.vocabulary * self.hidden

    def tensors(self) -> list[Tensor]:
        """All of them, in the order of loading."""
        inner = [t for layer in self.layers for t in layer.tensors]
        return [*self.first, *inner, *self.last, *self.beside]


def read(
    config: Mapping[str, object], *, what: str, quantization: Mapping[str, object] | None = None
) -> Architecture:
    """The shapes that a config.json has. `what` names it in errors.

    `quantization` is the content of hf_quant_config.json, where a repository has one and its config.json does not say
    how the weights are stored. Errors: usage, naming the field that is missing or absurd.
    """
    from gpuctl.fit.families import build

    return build(config, what, quantization)
