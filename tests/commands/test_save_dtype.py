"""The dtype that results are stored in: float16 for a quantized GGUF file, unless an option says
otherwise."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxprune as jp
from convert import Params, Spec, create_checkpoint, open_checkpoint
from convert.casting import CastReader, cast
from convert.gguf.header import Header
from convert.packed import Reader as Packed
from jaxprune.__main__ import main
from jaxprune.api.snapshot import load as load_snapshot
from jaxprune.reporting import record as records
from jaxprune.solve import layer as solving
from tests.helpers import families, tiny
from tests.helpers.checkpoints import content, tensors, write_gguf
from tests.helpers.command import failing
from tests.helpers.optional import needs_torch
from tests.helpers.plans import need_of

Q = gguf.GGMLQuantizationType
CONFIG: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
WINDOWS = np.random.default_rng(0).integers(0, 300, (2, 32)).astype(np.int32)
OPTIONS = "--calib ids.npy --nsamples 2 --seqlen 32 --method wanda --eval none".split()
RUN = ["--ckpt", "q.gguf", *OPTIONS]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "q.gguf", tiny.config(**CONFIG), Q.Q4_1)


@pytest.fixture
def here(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a quantized GGUF file and token ids, entered."""
    monkeypatch.chdir(tmp_path)
    Path("q.gguf").symlink_to(quantized)
    np.save("ids.npy", WINDOWS)
    return tmp_path


def dtypes(folder: Path) -> set[str]:
    return {array.dtype.name for array in tensors(folder).values()}


