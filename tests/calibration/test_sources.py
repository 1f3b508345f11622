"""Windows of text: counts, determinism, every kind of file, and too little of it."""

import gzip
import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from jaxprune import calibration, plugins
from jaxprune.errors import InputError
from tests import tiny
from tests.convert.test_names import cache, hub

__all__ = ["hub"]
TOKENIZER = tiny.tokenizer()
TEXTS = ["The cat sat. " * n for n in (1, 40, 3, 90, 60, 2, 80, 5)]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()


def write(path: Path) -> Path:
    """The texts as one of the kinds of file."""
    rows = [json.dumps({"text": text, "url": "x"}) for text in TEXTS]
    if path.suffix == ".parquet":
        datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(path)
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(TEXTS))
    elif path.suffix == ".gz":
        with gzip.open(path, "wt") as file:
            file.write("\n".join(rows))
    else:
        path.write_text("\n".join(rows) + "\n")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.json.gz", "a.jsonl.gz", "a.parquet"])
def test_every_kind_of_file_gives_the_same_windows(name: str, tmp_path: Path) -> None:
    path = str(write(tmp_path / name))
    windows = calibration.sample(path, TOKENIZER, 3, 50, seed=0)
    assert windows.dtype == np.int32 and windows.shape == (3, 50)
    reference = calibration.sample(str(write(tmp_path / "reference.jsonl")), TOKENIZER, 3, 50, seed=0)
    np.testing.assert_array_equal(windows, reference)
    for window in windows:
        assert "cat sat. The cat sat." in TOKENIZER.decode(window)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    windows = calibration.sample(str(write(tmp_path / "a.txt")), TOKENIZER, 1, 50, seed=0)
    assert windows.shape == (1, 50)
    packed = calibration.sample(str(tmp_path / "a.txt"), TOKENIZER, 4, 50, seed=0, pack=True)
    assert packed.shape == (4, 50)


def test_windows_depend_on_the_seed_alone(text: Path) -> None:
    for pack in (False, True):
        first, again, other = (
            calibration.sample(str(text), TOKENIZER, 8, 64, seed=seed, pack=pack) for seed in (3, 3, 4)
        )
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()


def test_a_document_gives_one_window_and_short_ones_none(tmp_path: Path) -> None:
    lengths = [len(TOKENIZER(t)["input_ids"]) for t in TEXTS]
    enough = sum(length > 100 for length in lengths)
    path = str(write(tmp_path / "a.jsonl"))
    assert calibration.sample(path, TOKENIZER, enough, 100, seed=1).shape == (enough, 100)
    with pytest.raises(InputError, match=f"has {enough} documents longer than 100.*--nsamples {enough}.*--pack"):
        calibration.sample(path, TOKENIZER, enough + 1, 100, seed=1)


