"""What a repository of the hub says of the model in it, without its weights. May import: errors, hub, safetensors.

Through huggingface_hub, imported when the hub is asked and not before. Two small requests: the hub's own record of the
repository (commit, file names, parameters by type) and config.json. Where the record has no parameters, or counts
packed ones, a third: the beginning of the index, or the header of the weights, by a range request.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from gpuctl import __version__, safetensors
from gpuctl.errors import EXIT_USAGE, GpuctlError, usage_error
from gpuctl.hub import COMMIT, endpoint, offline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from httpx2 import Response, Timeout

_TIMEOUT = 10  # seconds for each read
_CONNECT_TIMEOUT = 5
_RECORD = ["sha", "siblings", "safetensors", "gated", "pipeline_tag", "library_name"]
_MOST_CONFIG = 4 * 2**20  # bytes: the longest config.json seen has 60 kB
_INDEX_START = 4096  # bytes in which an index states its total
_MOST_INDEX = 64 * 2**20
_MOST_FILE = 64 * 2**20

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
PIPELINE = "model_index.json"  # of diffusers: the parts of an image model
QUANTIZATION = (
    "hf_quant_config.json"  # of NVIDIA's ModelOpt, where config.json does not say how weights are stored
)


class UnreachableError(GpuctlError):
    """The hub did not answer, or nothing of use: what is already known here may have to do."""


class NotFoundError(GpuctlError):
    """The hub has no such model, or none that it shows to this token."""


class GatedError(GpuctlError):
    """The repository's files are only for accounts that accepted its licence."""


@dataclass(frozen=True)
class Described:
    """A model as its repository or its folder describes it.

    `quantization`: its hf_quant_config.json, where config.json says nothing of that and there is one; `parameters`:
    elements by safetensors dtype of all files that an engine loads; `weight_bytes`: their size, known
    without `parameters` where an index states it. None: not known.
    """

    repo: str
    commit: str | None
    config: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, int] | None = None
    weight_bytes: int | None = None
    pipeline: str | None = None
    gated: bool = False
    quantization: Mapping[str, Any] | None = None

    def document(self) -> dict[str, Any]:
        """As it is cached."""
        return {
            "repo": self.repo,
            "commit": self.commit,
            "config": dict(self.config),
            "parameters": None if self.parameters is None else dict(self.parameters),
            "weight_bytes": self.weight_bytes,
            "pipeline": self.pipeline,
            "gated": self.gated,
            "quantization": None if self.quantization is None else dict(self.quantization),
        }


def resolve(repo: str, revision: str | None) -> _Record:
    """The first request: the hub's record of a repository. See `_Record.describe` for the rest."""
    if offline():
        raise UnreachableError(
            f"MODEL: the hub is not asked about {repo}: HF_HUB_OFFLINE is set",
            hint="unset it, or give an alias",
        )
    return _Hub(repo, revision).record()


def small_file(repo: str, revision: str | None, name: str) -> bytes | None:
    """A file of up to 64 MiB, whole; None where there is none."""
    if offline():
        raise UnreachableError(f"MODEL: the hub is not asked about {repo}: HF_HUB_OFFLINE is set")
    content = _Hub(repo, revision).start_of(name, revision, _MOST_FILE + 1)
    if content is not None and len(content) > _MOST_FILE:
        raise UnreachableError(f"MODEL: {repo}: {name} is longer than {_MOST_FILE >> 20} MiB")
    return content


@dataclass(frozen=True)
class _Record:
    """What the hub keeps about a repository at one revision."""

    hub: _Hub
    commit: str | None
    files: Sequence[str] | None  # None: the hub did not list them
    parameters: Mapping[str, int] | None
    gated: bool
    pipeline: str | None
    library: str | None
    mirrored: bool = False

    def describe(self) -> Described:
        """The second request, and a third if the record has no parameters."""
        hub = self.hub
        config: Mapping[str, Any] = {}
        quantization: Mapping[str, Any] | None = None
        weight_bytes = None if self.parameters is None else safetensors.size(self.parameters)
        parameters = self.parameters
        if self.files is not None and CONFIG not in self.files:
            # An image model has its parts in folders; Mistral's own format says nothing that we read.
            if PIPELINE not in self.files and "params.json" not in self.files:
                raise _no_model(hub.repo, self.files)
            if PIPELINE in self.files:
                weight_bytes, parameters = hub.size_of_parts(), None
        else:
            config = hub.config(self.commit, mirrored=self.mirrored)
            if not says_how_stored(config) and QUANTIZATION in (self.files or ()):
                quantization = hub.json(QUANTIZATION, hub.get(QUANTIZATION, self.commit))
            elif only_gguf(self.files or ()):
                quantization, parameters = GGUF, None
                weight_bytes = hub.size_of_gguf()
        if weight_bytes is None and quantization is not GGUF and PIPELINE not in (self.files or ()):
            parameters, weight_bytes = hub.weights(self.commit, self.files)
        return Described(
            repo=hub.repo,
            commit=self.commit,
            config=config,
            parameters=parameters,
            weight_bytes=weight_bytes,
            pipeline=self.pipeline or ("text-to-image" if PIPELINE in (self.files or ()) else None),
            gated=self.gated,
            quantization=quantization,
        )


