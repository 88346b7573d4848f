"""MODEL becomes facts: an alias, a repository of the hub, a folder, a config.json. May import: catalog, errors, files,
hub, paths, repos, safetensors, specs.

An alias is read from the catalogue and asks nobody. `org/name` asks the hub, a few kB, and what it said is kept by
commit in the cache; where the hub does not answer, the cache and then the catalogue stand in, and a note says so.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuctl import catalog, safetensors
from gpuctl.catalog.configs import config_of
from gpuctl.errors import EXIT_USAGE, GpuctlError, usage_error
from gpuctl.specs.model import ModelRef

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpuctl.repos import Described

_LONGEST_CONFIG = 4 * 2**20  # bytes; the longest one seen has 60 kB


@dataclass(frozen=True)
class Found:
    """What is known of a model, from where, and what to say about that.

    `config`: its config.json; empty where only the size of its weights is known; `quantization`: its
    hf_quant_config.json, where that alone says how the weights are stored; `left_open`: why that is not known,
    where it is not. `parameters`: elements by
    safetensors dtype; `weight_bytes`: of all that an engine loads. None: not known.
    """

    name: str
    repo: str | None
    revision: str | None
    config: Mapping[str, Any]
    parameters: Mapping[str, int] | None
    weight_bytes: int | None
    pipeline: str | None
    source: str
    notes: tuple[str, ...] = ()
    quantization: Mapping[str, Any] | None = None
    left_open: str | None = None

    @property
    def whole(self) -> bool:
        """Whether there is no need to ask the hub for more."""
        return bool(self.config) and self.left_open is None


def find(text: str, *, online: bool = True) -> Found:
    """What MODEL is. `online`: whether the hub may be asked.

    Raises a usage error for what is no model, naming the nearest aliases; a GpuctlError where the hub was needed and
    did not answer.
    """
    path = _path(text)
    if path is not None:
        return _of_path(path)
    return of_ref(_reference(text), online=online)


def of_ref(ref: ModelRef, *, online: bool = True) -> Found:
    """What an alias or a repository is."""
    if ref.folder is not None:
        return _of_path(ref.folder)
    if ref.repo is None:
        return _tiny(ref)
    known = _of_catalogue(ref)
    if known is not None and known.whole and _as_the_catalogue_has_it(ref):
        return known
    if not online:
        return _of_cache(ref) or known or _nothing(ref)
    return _of_hub(ref, ref.repo, known)


def _as_the_catalogue_has_it(ref: ModelRef) -> bool:
    """Whether an alias was asked for as it stands there: then nobody is asked about it."""
    entry = ref.entry
    return ref.alias is not None and entry is not None and ref.revision == entry.revision


def of_deployment(ref: ModelRef, commit: str | None, *, force: bool = False) -> Found:
    """What is about to be deployed, at its exact commit: what cannot be learnt of it is no reason not to deploy it.

    What is no model at all is one, unless it is forced.
    """
    import dataclasses

    if ref.repo is None:
        return of_ref(ref)
    known = _of_catalogue(ref)
    if known is not None and known.whole and _as_the_catalogue_has_it(ref):
        return known
    from gpuctl.repos import GatedError

    try:
        return of_ref(dataclasses.replace(ref, revision=commit or ref.revision))
    except GpuctlError as error:
        if error.exit_code == EXIT_USAGE and not force and not isinstance(error, GatedError):
            raise
        return _noted(_nothing(ref), _said(error))


# -- a folder, or a config.json


def _path(text: str) -> Path | None:
    """Where MODEL is a path: it looks like one, or is a folder with a config.json and no alias."""
    if re.match(r"(?:\.{0,2}|~)/", text) or text in (".", "..") or text.endswith((".json", "/")):
        return Path(text).expanduser()
    with contextlib.suppress(OSError, ValueError):
        if "/" in text and (Path(text) / "config.json").is_file():
            return Path(text)
    return None


_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".onnx")


def _of_path(path: Path) -> Found:
    try:
        if not path.exists():
            raise usage_error(f"MODEL: there is no {str(path)!r}")
        if path.is_file() and path.suffix in _WEIGHTS:
            raise usage_error(
                f"MODEL: {str(path)!r} holds weights: give the folder that it is in, or its config.json"
            )
        if path.is_file():
            return _found_at(path, path, None, None)
    except (OSError, ValueError) as error:
        raise usage_error(f"MODEL: {str(path)!r} cannot be read: {_reason(error)}") from error
    config = path / "config.json"
    if not config.is_file() and (path / "model_index.json").is_file():
        return _image_at(path)
    if not config.is_file():
        what = _without_config([one.name for one in _listed(path)])
        raise usage_error(
            f"MODEL: {str(path)!r} has no config.json, so it is no model to serve: it holds {what}"
        )
    return _gguf_at(path, config) or _found_at(path, config, *_weights_in(path))


def _gguf_at(path: Path, config: Path) -> Found | None:
    """A folder whose weights are GGUF and nothing else; None: it is none."""
    import dataclasses

    from gpuctl.repos import GGUF, gguf_build, only_gguf

    sizes = {one.name: one.stat().st_size for one in _listed(path) if one.is_file()}
    if not only_gguf(list(sizes)):
        return None
    found = _found_at(path, config, None, sum(sizes[name] for name in gguf_build(list(sizes))) or None)
    source = f"{config} and the size of the GGUF file beside it"
    return dataclasses.replace(
        found, quantization=GGUF, source=source if found.weight_bytes else found.source
    )


def _found_at(
    path: Path, config: Path, parameters: Mapping[str, int] | None, weight_bytes: int | None
) -> Found:
    return Found(
        name=str(path),
        repo=None,
        revision=None,
        config=_read_config(config),
        parameters=parameters,
        weight_bytes=weight_bytes,
        pipeline=None,
        source=str(config) if weight_bytes is None else f"{config} and the headers of the weights beside it",
        quantization=_quantization_beside(config),
    )


def _image_at(path: Path) -> Found:
    """An image model: its parts are in folders, and only their size counts."""
    from gpuctl.safetensors import parts_of

    try:
        files = {str(one.relative_to(path)): one.stat().st_size for one in path.glob("*/*.safetensors")}
    except OSError as error:
        raise usage_error(f"MODEL: {str(path)!r} cannot be read: {_reason(error)}") from error
    return Found(
        name=str(path),
        repo=None,
        revision=None,
        config={},
        parameters=None,
        weight_bytes=sum(files[name] for name in parts_of(files)) or None,
        pipeline="text-to-image",
        source=f"the sizes of the files in {path}",
    )


def _quantization_beside(config: Path) -> Mapping[str, Any] | None:
    """NVIDIA's ModelOpt says in a file of its own how weights are stored."""
    path = config.with_name("hf_quant_config.json")
    return _read_config(path) if path.is_file() else None


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > _LONGEST_CONFIG:
            raise usage_error(f"MODEL: {str(path)!r} is {path.stat().st_size:,} bytes long: no config.json")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise usage_error(f"MODEL: {str(path)!r} is no JSON: {_reason(error)}") from error
    if not isinstance(config, dict):
        raise usage_error(f"MODEL: {str(path)!r} is no JSON object, so it is no config.json")
    return config


