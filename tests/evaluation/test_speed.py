"""Size and speed of checkpoints in other programs."""

import importlib.util
from pathlib import Path

import pytest

from jaxprune import load
from jaxprune.commands.evaluate import main
from jaxprune.evaluation import speed
from jaxprune.evaluation.engines import ENGINES, Engine, Timing
from jaxprune.evaluation.speed import SETTINGS, Setting, measure_speed
from jaxprune.reporting import record as records
from tests.helpers.zeros import pruned

TRANSFORMERS = "transformers BF16"


@pytest.fixture
def no_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "llama.cpp", Engine("no_such_module", lambda path, count: None))


@pytest.fixture
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "ROUNDS", 1)


def test_transformers_is_timed_in_a_process_of_its_own(
    checkpoint: Path,
    tmp_path: Path,
    no_llama_cpp: None,
    one_round: None,
    capsys: pytest.CaptureFixture,
) -> None:
    other = pruned(checkpoint, tmp_path / "pruned", "0.5")
    out = tmp_path / "out"
    line = f"{other} --against {checkpoint} --eval speed --out {out}"
    assert main(line.split()) == 0
    found = records.load(out).checkpoints
    dense, sparse = (one.quality.speed for one in found.values())
    assert [*dense] == [*sparse] == [TRANSFORMERS]
    bytes_of = sum(t.size for t in load(checkpoint).reader.spec.values()) * 2
    for one in (dense[TRANSFORMERS], sparse[TRANSFORMERS]):
        assert bytes_of < one.file_bytes < 1.2 * bytes_of
        assert one.prompt > one.generated > 0
        assert 5e7 < one.peak_bytes < 5e9
    assert dense[TRANSFORMERS].prompt_ratio is None
    assert sparse[TRANSFORMERS].generated_ratio == pytest.approx(
        sparse[TRANSFORMERS].generated / dense[TRANSFORMERS].generated
    )
    page = (out / "report.html").read_text()
    assert "Size and speed" in page and f"<td>{TRANSFORMERS}</td>" in page
    printed = capsys.readouterr().out
    assert "tokens/s" in printed and "times dense" in " ".join(printed.split())


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
def test_llama_cpp_is_timed_with_every_type(
    checkpoint: Path, one_round: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [one for one in SETTINGS if one.engine == "llama.cpp"]
    monkeypatch.setattr(speed, "SETTINGS", settings)
    (found,) = measure_speed({"dense": load(checkpoint)}).values()
    assert [*found] == ["llama.cpp F16", "llama.cpp Q8_0", "llama.cpp Q4_0"]
    sizes = [one.file_bytes for one in found.values()]
    assert sizes == sorted(sizes, reverse=True) and len({*sizes}) == 3
    assert all(one.generated > 0 for one in found.values())


def test_checkpoints_take_turns_and_ratios_are_those_of_their_rounds(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The machine becomes slower from round to round; the other one always takes half as long.
    turns: list[str] = []

    def timed(setting: Setting, name: str, file: Path, lengths: tuple[int, int]) -> Timing:
        turns.append(name)
        load = 1 + len(turns) // 2 * 10.0
        return Timing(*(load * (1 if name == "dense" else 0.5),) * 2, peak_bytes=len(turns))

    monkeypatch.setattr(speed, "_timed", timed)
    monkeypatch.setattr(speed, "SETTINGS", [Setting("transformers", "hf", "bf16")])
    model = load(checkpoint)
    dense, other = measure_speed({"dense": model, "other": model}, against="dense").values()
    assert turns == ["dense", "other"] * speed.ROUNDS
    assert dense[TRANSFORMERS].generated_ratio is None
    # The second of a pair starts when the load has already grown.
    expected = sorted((1 + 10 * n) / (0.5 * (11 + 10 * n)) for n in range(speed.ROUNDS))[1]
    assert other[TRANSFORMERS].generated_ratio == pytest.approx(expected)
    assert other[TRANSFORMERS].peak_bytes == len(turns)


def test_a_missing_engine_is_one_line(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(speed, "ENGINES", {})
    assert main([str(checkpoint), "--eval", "speed", "--out", str(tmp_path / "out")]) == 2
    assert "no engine is installed" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_failing_engine_is_one_line(
    checkpoint: Path,
    tmp_path: Path,
    no_llama_cpp: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(speed, "written", lambda models, setting, folder: [("it", folder)])
    assert main([str(checkpoint), "--eval", "speed", "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert f"{TRANSFORMERS} cannot run it: " in told and "Traceback" not in told
    assert not (tmp_path / "out").exists()
