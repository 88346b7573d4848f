"""What MODEL may be. May import: gpuctl.errors, gpuctl.catalog, gpuctl.specs.names.

An alias of the catalogue (`llama3`), or a repository of Hugging Face, `org/name[@revision]`, where the revision is a
branch, a tag or a commit. Bulk jobs also take a folder of this machine (`of_folder`).
"""

from __future__ import annotations

import difflib
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from gpuctl import catalog
from gpuctl.catalog.repository import is_repository, is_revision
from gpuctl.errors import usage_error
from gpuctl.specs import names

TINY = "tiny"
PIPELINE = "model_index.json"  # of diffusers: the parts of what makes pictures
_COMMIT = re.compile(r"[0-9a-f]{40}")
# "-8B", "_70b", "-0.6B-Instruct": most makers say in the name how many parameters a model has. A mixture of experts
# names both ("-30B-A3B"): the whole comes first, and the whole is what must be downloaded.
_BILLIONS = re.compile(
    r"(?:^|[-_.])(?:(?P<experts>[0-9]{1,3})x)?(?P<size>[0-9]{1,4}(?:\.[0-9]{1,3})?)b(?:$|[-_.])", re.I
)


@dataclass(frozen=True)
class ModelRef:
    """A model: by which alias, if any; its repository (None: made on the spot, or in `folder`); the revision that was
    asked for.
    """

    alias: str | None
    repo: str | None
    revision: str | None = None
    folder: Path | None = None  # of this machine, that holds a pipeline; `revision` is of its files, then

    @classmethod
    def of_folder(cls, text: str) -> ModelRef | None:
        """Read MODEL as a folder with a pipeline of diffusers, as `./my-model`; None where it is no path.

        A usage error where it is one, and there is no such folder, or something else in it.
        """
        path = Path(text).expanduser()
        like_one = re.match(r"(?:\.{0,2}|~)/", text) is not None or text in (".", "..")
        try:
            if not like_one and not (path / PIPELINE).is_file():
                return None
            if not path.is_dir():
                raise usage_error(f"MODEL: there is no folder {text!r}")
            if not (path / PIPELINE).is_file():
                raise usage_error(
                    f"MODEL: {text!r} has no {PIPELINE}: of this machine's folders, jobs take pipelines of diffusers, "
                    "which make pictures"
                )
            files = sorted(file for file in path.rglob("*") if file.is_file())
            facts = [(file.relative_to(path).as_posix(), file.stat()) for file in files]
        except OSError as error:
            raise usage_error(f"MODEL: {text!r} cannot be read: {error.strerror}") from error
        listed = "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in facts)
        return cls(None, None, hashlib.sha1(listed.encode()).hexdigest(), path.resolve())  # noqa: S324 - a name

    @property
    def tiny(self) -> bool:
        """Whether the rendered file makes it."""
        return self.repo is None and self.folder is None

    @classmethod
    def parse(cls, text: str) -> ModelRef:
        """Read MODEL; a usage error names what was given and what would work."""
        if not text.strip():
            raise usage_error(
                "MODEL: nothing given; give an alias (such as qwen3) or org/name of Hugging Face"
            )
        repo, at, revision = text.partition("@")
        if at and not is_revision(revision):
            raise usage_error(f"MODEL: {revision!r} in {text!r} is no branch, tag or commit")
        known = catalog.named(repo)
        if known is not None:
            if at and known.repo is None:
                raise usage_error(f"MODEL: {known.alias} has no revisions: it is made on the spot")
            return cls(repo, known.repo, revision or known.revision)
        if is_repository(repo):
            return cls(None, repo, revision or None)
        if re.fullmatch(r"[A-Za-z0-9._-]+", repo) and ".." not in repo:
            raise usage_error(
                f"MODEL: unknown alias {repo!r}; {_near(repo)} or give org/name of Hugging Face"
            )
        raise usage_error(
            f"MODEL: {text!r} is neither an alias nor org/name[@revision] "
            "(letters, digits, '-', '_' and '.', one slash)"
        )

    @property
    def title(self) -> str:
        """What the model is called in messages: its repository, its folder, or `tiny`."""
        return str(self.folder) if self.folder is not None else self.repo or TINY

    @property
    def pinned(self) -> bool:
        """Whether it is always the same model: an exact commit, or made on the spot."""
        return self.repo is None or _COMMIT.fullmatch(self.revision or "") is not None

    @property
    def served_names(self) -> tuple[str, ...]:
        """The names that requests may give as `model`: what the user typed first, then the repository."""
        return tuple(dict.fromkeys(name for name in (self.alias, self.repo) if name))

    @property
    def served_name(self) -> str:
        """The name to send."""
        return self.served_names[0]

    @property
    def default_name(self) -> str:
        """A name for the App: the alias, or the repository's own name as Modal accepts it."""
        return names.slug(self.alias or self.title.rpartition("/")[2]) or "model"

    @property
    def entry(self) -> catalog.Model | None:
        """The catalogue's facts about it, also when it was named by repository."""
        if self.alias is not None:
            return catalog.named(self.alias)
        return None if self.repo is None else catalog.of_repo(self.repo)

    @property
    def download_gib(self) -> float | None:
        """GiB of weights: from the catalogue, else from the size that the name states (bfloat16), else None."""
        entry = self.entry
        if entry is not None:
            return entry.download_gib
        match = _BILLIONS.search(self.title.rpartition("/")[2])
        if match is None:
            return None
        return catalog.gib_of_parameters(float(match["size"]) * int(match["experts"] or 1))


def _near(alias: str) -> str:
    near = difflib.get_close_matches(alias.lower(), catalog.names(), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else "`gpuctl models` lists those that there are;"