def _weights_in(folder: Path) -> tuple[dict[str, int] | None, int | None]:
    """Elements by dtype and bytes of the weights in a folder; None: there are none, or not all of them."""
    index: Mapping[str, Any] | None = None
    stated = None
    with contextlib.suppress(OSError, ValueError):
        content = (folder / "model.safetensors.index.json").read_bytes()
        index, stated = json.loads(content), safetensors.total_size(content)
    try:
        names = safetensors.files_of([one.name for one in _listed(folder)], index)
    except (AttributeError, TypeError) as error:
        raise usage_error(f"MODEL: {str(folder)!r}: model.safetensors.index.json is no index") from error
    counted = []
    for name in names:
        try:
            with (folder / name).open("rb") as file:
                header = file.read(safetensors.header_length(file.read(safetensors.LENGTH)))
            counted.append(safetensors.elements(header))
        except OSError:
            return None, stated
        except safetensors.HeaderError as error:
            raise usage_error(f"MODEL: {str(folder / name)!r} is no safetensors file: {error}") from error
    if counted:
        parameters = safetensors.total(counted)
        return parameters, safetensors.size(parameters)
    sizes = [one.stat().st_size for one in _listed(folder) if re.fullmatch(r"pytorch_model.*\.bin", one.name)]
    return None, stated or sum(sizes) or None


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise usage_error(f"MODEL: {str(folder)!r} cannot be read: {_reason(error)}") from error


def _without_config(names: list[str]) -> str:
    from gpuctl.repos import what_it_holds

    return what_it_holds(names)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# -- an alias, or a repository


