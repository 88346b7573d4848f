"""MODEL becomes facts: from the hub (a stand-in, asked by the real huggingface_hub), a folder, the catalogue."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuctl import configs
from gpuctl.configs import Found, find
from gpuctl.errors import GpuctlError
from gpuctl.fit.values import Ask
from gpuctl.fitting import cards, facts_of, judge_with
from gpuctl.prices import from_catalogue
from gpuctl.safetensors import parts_of
from gpuctl.specs.model import ModelRef
from hubs import COMMIT, Hub, Repo, answering, safetensors_of

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64}


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with answering() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        hub.repos["acme/model"] = Repo(
            files={"config.json": json.dumps(CONFIG).encode(), "model.safetensors": b"x" * 5_000_000},
            record={"safetensors": {"parameters": {"BF16": 1000, "F32": 10}, "total": 1010}},
        )
        yield hub


def problem(text: str, **options: bool) -> GpuctlError:
    with pytest.raises(GpuctlError) as caught:
        find(text, **options)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith("MODEL: ")
    return caught.value


# -- the hub


def test_two_small_requests_tell_what_a_repository_holds(hub: Hub) -> None:
    found = find("acme/model")
    assert found.config == CONFIG
    assert (found.parameters, found.weight_bytes) == ({"BF16": 1000, "F32": 10}, 2040)
    assert (found.repo, found.revision, found.notes) == ("acme/model", COMMIT, ())
    assert hub.paths == ["/api/models/acme/model", f"/acme/model/resolve/{COMMIT}/config.json"]
    assert hub.sent < 2000


def test_what_was_told_is_kept_by_commit(hub: Hub) -> None:
    first = find("acme/model")
    hub.seen.clear()
    again = find("acme/model")
    assert hub.paths == ["/api/models/acme/model"]  # has the branch moved?
    assert (again.config, again.weight_bytes) == (first.config, first.weight_bytes)
    hub.seen.clear()
    assert find(f"acme/model@{COMMIT}").config == CONFIG
    assert hub.seen == []
    hub.repos["acme/model"].commit = "f" * 40
    hub.repos["acme/model"].files["config.json"] = b"{}"
    assert find("acme/model").config == {}


def test_where_the_hub_is_down_what_it_said_before_is_used(hub: Hub) -> None:
    find("acme/model")
    hub.status = 503
    found = find("acme/model")
    assert found.config == CONFIG
    (note,) = found.notes
    assert "answered 503" in note
    assert "going on from what the hub said a moment ago" in note
    assert find("acme/model", online=False).config == CONFIG


def test_where_the_hub_is_down_what_was_downloaded_is_used(hub: Hub, tmp_path: Path) -> None:
    hub.status = 503
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub")}
    model = tmp_path / "hub" / "models--acme--here"
    snapshot = model / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    (snapshot / "config.json").write_text(json.dumps(CONFIG))
    (snapshot / "model.safetensors").write_bytes(safetensors_of({"a": ("BF16", [100])}))
    ask = "from gpuctl.configs import find; f = find('acme/here'); print(f.config, f.weight_bytes, f.notes)"
    done = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True, check=True)
    assert str(CONFIG) in done.stdout
    assert " 200 " in done.stdout
    assert "going on from what was downloaded" in done.stdout


def test_where_the_hub_is_down_and_nothing_is_known(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.status = 500
    error = problem("acme/model")
    assert error.exit_code == 1
    assert "answered 500" in str(error)
    assert "neither the cache nor the catalogue" in str(error)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "does not answer" in str(problem("acme/model"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in str(problem("acme/model"))


def test_nothing_is_asked_where_nobody_may_be(hub: Hub) -> None:
    found = find("acme/model", online=False)
    assert (found.config, found.weight_bytes) == ({}, None)
    assert hub.seen == []


def test_the_token_goes_along(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    find("acme/model@main")
    assert {authorization for _, authorization, _ in hub.seen} == {"Bearer hf_x"}
    assert hub.paths[0] == "/api/models/acme/model/revision/main"


def test_packed_weights_are_counted_by_the_index_not_by_the_hub(hub: Hub) -> None:
    # gpt-oss: the record counts parameters, four bits each; `metal/` and `original/` are copies.
    hub.repos["acme/packed"] = Repo(
        files={
            "config.json": json.dumps(CONFIG).encode(),
            "metal/model.bin": b"y" * 900,
            "original/model.safetensors": safetensors_of({"a": ("U8", [7])}),
            "model.safetensors.index.json": json.dumps(
                {"metadata": {"total_size": 13761264768}, "weight_map": {f"w{i}": "a" for i in range(9999)}}
            ).encode(),
        },
        record={"safetensors": {"parameters": {"BF16": 1804459584, "U8": 19707494400}}},
    )
    found = find("acme/packed")
    assert (found.parameters, found.weight_bytes) == (None, 13761264768)
    assert hub.sent < 8000
    assert hub.seen[-1][2] == "bytes=0-4095"


@pytest.mark.parametrize("ranges", [True, False])
def test_headers_are_read_where_there_is_no_index(hub: Hub, ranges: bool) -> None:
    hub.ranges = ranges
    hub.repos["acme/one"] = Repo(
        files={
            "config.json": b"{}",
            "model.safetensors": safetensors_of({"a": ("BF16", [3, 5]), "b": ("F8_E4M3", [4])}, 30_000_000),
        }
    )
    found = find("acme/one")
    assert (found.parameters, found.weight_bytes) == ({"BF16": 15, "F8_E4M3": 4}, 34)
    assert hub.sent < 20_000_000 if not ranges else hub.sent < 2000


def test_an_index_that_states_its_total_at_the_end(hub: Hub) -> None:
    index = {"weight_map": {f"w{i}": "a.safetensors" for i in range(999)}, "metadata": {"total_size": 77}}
    hub.repos["acme/late"] = Repo(
        files={"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()}
    )
    assert find("acme/late").weight_bytes == 77


def test_how_weights_are_stored_may_stand_in_a_file_of_its_own(hub: Hub, tmp_path: Path) -> None:
    stored = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    config = json.dumps(CONFIG).encode()
    files = {"config.json": config, "hf_quant_config.json": json.dumps(stored).encode()}
    hub.repos["nvidia/model-FP8"] = Repo(files=files)
    assert find("nvidia/model-FP8").quantization == stored
    assert find("nvidia/model-FP8", online=False).quantization == stored
    files["config.json"] = json.dumps(CONFIG | {"quantization_config": {"quant_method": "fp8"}}).encode()
    hub.repos["nvidia/model-FP8"].commit = "e" * 40
    assert find("nvidia/model-FP8").quantization is None
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert find(str(tmp_path)).quantization == stored


def test_weights_of_pytorch_are_known_by_their_size(hub: Hub) -> None:
    hub.repos["acme/old"] = Repo(
        files={"config.json": b"{}", "pytorch_model-1.bin": b"x" * 700, "a.bin": b"y"}
    )
    assert find("acme/old").weight_bytes == 700


def test_an_image_model_is_known_by_its_parts(hub: Hub, tmp_path: Path) -> None:
    hub.repos["acme/image"] = Repo(
        files={
            "model_index.json": b"{}",
            "all-in-one.safetensors": b"x" * 1000,
            "vae/model.safetensors": b"x" * 30,
            "vae/model.fp16.safetensors": b"x" * 15,
            "unet/model.safetensors": b"x" * 200,
        }
    )
    found = find("acme/image")
    assert (found.config, found.weight_bytes, found.pipeline) == ({}, 230, "text-to-image")
    for name, content in hub.repos["acme/image"].files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    found = find(str(tmp_path))
    assert (found.config, found.weight_bytes, found.pipeline) == ({}, 230, "text-to-image")
    assert parts_of(["a.safetensors", "vae/x.fp16.safetensors", "vae/readme.md"]) == [
        "vae/x.fp16.safetensors"
    ]


def test_a_mirror_without_an_api(hub: Hub) -> None:
    hub.api = False
    hub.repos["acme/mirrored"] = Repo(
        files={"config.json": b'{"a": 1}', "model.safetensors": safetensors_of({"a": ("F16", [8])})}
    )
    found = find("acme/mirrored")
    assert (found.config, found.weight_bytes, found.revision) == ({"a": 1}, 16, None)


def test_what_is_no_hub_at_all_is_not_believed(hub: Hub) -> None:
    hub.api = False  # a proxy that knows nothing of the hub answers so, too
    hub.status = 404
    assert "answers as no hub does" in str(problem("acme/model"))
    assert find("Qwen/Qwen3-8B").source == "the catalogue"


def test_a_cache_that_cannot_be_written_is_none(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert find("acme/model").config == CONFIG
    assert find("acme/model").config == CONFIG


def test_a_gated_repository_says_which_page_and_which_command(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["acme/gated"] = Repo(files={"config.json": b"{}"}, gated=True)
    error = problem("acme/gated")
    assert error.exit_code == 2
    assert "acme/gated is gated" in str(error)
    assert "https://huggingface.co/acme/gated" in (error.hint or "")
    assert "modal secret create huggingface" in (error.hint or "")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert find("acme/gated").config == {}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "adapter (LoRA)"),
        (["model-Q4_K_M.gguf", "README.md"], "GGUF"),
        (["model.safetensors"], "of which architecture"),
        (["README.md"], "no weights"),
    ],
)
def test_what_is_no_model_is_named(hub: Hub, tmp_path: Path, files: list[str], says: str) -> None:
    hub.repos["acme/other"] = Repo(files=dict.fromkeys(files, b"x"))
    error = problem("acme/other")
    assert error.exit_code == 2
    assert "acme/other has no config.json" in str(error)
    assert says in str(error)
    for file in files:
        (tmp_path / file).write_bytes(b"x")
    assert says in str(problem(str(tmp_path)))


def test_a_dataset_is_no_model(hub: Hub) -> None:
    hub.repos["acme/data"] = Repo(kind="dataset")
    error = problem("acme/data")
    assert error.exit_code == 2
    assert "is a dataset" in str(error)


def test_what_the_hub_does_not_have(hub: Hub) -> None:
    missing = problem("acme/missing")
    assert missing.exit_code == 2
    assert "no repository 'acme/missing'" in str(missing)
    assert "HF_TOKEN" in (missing.hint or "")
    assert "near it: Qwen/Qwen3-8B (qwen3)" in str(problem("qwen/Qwen3-8"))
    revision = problem("acme/model@v9")
    assert revision.exit_code == 2
    assert "no revision 'v9'" in str(revision)


@pytest.mark.parametrize("config", [b"<html>", b"[]", b"\xff", b"1"])
def test_a_config_that_is_none(hub: Hub, tmp_path: Path, config: bytes) -> None:
    hub.repos["acme/bad"] = Repo(files={"config.json": config})
    assert problem("acme/bad").exit_code == 2
    (tmp_path / "config.json").write_bytes(config)
    assert problem(str(tmp_path)).exit_code == 2


# -- a folder, a config.json


def test_a_folder_is_counted_by_the_headers_of_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model-1.safetensors").write_bytes(safetensors_of({"a": ("BF16", [10, 10])}))
    (tmp_path / "model-2.safetensors").write_bytes(safetensors_of({"b": ("BF16", [])}))
    (tmp_path / "consolidated.safetensors").write_bytes(safetensors_of({"a": ("BF16", [10, 10])}))
    found = find(str(tmp_path))
    assert (found.parameters, found.weight_bytes, found.config) == ({"BF16": 101}, 202, CONFIG)
    index = {"metadata": {"total_size": 7}, "weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find(str(tmp_path)).weight_bytes == 200
    index["weight_map"] = {"a": "not-downloaded.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find(str(tmp_path)).weight_bytes == 7


def test_a_config_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = find(str(tmp_path / "config.json"))
    assert (found.config, found.weight_bytes, found.repo) == (CONFIG, None, None)
    monkeypatch.chdir(tmp_path)
    assert find("config.json").config == CONFIG
    assert find("./").config == CONFIG
    assert find(".").config == CONFIG
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "config.json").write_text("{}")
    assert find("org/name").config == {}


def test_paths_that_are_none(tmp_path: Path) -> None:
    assert "there is no" in str(problem("./nowhere"))
    assert "there is no" in str(problem("nowhere.json"))
    (tmp_path / "broken.safetensors").write_bytes(b"1234567")
    (tmp_path / "config.json").write_text("{}")
    assert "shorter than 8 bytes" in str(problem(str(tmp_path)))
    assert "holds weights: give the folder" in str(problem(str(tmp_path / "broken.safetensors")))


def test_neither_alias_nor_repository() -> None:
    assert "did you mean llama3" in str(problem("lama3"))
    assert problem("a b").exit_code == 2


def test_the_catalogue_answers_for_its_aliases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    found = find("qwen3")
    assert (found.config["hidden_size"], found.source, found.notes) == (4096, "the catalogue", ())
    by_repo = find("Qwen/Qwen3-8B")
    assert by_repo.config == found.config
    assert "does not answer" in by_repo.notes[0]
    assert "going on from the catalogue" in by_repo.notes[0]


def test_where_the_catalogue_has_only_a_size_the_hub_is_asked(hub: Hub) -> None:
    """`bge-m3` is judged by its weights, of which the catalogue knows how many parameters they are."""
    hub.repos["BAAI/bge-m3"] = Repo(files={"config.json": json.dumps(CONFIG).encode()})
    assert find("bge-m3").config == CONFIG
    hub.repos.clear()
    hub.status = 503
    assert find("bge-m3").config == CONFIG  # as kept
    other = find("bge-large-en")
    assert other.config == {}
    assert other.weight_bytes == pytest.approx(0.335e9 * 2, rel=0.01)
    assert facts_of(other).kind == "embedding"
    assert "going on from the catalogue" in other.notes[0]


# -- what is about to be deployed


def test_a_deployment_goes_on_where_nothing_can_be_learnt(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = ModelRef.parse("acme/model")
    assert configs.of_deployment(ref, COMMIT).config == CONFIG
    assert [path for path in hub.paths if path.startswith("/api")] == [
        f"/api/models/acme/model/revision/{COMMIT}"
    ]
    hub.repos["acme/gated"] = Repo(files={"config.json": b"{}"}, gated=True)
    kept_out = configs.of_deployment(ModelRef.parse("acme/gated"), COMMIT)
    assert (kept_out.config, kept_out.weight_bytes) == ({}, None)
    assert "acme/gated is gated" in kept_out.notes[0]
    hub.status = 503
    assert "answered 503" in configs.of_deployment(ModelRef.parse("acme/other"), COMMIT).notes[0]
    hub.seen.clear()
    assert configs.of_deployment(ModelRef.parse("qwen3"), COMMIT).source == "the catalogue"
    assert configs.of_deployment(ModelRef.parse("tiny"), None).config["model_type"] == "llama"
    assert hub.seen == []


def test_what_is_no_model_is_not_deployed_unless_forced(hub: Hub) -> None:
    hub.repos["acme/gguf"] = Repo(files={"a.gguf": b"x"})
    ref = ModelRef.parse("acme/gguf")
    with pytest.raises(GpuctlError, match="GGUF") as caught:
        configs.of_deployment(ref, COMMIT)
    assert caught.value.exit_code == 2
    assert "GGUF" in configs.of_deployment(ref, COMMIT, force=True).notes[0]


def test_weights_in_32_bits_are_loaded_in_16() -> None:
    def loaded(**parameters: int) -> int | None:
        size = sum({"F32": 4, "BF16": 2, "F8_E4M3": 1}[dtype] * count for dtype, count in parameters.items())
        return facts_of(Found("m", None, None, {}, parameters, size, None, "a test")).weight_bytes

    assert loaded(F32=100) == 200
    assert loaded(F32=100, BF16=10) == 220
    assert loaded(F32=10, F8_E4M3=100) == 140
    assert loaded(BF16=100) == 200


def test_weights_that_nobody_knows_how_are_stored_are_never_said_not_to_fit() -> None:
    found = configs.of_ref(ModelRef.parse("nvidia/Llama-3.1-70B-Instruct-FP8"), online=False)
    assert found.left_open is not None
    assert "reckoned as 16 bits each" in found.notes[0]
    facts, judge = facts_of(found), judge_with("0.32.0", found)
    known = cards(from_catalogue("a test"))
    verdicts = {name: judge(facts, known[name], 1, Ask(concurrency=1)).verdict for name in ("H100", "B200")}
    assert verdicts == {"H100": "unknown", "B200": "fits"}


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HF_TOKEN", "h\u00e9"),
        ("https_proxy", "foo://x"),
        ("HF_ENDPOINT", "http://[::1"),
        ("HF_ENDPOINT", "http://"),
        ("HF_ENDPOINT", "http://127.0.0.1:1"),
        ("HF_TOKEN_PATH", "/root"),
        ("HF_HOME", "/dev/null"),
        ("XDG_CACHE_HOME", "/dev/null"),
    ],
)
def test_a_broken_environment_is_one_error(variable: str, value: str) -> None:
    """In a process of its own: huggingface_hub reads it when it is imported."""
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:1", variable: value}
    done = subprocess.run(
        [sys.executable, "-m", "gpuctl", "fit", "acme/x"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1


def test_gguf_counts_by_the_size_of_its_file(hub: Hub, tmp_path: Path) -> None:
    config = json.dumps(CONFIG).encode()
    hub.repos["acme/one"] = Repo(
        files={"config.json": config, "m-Q4_K_M.gguf": b"x" * 900, "mmproj-m.gguf": b"x"}
    )
    parts = {f"m-Q8_0-0000{i}-of-00002.gguf": b"x" * 50 for i in (1, 2)}
    hub.repos["acme/parts"] = Repo(files={"config.json": config, **parts})
    hub.repos["acme/many"] = Repo(files={"config.json": config, "m-Q4.gguf": b"x", "m-Q8.gguf": b"xx"})
    hub.repos["acme/both"] = Repo(
        files={
            "config.json": config,
            "m.gguf": b"x",
            "model.safetensors": safetensors_of({"a": ("F16", [8])}),
        }
    )
    sizes = {}
    for name in ("one", "parts", "many", "both"):
        found = configs.find(f"acme/{name}")
        sizes[name] = (found.weight_bytes, (found.quantization or {}).get("quant_method"))
        again = configs.find(f"acme/{name}")  # from the cache
        assert (again.weight_bytes, again.quantization) == (found.weight_bytes, found.quantization)
    assert sizes["one"] == (900, "gguf")
    assert sizes["parts"] == (100, "gguf")
    assert sizes["many"] == (None, "gguf")
    assert sizes["both"][1] is None

    for name, content in hub.repos["acme/one"].files.items():
        (tmp_path / name).write_bytes(content)
    found = configs.find(str(tmp_path))
    assert (found.weight_bytes, found.quantization) == (900, {"quant_method": "gguf"})
    (tmp_path / "m-Q8_0.gguf").write_bytes(b"x" * 1000)
    assert configs.find(str(tmp_path)).weight_bytes is None