def test_packing_counts_what_there_is(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl"))
    with pytest.raises(InputError, match=r"gives (\d+) windows of 100 tokens.*--nsamples \1"):
        calibration.sample(path, TOKENIZER, 1000, 100, seed=1, pack=True)
    with pytest.raises(InputError, match="0 windows.*smaller --seqlen"):
        calibration.sample(path, TOKENIZER, 1, 100_000, seed=1, pack=True)


def test_evaluation_is_the_whole_text_tokenized_once(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl"))
    ids = TOKENIZER("\n\n".join(TEXTS))["input_ids"]
    windows = calibration.evaluation_windows(path, TOKENIZER, 70)
    np.testing.assert_array_equal(windows.ravel(), ids[: len(ids) // 70 * 70])
    np.testing.assert_array_equal(calibration.evaluation_windows(path, TOKENIZER, 70, limit=2), windows[:2])
    with pytest.raises(InputError, match="less than one window"):
        calibration.evaluation_windows(path, TOKENIZER, 100_000)


def test_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    ids = np.arange(60).reshape(6, 10)
    np.save(tmp_path / "ids.npy", ids)
    path = str(tmp_path / "ids.npy")
    np.testing.assert_array_equal(calibration.sample(path, None, 6, 10, seed=0), ids)
    some = calibration.sample(path, None, 2, 5, seed=0)
    assert all((row == ids[:, :5]).all(axis=1).any() for row in some)
    np.testing.assert_array_equal(calibration.evaluation_windows(path, None, 8, limit=3), ids[:3, :8])
    for count, length, message in ((7, 10, "6 windows.*--nsamples 6"), (6, 11, "lower --seqlen")):
        with pytest.raises(InputError, match=message):
            calibration.sample(path, None, count, length, seed=0)
    np.save(tmp_path / "floats.npy", ids / 2)
    with pytest.raises(InputError, match="must hold integers"):
        calibration.sample(str(tmp_path / "floats.npy"), None, 1, 2, seed=0)
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot read token ids"):
        calibration.sample(str(tmp_path / "bad.npy"), None, 1, 2, seed=0)


def test_what_cannot_be_read_is_one_error(tmp_path: Path) -> None:
    def sample(path: Path) -> None:
        calibration.sample(str(path), TOKENIZER, 1, 10, seed=0)

    with pytest.raises(InputError, match="no text .*c4, wikipedia, wikitext2"):
        sample(tmp_path / "missing.jsonl")
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(InputError, match="no known kind"):
        sample(tmp_path / "a.pdf")
    (tmp_path / "a.jsonl").write_text('{"words": "hello"}\n')
    with pytest.raises(InputError, match="no column 'text': its columns are words"):
        sample(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"text": "hello"\n{{{')
    with pytest.raises(InputError, match="cannot read"):
        sample(tmp_path / "b.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="no text"):
        sample(tmp_path / "empty.jsonl")
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(InputError, match="holds no text"):
        sample(tmp_path / "blank.jsonl")
    with pytest.raises(InputError, match="at least 1 window"):
        calibration.sample(str(tmp_path / "a.jsonl"), TOKENIZER, 0, 10, seed=0)


def test_hub_datasets_are_found_in_its_cache(hub: Path) -> None:
    snapshot = cache(hub, "allenai/c4", kind="datasets") / "en"
    snapshot.mkdir()
    write(snapshot / "c4-train.00000-of-01024.json.gz")
    write(snapshot / "c4-validation.00000-of-00008.json.gz")
    assert calibration.sample("c4", TOKENIZER, 3, 50, seed=0).shape == (3, 50)
    assert len(calibration.evaluation_windows("c4", TOKENIZER, 50)) > 3
    wikitext = cache(hub, "Salesforce/wikitext", kind="datasets") / "wikitext-2-raw-v1"
    wikitext.mkdir()
    write(wikitext / "train-00000-of-00001.parquet")
    write(wikitext / "test-00000-of-00001.parquet")
    assert calibration.sample("wikitext2", TOKENIZER, 8, 50, seed=0).shape == (8, 50)
    np.testing.assert_array_equal(
        calibration.evaluation_windows("wikitext2", TOKENIZER, 50).ravel()[:200],
        TOKENIZER("\n\n".join(TEXTS))["input_ids"][:200],
    )


@pytest.mark.parametrize("source", ["c4", "wikitext2"])
def test_an_unreachable_hub_says_what_to_do(source: str, hub: Path) -> None:
    with pytest.raises(InputError, match="hub cannot be reached.*wikipedia"):
        calibration.sample(source, TOKENIZER, 1, 10, seed=0)


def test_a_folder_in_the_hubs_layout(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train-00000-of-00001.parquet")
    assert calibration.sample(str(folder), TOKENIZER, 3, 50, seed=0).shape == (3, 50)
    with pytest.raises(InputError, match="no test split"):
        calibration.evaluation_windows(str(folder), TOKENIZER, 50)
    write(folder / "test-00000-of-00001.parquet")
    assert len(calibration.evaluation_windows(str(folder), TOKENIZER, 50)) > 3


def test_every_source_has_documents() -> None:
    for name in plugins.names(calibration):
        assert callable(plugins.load(calibration, name).documents)


def test_wikipedia_splits_share_no_article() -> None:
    wikipedia = plugins.load(calibration, "wikipedia")
    train, test = wikipedia.documents("train"), wikipedia.documents("test")
    assert len(train) == len(test) == 53
    assert not set(train) & set(test)
    assert all(len(text) > 200 for text in train + test)
    assert sum("[[" in text for text in train + test) < 5  # the parser leaves some malformed markup


def test_real_c4_and_wikitext(data: Path) -> None:
    assert calibration.sample(str(data / "c4/c4-train-sample.jsonl"), TOKENIZER, 32, 512, seed=0).shape == (32, 512)
    assert len(calibration.evaluation_windows(str(data / "wikitext2/validation.jsonl"), TOKENIZER, 1024)) > 100
