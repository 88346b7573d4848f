"""Does it fit, and how fast can it be: arithmetic over frozen values. May import: gpuctl.errors, standard library.

No files, no network, no Modal: facts come in as values (`ModelFacts`, `Card`, `EngineConstants`), a `Candidate`
goes out. Bytes are bytes everywhere; GiB is a display. Each formula's docstring has its source; docs/fit.md has
them together.
"""