def _reference(text: str) -> ModelRef:
    """Read MODEL as an alias or a repository, naming what is near where it is neither."""
    return ModelRef.parse(text)


# What templates/shared/tiny.py.jinja makes; a test holds the two together.
_TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 8679,
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 8, "head_dim": 32, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip


def _tiny(ref: ModelRef) -> Found:
    return Found(ref.title, None, None, _TINY, None, None, None, "what gpuctl makes it of")


def _of_catalogue(ref: ModelRef) -> Found | None:
    """What the catalogue knows; None where it does not have this repository.

    Of a model that is judged by its weights, a stated number of parameters is one; of an image model it is not, for
    those are the parameters of one of its parts.
    """

    entry = ref.entry
    config = None if ref.repo is None else config_of(ref.repo)
    size = None
    if config is None and entry is not None:
        size = entry.weights_gib if entry.kind == "image" else entry.download_gib
    if ref.repo is None or (config is None and entry is None):
        return None
    open_ = None if config is None else _left_open(ref.repo, config)
    source = "the catalogue"
    if config is None:
        source += ", which has the size of its weights and no more" if size else ", which has no shapes of it"
    return Found(
        name=ref.alias or ref.title,
        repo=ref.repo,
        revision=None,
        config=config or {},
        parameters=None,
        weight_bytes=None if size is None else int(size * 2**30),
        pipeline=None if entry is None else _PIPELINES.get(entry.kind),
        source=source,
        notes=() if open_ is None else (open_,),
        left_open=open_,
    )


# What the hub would call the task of a model whose class does not tell: an embedding model can be a decoder.
_PIPELINES = {
    "embedding": "feature-extraction",
    "reranker": "text-ranking",
    "speech": "automatic-speech-recognition",
    "image": "text-to-image",
    "vision": "image-text-to-text",
}


# What a repository is called whose weights are quantised, in ways that its config.json should tell.
_QUANTISED = re.compile(
    r"(?:^|[-_.])(?:fp8|nvfp4|mxfp4|awq|gptq|int[48]|w4a16|w8a8|bnb|[48]bit)(?:$|[-_.])", re.I
)


def _left_open(repo: str, config: Mapping[str, Any]) -> str | None:
    """What a name promises and the file in the catalogue does not tell; None: nothing."""
    if not _QUANTISED.search(repo.rpartition("/")[2]):
        return None
    from gpuctl.repos import says_how_stored

    if says_how_stored(config):
        return None
    return (
        f"{repo}: by its name the weights are quantised, but the catalogue does not say how: they are reckoned as 16 "
        "bits each"
    )


def _nothing(ref: ModelRef) -> Found:
    """A repository of which nothing is known here, and nobody may be asked."""
    return Found(
        name=ref.alias or ref.title,
        repo=ref.repo,
        revision=ref.revision,
        config={},
        parameters=None,
        weight_bytes=None,
        pipeline=None,
        source="nothing: nobody was asked",
    )


# -- the hub, and what is kept of it


def _of_hub(ref: ModelRef, repo: str, known: Found | None) -> Found:
    from gpuctl.hub import COMMIT
    from gpuctl.repos import GatedError, NotFoundError, UnreachableError, resolve

    cache = _Cache(repo)
    revision = ref.revision or "main"
    if COMMIT.fullmatch(revision):
        kept = cache.read(revision)
        if kept is not None:
            return _described(ref, kept, "the hub, as kept in the cache")
    try:
        record = resolve(repo, ref.revision)
        described = (record.commit and cache.read(record.commit)) or record.describe()
    except NotFoundError as error:
        raise _with_near(error, repo) from error
    except UnreachableError as error:
        instead = _of_cache(ref) or _of_downloads(ref, repo) or known
        if instead is None:
            raise _nothing_instead(error, repo) from error
        return _noted(instead, f"{_said(error)}; going on from {instead.source}")
    except GatedError as error:
        if known is None:
            raise
        return _noted(known, f"{_said(error)}; going on from {known.source}. To serve it: {error.hint}")
    if described.commit is not None:
        cache.write(revision, described)
    return _described(ref, described, "the hub")


def _said(error: GpuctlError) -> str:
    return error.problems[0].removeprefix("MODEL: ")


def _noted(found: Found, note: str) -> Found:
    import dataclasses

    return dataclasses.replace(found, notes=(*found.notes, note))