def dtype_in_config(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["dtype"]


def read(path: Path) -> Params:
    reader = open_checkpoint(path)
    return reader.read(reader.spec)


def changed(folder: Path, target: Path, name: str, place: int) -> Path:
    """A copy whose tensor of that name differs in the last bit of one number."""
    shutil.copytree(folder, target)
    stored = load_file(target / "model.safetensors")
    stored[name].reshape(-1).view(f"u{stored[name].itemsize}")[place] ^= 1
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_result_is_float16_with_exact_zeros(here: Path) -> None:
    result = jp.prune(jp.load("q.gguf"), WINDOWS, jp.Recipe(jp.ADMM(), jp.Unstructured(0.5)), "out")
    assert result and result.record.save_dtype == "float16"
    assert dtypes(here / "out") == {"float16"} and dtype_in_config(here / "out") == "float16"
    dense, pruned = read(here / "q.gguf"), read(here / "out")
    for index, layer in enumerate(result.layers):
        for path, kernel in layer.kernels.items():
            found = int(np.count_nonzero(pruned[f"layers.{index}.{path}.kernel"] == 0))
            assert found == kernel.zeros == kernel.size // 2
    for name in (
        "embed_tokens.embedding",
        "norm.scale",
        "layers.1.input_layernorm.scale",
        "lm_head.kernel",
    ):
        assert dense[name].dtype == np.float32
        np.testing.assert_array_equal(pruned[name], dense[name].astype(np.float16))
    verdict = jp.verify("out", against="q.gguf")
    assert verdict.problems == [] and verdict.compared == 9 and verdict.dtype == np.float16


def test_kernels_are_solved_from_rounded_weights(here: Path) -> None:
    """As if the same weights had been stored in float16 in Hugging Face's format."""
    dense = CastReader(open_checkpoint("q.gguf"), np.float16)
    with create_checkpoint("half", dense.spec, dense.assets) as writer:
        writer.write(dense.read(dense.spec))
    assert main(["prune", *RUN, "--out", "out"]) == 0
    assert main(["prune", *OPTIONS, "--ckpt", "half", "--out", "of-half"]) == 0
    for name, array in tensors(here / "out").items():
        np.testing.assert_array_equal(array, tensors(here / "of-half")[name], err_msg=name)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Q.F32, "float32"), (Q.F16, "float16"), (Q.BF16, "bfloat16"), (Q.Q8_0, "float16")],
)
def test_a_file_decides_the_dtype_of_its_results(
    kind: gguf.GGMLQuantizationType, dtype: str, here: Path, capsys: pytest.CaptureFixture
) -> None:
    write_gguf(here / "a.gguf", tiny.config(**CONFIG), kind)
    assert main(["prune", *OPTIONS, "--ckpt", "a.gguf", "--out", "out"]) == 0
    assert dtypes(here / "out") == {dtype} and dtype_in_config(here / "out") == dtype
    assert main(["verify", "out", "--against", "a.gguf"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (f"9 other tensors compared with a.gguf in {dtype}" in printed) == (dtype != "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_option_decides_and_the_record_repeats_it(dtype: str, here: Path) -> None:
    assert main(["prune", *RUN, "--save-dtype", dtype, "--out", "out"]) == 0
    assert dtypes(here / "out") == {dtype} and dtype_in_config(here / "out") == dtype
    assert main(["verify", "out", "--against", "q.gguf"]) == 0
    assert main(["prune", "--config", "out/jaxprune.json", "--out", "again"]) == 0
    assert (
        Path("out/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()
    )


def test_a_default_is_repeated_with_its_checkpoint_only(here: Path, checkpoint: Path) -> None:
    assert main(["prune", *RUN, "--out", "out"]) == 0
    record = Path("out/jaxprune.json")
    assert main(["prune", "--config", str(record), "--out", "again"]) == 0
    assert (
        Path("out/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()
    )
    assert (
        main(["prune", "--config", str(record), "--ckpt", str(checkpoint), "--out", "other"]) == 0
    )
    assert dtypes(here / "other") == dtypes(checkpoint) == {"float32"}


def test_any_checkpoint_can_be_cast(here: Path, checkpoint: Path) -> None:
    run = ["prune", *OPTIONS, "--ckpt", str(checkpoint)]
    assert main([*run, "--save-dtype", "bfloat16", "--out", "half"]) == 0
    assert dtypes(here / "half") == {"bfloat16"}
    assert main(["verify", "half", "--against", str(checkpoint)]) == 0
    assert main([*run, "--out", "own"]) == 0
    assert main([*run, "--save-dtype", "float32", "--out", "same"]) == 0
    assert content(here / "own").keys() == content(here / "same").keys()
    assert Path("own/model.safetensors").read_bytes() == Path("same/model.safetensors").read_bytes()
    assert Path("own/config.json").read_bytes() == Path("same/config.json").read_bytes()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_an_untouched_tensor_that_differs_is_a_problem(
    name: str, here: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["prune", *RUN, "--out", "out"]) == 0
    broken = changed(here / "out", here / "broken", name, 7)
    assert main(["verify", str(broken), "--against", "q.gguf"]) == 1
    assert "is not the dense checkpoint's, rounded to float16" in capsys.readouterr().out


def test_a_number_beyond_the_range_is_one_error(here: Path, capsys: pytest.CaptureFixture) -> None:
    weights = tiny.weights(tiny.config(**CONFIG))
    weights["model.layers.2.input_layernorm.weight"][5] = -70000
    tiny_weights = {name: array.copy() for name, array in weights.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "weights", lambda config: tiny_weights)
        write_gguf(here / "large.gguf", tiny.config(**CONFIG), Q.Q8_0)
    run = ["prune", *OPTIONS, "--ckpt", "large.gguf"]
    assert main([*run, "--out", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith("error: layers.2.input_layernorm.scale: float16 cannot hold")
        and "70000.0" in line
    )
    assert line.endswith(": pass --save-dtype bfloat16")
    assert not list(here.glob("out*"))
    assert main([*run, "--save-dtype", "bfloat16", "--out", "out"]) == 0


def test_a_kernel_beyond_the_range_is_an_error() -> None:
    kernel = np.array([[1.0, 65504.0]], np.float32)
    assert cast("a.kernel", kernel, np.float16).tolist() == kernel.tolist()
    with pytest.raises(jp.InputError, match="a.kernel: float16 cannot hold") as found:
        cast("a.kernel", kernel * np.float32(-1.01), np.float16)
    assert found.value.options == {"save_dtype": "bfloat16"}


def test_only_some_dtypes_can_be_stored(here: Path) -> None:
    recipe = jp.Recipe(jp.Magnitude(), jp.Unstructured(0.5))
    with pytest.raises(
        jp.InputError, match="no result can be stored in int8: float16, bfloat16, float32"
    ):
        jp.prune(jp.load("q.gguf"), WINDOWS, recipe, "out", jp.RunOptions(save_dtype=np.int8))


def test_a_run_is_not_resumed_in_another_dtype(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = ["prune", *RUN, "--out", "out"]
    with monkeypatch.context() as patch:
        patch.setattr(solving, "prune_and_round", failing(solving.prune_and_round, 9))
        assert main(run) == 2
    kept = content(here / "out.unfinished")
    capsys.readouterr()
    assert main([*run, "--save-dtype", "float32"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "save_dtype" in line
    assert content(here / "out.unfinished") == kept
    assert main([*run, "--save-dtype", "float16"]) == 0  # the default, which is the same run
    assert json.loads(Path("out/jaxprune.json").read_text())["resumed_layers"] == 1


@pytest.mark.parametrize("flags", [[], ["--save-dtype", "float32"]])
def test_a_plan_counts_the_bytes_that_are_stored(flags: list[str], here: Path) -> None:
    need = need_of(*RUN, *flags, "--out", "out")
    assert main(["prune", *RUN, *flags, "--out", "out"]) == 0
    stored = tensors(here / "out")
    assert need.kept == sum(array.nbytes for array in stored.values())
    layers = sum(array.nbytes for name, array in stored.items() if ".layers." in name)
    masks = sum(array.size for name, array in stored.items() if "_proj" in name) // 8
    assert need.disk["layers that are finished"] == layers + masks


def test_what_reads_a_float16_result_finds_the_same(here: Path, text: Path) -> None:
    assert main(["prune", *RUN, "--save-masks", "masks.safetensors", "--out", "out"]) == 0
    for mask in ("from-checkpoint:out", "from-file:masks.safetensors"):
        target = mask.partition(":")[0]
        line = ["--mask", mask, "--update", "admm", "--out", target]
        assert (
            main(["prune", *[word for word in RUN if word not in ("--method", "wanda")], *line])
            == 0
        )
        assert main(["verify", target, "--zeros-of", "out"]) == 0
    assert main(["convert", "out", "packed", "--to", "packed"]) == 0
    assert main(["verify", "packed", "--against", "q.gguf"]) == 0
    evaluation = [
        "--eval",
        "ppl",
        "--eval-text",
        str(text),
        *"--eval-seqlen 16 --eval-windows 1".split(),
    ]
    assert main(["evaluate", "out", "--against", "q.gguf", *evaluation]) == 0
    assert main(["snapshot", "layer.safetensors", "--layer", "1", *RUN[:-2]]) == 0
    snapshot = load_snapshot(here / "layer.safetensors")
    assert {kernel.dtype.name for kernel in snapshot.kernels.values()} == {"float16"}


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_gguf_file_of_a_result_is_verified(kind: str, dtype: str, here: Path) -> None:
    assert main(["prune", *RUN, "--save-dtype", dtype, "--out", "out"]) == 0
    assert main(["convert", "out", "out.gguf", "--type", kind]) == 0
    assert main(["verify", "out.gguf", "--against", "q.gguf"]) == 0
    stored = load_file("out/model.safetensors")
    stored["model.embed_tokens.weight"][3] *= stored["model.embed_tokens.weight"].dtype.type(3)
    save_file(stored, "out/model.safetensors", metadata={"format": "pt"})
    assert main(["convert", "out", "other.gguf", "--type", kind]) == 0
    assert main(["verify", "other.gguf", "--against", "q.gguf"]) == 1


def test_records_and_reports_say_what_a_result_takes(here: Path) -> None:
    assert main(["prune", *RUN, "--out", "out"]) == 0
    run = records.run_of(here / "out")
    assert run and run.disk_bytes["dense"] == Path("q.gguf").stat().st_size
    assert run.disk_bytes["pruned"] == Path("out/model.safetensors").stat().st_size
    count = sum(array.size for array in tensors(here / "out").values())
    assert run.parameters == {"dense": count, "pruned": count}
    assert main(["convert", "out", "packed", "--to", "packed"]) == 0
    packed = Packed(here / "packed")
    converted = dict(run.converted_bytes)
    assert converted.pop("packed") == sum(map(packed.stored_bytes, packed.spec))
    assert converted.keys() == {"f16", "q8_0", "q5_0", "q4_0"}
    for kind, size in converted.items():
        assert main(["convert", "out", f"{kind}.gguf", "--type", kind]) == 0
        assert size == sum(tensor.size for tensor in Header(here / f"{kind}.gguf").tensors)
    page, card = Path("out/report.html").read_text(), Path("out/README.md").read_text()
    assert "by size" not in page  # both have as many parameters
    assert ", float16; packed about" in page and "(Q8_0)" in page
    assert (
        "| as GGUF | about" in card
        and "are those of the dense checkpoint, rounded to float16." in card
    )


@needs_torch
def test_dropped_experts_and_a_cast_go_together(here: Path) -> None:
    families.save(here / "experts", families.config("qwen3_moe", "mixed"))
    run = [
        "prune",
        *OPTIONS,
        *"--ckpt experts --drop-experts 0.5 --save-dtype bfloat16 --out out".split(),
    ]
    assert main(run) == 0
    config = json.loads(Path("out/config.json").read_text())
    assert config["dtype"] == "bfloat16" and jp.load("out").architecture.config.routing.experts == 3
    assert dtypes(here / "out") == {"bfloat16"}
    assert main(["verify", "out", "--against", "experts"]) == 0


def test_numbers_that_are_not_floating_point_stay() -> None:
    class Counted:
        spec: Spec = {"a.scale": tiny_spec(np.float32), "beside.steps": tiny_spec(np.int64)}
        assets, files = Path(), list[Path]()

        def read(self, paths: Any) -> Params:
            return {path: np.ones(3, self.spec[path].dtype) for path in paths}

    reader = CastReader(Counted(), jnp.bfloat16)
    assert {path: array.dtype.name for path, array in reader.read(reader.spec).items()} == {
        "a.scale": "bfloat16",
        "beside.steps": "int64",
    }
    reader.require_range()


def tiny_spec(dtype: Any) -> Any:
    import jax

    return jax.ShapeDtypeStruct((3,), np.dtype(dtype))
