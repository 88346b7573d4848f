"""gpuctl: a model on a GPU, now. Flags in, a rendered Modal app out, deployed by the real `modal` CLI."""

__version__ = "0.1.0"