class _Hub:
    """Requests about one repository, and what their refusals mean."""

    def __init__(self, repo: str, revision: str | None) -> None:
        self.repo = repo
        self.revision = revision
        self.endpoint = endpoint()

    def record(self) -> _Record:
        from urllib.parse import quote

        at = "" if self.revision is None else f"/revision/{quote(self.revision, safe='')}"
        url = f"{self.endpoint}/api/models/{self.repo}{at}"
        response = self._get(url, params={"expand": _RECORD})
        if response.status_code == 404 and "X-Error-Code" not in response.headers:
            # Not the hub itself: a mirror that has the files and no API.
            return _Record(self, _commit(self.revision), None, None, False, None, None, mirrored=True)
        self._check(response)
        try:
            found = response.json()
            commit, siblings, counted = found.get("sha"), found.get("siblings"), found.get("safetensors")
            files = None if siblings is None else [str(one["rfilename"]) for one in siblings]
            parameters = _counts((counted or {}).get("parameters"))
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise UnreachableError(
                f"MODEL: {self.repo}: {self.endpoint} answered what is no record of a model"
            ) from error
        return _Record(
            hub=self,
            commit=_commit(commit) or _commit(self.revision),
            files=files or None,
            parameters=parameters,
            gated=bool(found.get("gated")),
            pipeline=found.get("pipeline_tag"),
            library=found.get("library_name"),
        )

    def config(self, commit: str | None, *, mirrored: bool) -> Mapping[str, Any]:
        """Its config.json. `mirrored`: what answers has no API, and may be no hub at all."""
        response = self.get(CONFIG, commit, missing=True)
        if response.status_code == 404 and mirrored and "X-Error-Code" not in response.headers:
            raise UnreachableError(
                f"MODEL: {self.repo}: {self.endpoint} answers as no hub does, and has no such model",
                hint="check HF_ENDPOINT and the proxy, or give an alias",
            )
        if response.status_code == 404:
            raise _no_model(self.repo, None)
        return self.json(CONFIG, response)

    def get(self, name: str, commit: str | None, *, missing: bool = False) -> Response:
        """A small file, whole; `missing`: where there is none, the answer that says so, and no error."""
        response = self._get(self._file(name, commit))
        code = response.headers.get("X-Error-Code")
        if not (missing and response.status_code == 404 and code in (None, "EntryNotFound")):
            self._check(response)
        return response

    def json(self, name: str, response: Response) -> Mapping[str, Any]:
        """The JSON object in a file; a usage error where it is none."""
        if len(response.content) > _MOST_CONFIG:
            raise usage_error(f"MODEL: {self.repo}: its {name} is {len(response.content):,} bytes long")
        try:
            found = response.json()
        except (ValueError, RecursionError) as error:
            raise usage_error(f"MODEL: {self.repo}: its {name} is no JSON: {error}") from error
        if not isinstance(found, dict):
            raise usage_error(f"MODEL: {self.repo}: its {name} is no JSON object")
        return found

    def weights(
        self, commit: str | None, files: Sequence[str] | None
    ) -> tuple[Mapping[str, int] | None, int | None]:
        """Elements by dtype, and bytes, from the index or the header of the weights; None: neither is there."""
        if files is None or INDEX in files:
            start = self.start_of(INDEX, commit, _INDEX_START)
            if start is not None:
                stated = safetensors.total_size(start)
                if stated is None and len(start) >= _INDEX_START:  # it stands at the end, then
                    stated = safetensors.total_size(self.start_of(INDEX, commit, _MOST_INDEX) or b"")
                if stated is not None:
                    return None, stated
        names = safetensors.files_of(["model.safetensors"] if files is None else files, None)
        found = []
        for name in names[:8]:  # more of them, and no index: not a model that an engine could load
            start = self.start_of(name, commit, 8)
            if start is None:
                return None, None
            try:
                length = safetensors.header_length(start)
                header = self.start_of(name, commit, 8 + length) or b""
                found.append(safetensors.elements(header[8:]))
            except safetensors.HeaderError as error:
                raise usage_error(f"MODEL: {self.repo}: {name} is no safetensors file: {error}") from error
        if found and len(names) == len(found):
            parameters = safetensors.total(found)
            return parameters, safetensors.size(parameters)
        return None, self._size_of(
            lambda names: [name for name in names if re.fullmatch(r"pytorch_model[^/]*\.bin", name)]
        )

    def size_of_parts(self) -> int | None:
        """Bytes of the parts of an image model; None where the hub does not tell."""
        return self._size_of(safetensors.parts_of)

    def size_of_gguf(self) -> int | None:
        """Bytes of the only GGUF build; None where there are several, or the hub does not tell."""
        return self._size_of(gguf_build)

    def _size_of(self, chosen: Callable[[Sequence[str]], Sequence[str]]) -> int | None:
        """Bytes of the files that are chosen, from the record with sizes; None: none, or no sizes."""
        from urllib.parse import quote

        url = f"{self.endpoint}/api/models/{self.repo}/revision/{quote(self.revision or 'main', safe='')}"
        response = self._get(url, params={"blobs": True})
        if response.status_code != 200:
            return None
        with contextlib.suppress(ValueError, AttributeError, TypeError, KeyError):
            sizes = {one["rfilename"]: one["size"] for one in response.json()["siblings"]}
            return sum(sizes[name] for name in chosen(list(sizes))) or None
        return None

    def _file(self, name: str, commit: str | None) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo, name, revision=commit or self.revision, endpoint=self.endpoint)

    def start_of(self, name: str, commit: str | None, count: int) -> bytes | None:
        """The first `count` bytes of a file, and no more where the server knows no ranges; None: no such file."""
        from huggingface_hub import get_session

        headers = {**_headers(), "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
        with (
            self._talking(),
            get_session().stream(
                "GET", self._file(name, commit), headers=headers, timeout=_timeout()
            ) as response,
        ):
            if response.status_code == 404:
                return None
            if response.status_code >= 400:
                response.read()
                self._check(response)
            start = b""
            for piece in response.iter_bytes(min(count, 65536)):
                start += piece
                if len(start) >= count:
                    break
            return start[:count]

    def _get(self, url: str, params: Mapping[str, Any] | None = None) -> Response:
        from huggingface_hub import get_session

        with self._talking():
            return get_session().get(url, headers=_headers(), params=params, timeout=_timeout())

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        from httpx2 import HTTPError, InvalidURL

        try:
            yield
        except (HTTPError, InvalidURL, OSError, ValueError) as error:  # ValueError: a strange proxy or token
            if isinstance(error, GpuctlError):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UnreachableError(
                f"MODEL: {self.repo}: {self.endpoint} does not answer ({reason})",
                hint="try again, or give an alias",
            ) from error

    def _check(self, response: Response) -> None:
        from huggingface_hub import hf_raise_for_status
        from huggingface_hub.errors import HfHubHTTPError

        try:
            hf_raise_for_status(response)
        except HfHubHTTPError as error:
            self._refused(error, response)

    def _refused(self, error: Exception, response: Response) -> NoReturn:
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        if isinstance(error, GatedRepoError) or response.status_code == 403:
            raise gated(self.repo, with_token=bool(_token())) from error
        if isinstance(error, RevisionNotFoundError):
            raise usage_error(f"MODEL: {self.repo} has no revision {self.revision!r}") from error
        if response.status_code == 401 and "Invalid credentials" in response.headers.get(
            "X-Error-Message", ""
        ):
            raise GpuctlError(
                "Hugging Face refuses your token: it is wrong, or was revoked",
                hint="set HF_TOKEN to a valid one, or unset it (`hf auth login` keeps one in a file, too)",
            ) from error
        if isinstance(error, RepositoryNotFoundError) or response.status_code in (401, 404):
            raise self._not_found(with_token=bool(_token())) from error
        raise UnreachableError(
            f"MODEL: {self.repo}: {self.endpoint} answered {response.status_code}", hint="try again later"
        ) from error

    def _not_found(self, *, with_token: bool) -> GpuctlError:
        """The hub answers alike for what does not exist and for what is private; and it may be no model."""
        for kind in ("dataset", "space"):
            with contextlib.suppress(GpuctlError):
                if self._get(f"{self.endpoint}/api/{kind}s/{self.repo}").status_code == 200:
                    return usage_error(
                        f"MODEL: {self.repo} is a {kind} of Hugging Face, not a model: "
                        f"{self.endpoint}/{kind}s/{self.repo}"
                    )
        private = "" if with_token else "; for a private one, set HF_TOKEN"
        return NotFoundError(
            f"MODEL: Hugging Face has no repository {self.repo!r}",
            hint=f"check the spelling{private}",
            exit_code=EXIT_USAGE,
        )


def _token() -> str | None:
    """The user's token; None too where the file that it should be in cannot be read."""
    from huggingface_hub import get_token

    try:
        return get_token()
    except (OSError, ValueError):
        return None


def _timeout() -> Timeout:
    from httpx2 import Timeout

    return Timeout(_TIMEOUT, connect=_CONNECT_TIMEOUT)


def _headers() -> dict[str, str]:
    """Not huggingface_hub's own: to say which program calls it, it may ask the hub a question of its own first."""
    token = _token()
    return {"User-Agent": f"gpuctl/{__version__}"} | ({"Authorization": f"Bearer {token}"} if token else {})


def gated(repo: str, *, with_token: bool) -> GatedError:
    """What to do about a gated repository: which page, and which command."""
    who = "the account of your token has not accepted its licence" if with_token else "there is no token"
    return GatedError(
        f"MODEL: {repo} is gated, and {who}",
        hint=(
            f"accept its licence at https://huggingface.co/{repo}, set HF_TOKEN to a token of that account, and make "
            "the Secret for the container: put a line HF_TOKEN=… into a file, say hf.env, then "
            "`modal secret create huggingface --from-dotenv hf.env`"
        ),
        exit_code=EXIT_USAGE,
    )


def _no_model(repo: str, files: Sequence[str] | None) -> GpuctlError:
    """Why a repository without config.json is nothing to serve."""
    return usage_error(
        f"MODEL: {repo} has no config.json, so it is no model to serve: it holds {what_it_holds(files or ())}"
    )


def what_it_holds(names: Sequence[str]) -> str:
    """What a repository or a folder without config.json is, in words, from the names of its files."""
    if "adapter_config.json" in names:
        return "an adapter (LoRA), to be loaded on top of the model that its adapter_config.json names"
    if any(name.endswith(".gguf") for name in names):
        return (
            "GGUF files for llama.cpp; give the repository that they were made from, or one with safetensors"
        )
    if any(name.endswith((".safetensors", ".bin", ".pt", ".onnx")) for name in names):
        return "weights, and nothing that says of which architecture they are"
    return "no weights either" if names else "nothing that describes a model"


# As a config.json would say that the weights are GGUF: how many bits each has, only the size of the file tells.
GGUF: Mapping[str, Any] = {"quant_method": "gguf"}


def only_gguf(names: Sequence[str]) -> bool:
    """Whether GGUF files are the only weights that an engine could load."""
    ends = [name.rpartition(".")[2] for name in names if "/" not in name]
    return "gguf" in ends and not {"safetensors", "bin", "pt"} & set(ends)


def gguf_build(names: Sequence[str]) -> list[str]:
    """The files of the only GGUF build among these; none where there are several, which differ in size."""
    builds: dict[str, list[str]] = {}
    for name in names:
        # `mmproj-…` is a tower for images, which stands beside each build
        if name.endswith(".gguf") and not name.rpartition("/")[2].startswith("mmproj"):
            builds.setdefault(re.sub(r"-[0-9]{5}-of-[0-9]{5}(?=\.gguf$)", "", name), []).append(name)
    return next(iter(builds.values())) if len(builds) == 1 else []


def says_how_stored(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says how the weights are quantised."""
    inner = config.get("text_config")
    tables = (config, inner) if isinstance(inner, dict) else (config,)
    return any(table.get(name) for table in tables for name in ("quantization_config", "compression_config"))


def _commit(text: object) -> str | None:
    return text if isinstance(text, str) and COMMIT.fullmatch(text) else None


# The hub counts parameters, not elements: where several are packed into one (MXFP4 in U8, GPTQ and AWQ in I32), its
# count times the size of the type is not what lies in memory. gpt-oss-20b: 19.7e9 "U8" of 10.2e9 bytes.
_PACKING = {"U8", "I32", "U32", "F4", "I4", "U4"}


def _counts(found: Any) -> dict[str, int] | None:
    """Elements by dtype from the hub's count of parameters; None where it has none, or counts something else."""
    if not isinstance(found, dict) or not found or _PACKING & found.keys():
        return None
    counts = {str(dtype): count for dtype, count in found.items() if isinstance(count, int) and count >= 0}
    return counts if len(counts) == len(found) else None


def document_of(text: str) -> Described | None:
    """What `Described.document` wrote; None where it is not that."""
    try:
        found = json.loads(text)
        return Described(
            repo=found["repo"],
            commit=found["commit"],
            config=found["config"],
            parameters=found["parameters"],
            weight_bytes=found["weight_bytes"],
            pipeline=found["pipeline"],
            gated=found["gated"],
            quantization=found["quantization"],
        )
    except (ValueError, KeyError, TypeError):
        return None