def _nothing_instead(error: GpuctlError, repo: str) -> GpuctlError:
    return GpuctlError(
        f"{error.problems[0]}, and neither the cache nor the catalogue has it{_near(repo)}", hint=error.hint
    )


def _with_near(error: GpuctlError, repo: str) -> GpuctlError:
    return usage_error(f"{error.problems[0]}{_near(repo)}", hint=error.hint)


def _near(repo: str) -> str:
    """The catalogue's repositories that are spelled alike, by the shorter of their names."""
    known = {
        model.repo.lower(): model for model in catalog.models().values() if model.repo and model.repo != repo
    }
    found = [known[near] for near in difflib.get_close_matches(repo.lower(), list(known), n=3, cutoff=0.6)]
    return f"; near it: {', '.join(f'{model.repo} ({model.alias})' for model in found)}" if found else ""


def _of_cache(ref: ModelRef) -> Found | None:
    """What the hub said the last time."""
    if ref.repo is None:
        return None
    cache = _Cache(ref.repo)
    kept = cache.latest(ref.revision or "main")
    return None if kept is None else _described(ref, kept, f"what the hub said {cache.age(kept)} ago")


def _of_downloads(ref: ModelRef, repo: str) -> Found | None:
    """What huggingface_hub has downloaded of it; None: nothing."""
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(repo, "config.json", revision=ref.revision or "main")
    except (OSError, ValueError):
        return None
    if not isinstance(path, str):
        return None
    config = Path(path)
    parameters, weight_bytes = _weights_in(config.parent)
    return Found(
        name=ref.alias or ref.title,
        repo=repo,
        revision=config.parent.name,
        config=_read_config(config),
        parameters=parameters,
        weight_bytes=weight_bytes,
        pipeline=None,
        source=f"what was downloaded to {config.parent}",
        quantization=_quantization_beside(config),
    )


def _described(ref: ModelRef, described: Described, source: str) -> Found:
    return Found(
        name=ref.alias or ref.title,
        repo=ref.repo,
        revision=described.commit,
        config=described.config,
        parameters=described.parameters,
        weight_bytes=described.weight_bytes,
        pipeline=described.pipeline,
        source=source,
        quantization=described.quantization,
    )


def cache_folder(repo: str) -> Path:
    """Where files of one repository are kept. It may not be there."""
    from urllib.parse import urlsplit

    from gpuctl.hub import endpoint
    from gpuctl.paths import cache_dir

    host = re.sub(r"[^A-Za-z0-9.-]", "_", urlsplit(endpoint()).netloc)
    return cache_dir(make=False) / "hub" / host / repo.replace("/", "--")


class _Cache:
    """Files of one repository: `COMMIT.json`, what the hub said of it; `refs.json`, the commit of each branch."""

    def __init__(self, repo: str) -> None:
        self.folder = cache_folder(repo)

    def read(self, commit: str) -> Described | None:
        from gpuctl.repos import document_of

        with contextlib.suppress(OSError, ValueError):
            return document_of((self.folder / f"{commit}.json").read_text(encoding="utf-8"))
        return None

    def latest(self, revision: str) -> Described | None:
        commit = self._refs().get(revision, revision)
        return self.read(commit) if re.fullmatch(r"[0-9a-f]{40}", commit) else None

    def write(self, revision: str, described: Described) -> None:
        """Keep it; a cache that cannot be written is none."""
        from gpuctl.files import write_private

        with contextlib.suppress(OSError):
            path = self.folder / f"{described.commit}.json"
            if path.exists():
                os.utime(path)
            else:
                write_private(path, json.dumps(described.document()))
            refs = self._refs()
            if refs.get(revision) != described.commit:
                write_private(self.folder / "refs.json", json.dumps({**refs, revision: described.commit}))

    def age(self, described: Described) -> str:
        """How long ago the hub was last heard of it, in words."""
        try:
            seconds = time.time() - (self.folder / f"{described.commit}.json").stat().st_mtime
        except OSError:
            return "some time"
        for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
            if seconds >= length:
                count = int(seconds // length)
                return f"{count} {unit}{'s' if count > 1 else ''}"
        return "a moment"

    def _refs(self) -> dict[str, str]:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((self.folder / "refs.json").read_text(encoding="utf-8"))
            if isinstance(found, dict):
                return {str(name): str(commit) for name, commit in found.items()}
        return {}
