"""What `gpuctl serve` accepts, what it refuses and how it says so."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modal._utils import name_utils  # the rules themselves
from modal._utils.mount_utils import validate_mount_points
from modal.exception import InvalidError

from gpuctl.errors import GpuctlError
from gpuctl.specs import names
from gpuctl.specs.engine_args import RESERVED, check_engine_args, gives
from gpuctl.specs.model import ModelRef
from gpuctl.specs.resources import Amount, VolumeMount
from gpuctl.specs.serve import ServeSpec, default_startup_timeout
from gpuctl.target import Target


def spec(**options: Any) -> ServeSpec:
    return ServeSpec.from_options(**{"model": "qwen3", "gpu": "H100"} | options)


def problems(**options: Any) -> tuple[str, ...]:
    with pytest.raises(GpuctlError) as caught:
        spec(**options)
    assert caught.value.exit_code == 2
    return caught.value.problems


def test_defaults() -> None:
    made = spec()
    assert (made.name, made.model.repo, str(made.gpu)) == ("qwen3", "Qwen/Qwen3-8B", "H100")
    assert (made.concurrency, made.min_containers, made.max_containers, made.scaledown) == (32, 0, 1, 300)
    assert (made.routing_region, made.auth, made.vllm_version) == ("us-east", True, "0.32.0")
    assert made.target is Target.MODAL


def test_every_option_arrives() -> None:
    made = spec(
        name="x",
        concurrency="4",
        min_containers="1",
        max_containers="2",
        buffer_containers="0",
        scaledown="60",
        max_model_len="1024",
        cpu="0.5",
        memory="1024,2048",
        ephemeral_disk="5",
        region="us, eu",
        routing_region="ap-south",
        cloud="gcp",
        startup_timeout="700",
        secret=["s"],
        secret_from_env=["TOKEN"],
        env_var=["A=b=c"],
        volume=["data:/data"],
        env="dev",
        tag=["k=v"],
        deploy_tag="v1",
        strategy="rolling",
        auth=False,
        vllm_version="0.31.0",
        pip=["a==1"],
        apt=["git"],
        engine_args=["--enforce-eager"],
    )
    assert made.cpu == Amount(0.5)
    assert made.memory == Amount(1024, 2048)
    assert made.region == ("us", "eu")
    assert made.env_vars == (("A", "b=c"),)
    assert made.volumes == (VolumeMount("data", "/data"),)
    assert made.buffer_containers == 0
    assert made.startup_timeout == 700
    assert made.engine_args == ("--enforce-eager",)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"gpu": "auto,H100"}, "'auto' stands alone"),
        ({"concurrency": "0"}, "--concurrency: '0'"),
        ({"concurrency": "-1"}, "--concurrency: '-1'"),
        ({"concurrency": "many"}, "--concurrency: 'many'"),
        ({"concurrency": "99999999999"}, "--concurrency"),
        ({"max_containers": "0"}, "--max-containers: '0'"),
        (
            {"min_containers": "3", "max_containers": "2"},
            "--min-containers: 3 is more than --max-containers 2",
        ),
        ({"min_containers": "3"}, "--max-containers 1 (its default)"),
        ({"scaledown": "1"}, "from 2 to 3600"),
        ({"startup_timeout": "0"}, "--startup-timeout"),
        ({"startup_timeout": "90000"}, "86400"),
        ({"cpu": "x"}, "--cpu: 'x'"),
        ({"cpu": "0"}, "--cpu: '0'"),
        ({"memory": "16Gi"}, "MiB"),
        ({"memory": "2048,1024"}, "less than the request"),
        ({"memory": "1,2,3"}, "--memory"),
        ({"region": "US East"}, "--region"),
        ({"region": "us,"}, "--region"),
        ({"routing_region": "mars"}, "us-east, us-west, eu-west, ap-south"),
        ({"cloud": "azure"}, "aws, gcp, oci, auto"),
        ({"strategy": "yolo"}, "rolling, recreate"),
        ({"name": "a b"}, "1 to 64 letters"),
        ({"name": ""}, "1 to 64 letters"),
        ({"name": "ap-" + "a" * 22}, "App id"),
        ({"env": "en-1"}, "not with 'en-'"),
        ({"deploy_tag": "x" * 51}, "1 to 50 letters"),
        ({"tag": ["k"]}, "KEY=VALUE"),
        ({"tag": ["k=" + "x" * 64]}, "1 to 63 letters"),
        ({"tag": ["k=1", "k=2"]}, "twice"),
        ({"secret": ["a/b"]}, "--secret: "),
        ({"secret_from_env": ["1X"]}, "--secret-from-env: "),
        ({"env_var": ["1X=2"]}, "no name of a variable"),
        ({"env_var": ["VLLM_API_KEY=x"]}, "authenticated by Modal"),
        ({"env_var": ["VLLM_NO_USAGE_STATS=0"]}, "set by gpuctl itself"),
        ({"env_var": ["X=1"], "secret_from_env": ["X"]}, "too"),
        ({"env_var": ["X=\ud800"]}, "--env-var"),
        ({"volume": ["data"]}, "has no path"),
        ({"volume": ["data:"]}, "has no path"),
        ({"volume": ["data:data"]}, "absolute path"),
        ({"volume": ["data:/a/../b"]}, "canonical"),
        ({"volume": ["data:/root"]}, "/root"),
        ({"volume": ["data:/root/.cache/vllm"]}, "collides with the cache"),
        ({"volume": ["vllm-cache:/x"]}, "collides with the cache"),
        ({"volume": ["a:/x", "b:/x/y"]}, "overlap"),
        ({"volume": ["a:/x", "a:/y"]}, "twice"),
        ({"vllm_version": "latest"}, "exact version"),
        ({"pip": ["--index-url=x"]}, "--pip"),
        ({"pip": ["a\nb"]}, "--pip"),
        ({"apt": ["Git!"]}, "--apt"),
        ({"engine_args": ["--max-num-seqs", "4"]}, "use --concurrency"),
        ({"engine_args": ["stray"]}, "follow a --"),
    ],
)
def test_refuses(options: dict[str, Any], says: str) -> None:
    assert any(says in problem for problem in problems(**options)), problems(**options)
    assert all("\n" not in problem for problem in problems(**options))


def test_all_problems_are_reported_at_once() -> None:
    said = problems(model="../x", gpu="H1000", concurrency="0", volume=["x"], engine_args=["-tp", "2"])
    assert len(said) == 5


def test_a_refused_variable_is_not_printed() -> None:
    assert not any("hunter2" in problem for problem in problems(env_var=["hunter2"]))


def test_no_gpu_is_needed_locally() -> None:
    assert spec(gpu=None, target=Target.LOCAL).gpu is None
    with pytest.raises(GpuctlError):
        spec(gpu="H1000", target=Target.LOCAL)


# -- MODEL


@pytest.mark.parametrize(
    ("text", "repo", "revision", "name", "served"),
    [
        ("qwen3", "Qwen/Qwen3-8B", None, "qwen3", ("qwen3", "Qwen/Qwen3-8B")),
        ("qwen3@main", "Qwen/Qwen3-8B", "main", "qwen3", ("qwen3", "Qwen/Qwen3-8B")),
        ("tiny", None, None, "tiny", ("tiny",)),
        ("Acme/My_Model.v2@refs/pr/1", "Acme/My_Model.v2", "refs/pr/1", "my_model.v2", ("Acme/My_Model.v2",)),
    ],
)
def test_models(
    text: str, repo: str | None, revision: str | None, name: str, served: tuple[str, ...]
) -> None:
    model = ModelRef.parse(text)
    assert (model.repo, model.revision, model.default_name, model.served_names) == (
        repo,
        revision,
        name,
        served,
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "nothing given"),
        (" ", "nothing given"),
        ("a b", "neither an alias"),
        ("org/a b", "neither an alias"),
        ("../x", "neither an alias"),
        ("a/../b", "neither an alias"),
        ("/", "neither an alias"),
        ("org/", "neither an alias"),
        ("a/b/c", "neither an alias"),
        ("https://huggingface.co/a/b", "neither an alias"),
        ("a/b\n", "neither an alias"),
        ("a/" + "b" * 96, "neither an alias"),
        ("a/b@", "no branch"),
        ("a/b@x y", "no branch"),
        ("a/b@-x", "no branch"),
        ("tiny@main", "no revisions"),
        ("lama3", "did you mean llama3"),
        ("zzz", "`gpuctl models` lists"),
    ],
)
def test_refused_models(text: str, says: str) -> None:
    with pytest.raises(GpuctlError) as caught:
        ModelRef.parse(text)
    (problem,) = caught.value.problems
    assert problem.startswith("MODEL: ")
    assert says in problem
    assert "\n" not in problem


@given(st.text())
def test_any_model_has_a_name_that_modal_accepts(text: str) -> None:
    try:
        model = ModelRef.parse(text)
    except GpuctlError:
        return
    assert name_utils.is_valid_object_name(model.default_name)


def test_startup_timeout_grows_with_the_model() -> None:
    assert default_startup_timeout(ModelRef.parse("tiny").download_gib) == 660
    assert default_startup_timeout(ModelRef.parse("llama3").download_gib) == 900
    assert default_startup_timeout(ModelRef.parse("llama3-70b").download_gib) == 3240
    assert default_startup_timeout(ModelRef.parse("a/Foo-70B-Instruct").download_gib) > 3000
    assert default_startup_timeout(ModelRef.parse("a/Foo-8x7B").download_gib) > 2600
    assert default_startup_timeout(ModelRef.parse("a/unknown").download_gib) == 3600
    assert default_startup_timeout(0) >= 600
    assert default_startup_timeout(1e9) == 86400


# -- the rules of names are Modal's own


@given(st.text(max_size=70) | st.from_regex(r"[a-zA-Z0-9._-]{1,66}", fullmatch=True))
def test_names_are_refused_as_modal_refuses_them(text: str) -> None:
    # Modal's `$` lets a final newline through; a name with one is of no use.
    if text.endswith("\n"):
        return
    assert (names.object_name(text) is None) == name_utils.is_valid_object_name(text)
    assert (names.environment_name(text) is None) == name_utils.is_valid_environment_name(
        text, allow_periods=True
    )
    assert (names.tag(text, longest=50) is None) == name_utils.is_valid_tag(text)
    assert (names.tag(text, longest=63) is None) == name_utils.is_valid_tag(text, 63)


@pytest.mark.parametrize("name", [".", "..", "-x", "--local", "a" * 65, "a/b", "ap-" + "a" * 22])
def test_a_name_must_do_as_a_word_of_a_command_and_as_a_file(name: str) -> None:
    with pytest.raises(GpuctlError, match="--name: "):
        ServeSpec.from_options(model="tiny", name=name, target=Target.LOCAL)


@given(st.from_regex(r"/?[a-z./]{0,12}", fullmatch=True) | st.sampled_from(["/", "/root", "/tmp", "/root/x"]))
def test_paths_are_refused_as_modal_refuses_them(path: str) -> None:
    try:
        validate_mount_points("Volume", {path: object()})  # type: ignore[dict-item]
        accepted = path.startswith("/") and not path.endswith("/")  # Modal takes /x/ for /x
    except InvalidError:
        accepted = False
    if (
        "//" not in path and "/./" not in path and not path.endswith("/.")
    ):  # PurePath tidies these before it looks
        assert (names.mount_path(path) is None) == accepted


# -- what follows --


@pytest.mark.parametrize(
    "arg",
    [
        "--max-num-seqs", "--max-num-seqs=4", "--max_num_seqs", "--max_num-seqs=4", "--max-num-se", "-tp", "-tp=2",
        "-t", "--tensor_parallel_size", "--port=1", "--ho", "--host", "--model", "--served-model-name", "--revision",
        "--api-key",
        "--max-model-len", "--hf-token", "--uds", "--ssl-keyfile=x",
    ],
)  # fmt: skip
def test_engine_flags_that_gpuctl_sets(arg: str) -> None:
    (problem,) = check_engine_args(["--enforce-eager", arg])
    assert problem.startswith(f"-- {arg.partition('=')[0]}")


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--enforce-eager"],
        ["--model-impl", "transformers"],
        ["--max-num-batched-tokens=8192", "--max-num-active-seqs", "4"],
        ["--chat-template", "{{ messages }}\n"],
        ["-O3", "-cc", '{"mode": 3}', "--hf-overrides.num_hidden_layers", "2"],
        ["--tokenizer", "a/b", "--tokenizer-revision", "main"],
        ["--gpu-memory-utilization", "0.8"],
        ["--default-chat-template-kwargs", '{"model": "--model"}'],
    ],
)
def test_other_engine_flags_pass(args: list[str]) -> None:
    assert check_engine_args(args) == []


def test_reserved_flags_name_what_to_use_instead() -> None:
    for flag, advice in RESERVED.items():
        assert flag.startswith("--")
        assert advice


def test_gives() -> None:
    assert gives(["--gpu_memory_utilization=0.8"], "--gpu-memory-utilization")
    assert gives(["--gpu-memory-util", "0.8"], "--gpu-memory-utilization")
    assert not gives(["--gpu"[:-1]], "--max-model-len")


@given(st.lists(st.text(max_size=12), max_size=4))
def test_arbitrary_arguments_raise_nothing(args: list[str]) -> None:
    check_engine_args(args)
