"""Windows of text: counts, determinism, every kind of file, and too little of it."""

import contextlib
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest

from convert import plugins
from convert.command import worded
from jaxprune import calibration
from jaxprune.errors import InputError
from tests.helpers import tiny
from tests.helpers.checkpoints import cache

TOKENIZER = tiny.tokenizer()
TEXTS = ["The cat sat. " * n for n in (1, 40, 3, 90, 60, 2, 80, 5)]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

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
    windows = calibration.calibration_windows(path, TOKENIZER, 3, 50, seed=0)
    assert windows.dtype == np.int32 and windows.shape == (3, 50)
    reference = calibration.calibration_windows(
        str(write(tmp_path / "reference.jsonl")), TOKENIZER, 3, 50, seed=0
    )
    np.testing.assert_array_equal(windows, reference)
    for window in windows:
        assert "cat sat. The cat sat." in TOKENIZER.decode(window)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    windows = calibration.calibration_windows(
        str(write(tmp_path / "a.txt")), TOKENIZER, 1, 50, seed=0
    )
    assert windows.shape == (1, 50)
    packed = calibration.calibration_windows(
        str(tmp_path / "a.txt"), TOKENIZER, 4, 50, seed=0, pack=True
    )
    assert packed.shape == (4, 50)


def test_windows_depend_on_the_seed_alone(text: Path) -> None:
    for pack in (False, True):
        first, again, other = (
            calibration.calibration_windows(str(text), TOKENIZER, 8, 64, seed=seed, pack=pack)
            for seed in (3, 3, 4)
        )
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()


@contextlib.contextmanager
def refused(message: str) -> Iterator[None]:
    """Expects an error of which the command line makes a line that matches."""
    with pytest.raises(InputError) as caught:
        yield
    assert re.search(message, worded(caught.value)), worded(caught.value)


def test_a_document_gives_one_window_and_short_ones_none(tmp_path: Path) -> None:
    lengths = [len(TOKENIZER(t)["input_ids"]) for t in TEXTS]
    enough = sum(length > 100 for length in lengths)
    path = str(write(tmp_path / "a.jsonl"))
    assert calibration.calibration_windows(path, TOKENIZER, enough, 100, seed=1).shape == (
        enough,
        100,
    )
    with refused(
        f"has {enough} documents longer than 100.*pass --nsamples {enough}, or lower --seqlen, or "
        "pass --pack"
    ):
        calibration.calibration_windows(path, TOKENIZER, enough + 1, 100, seed=1)
    with refused(
        f"has {len(TEXTS)} documents, but {10**9} windows are wanted.*lower --nsamples, or pass "
        "--pack"
    ):
        calibration.calibration_windows(path, TOKENIZER, 10**9, 100, seed=1)


def test_packing_counts_what_there_is(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl"))
    with refused(r"gives (\d+) windows of 100 tokens.*--nsamples \1"):
        calibration.calibration_windows(path, TOKENIZER, 1000, 100, seed=1, pack=True)
    with refused("0 windows.*lower --seqlen"):
        calibration.calibration_windows(path, TOKENIZER, 1, 100_000, seed=1, pack=True)


def test_evaluation_is_the_whole_text_tokenized_once(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl"))
    ids = TOKENIZER("\n\n".join(TEXTS))["input_ids"]
    windows = calibration.evaluation_windows(path, TOKENIZER, 70)
    np.testing.assert_array_equal(windows.ravel(), ids[: len(ids) // 70 * 70])
    np.testing.assert_array_equal(
        calibration.evaluation_windows(path, TOKENIZER, 70, limit=2), windows[:2]
    )
    with refused("less than one window: lower --eval-seqlen"):
        calibration.evaluation_windows(path, TOKENIZER, 100_000)


def test_hub_datasets_are_found_in_its_cache(hub: Path) -> None:
    snapshot = cache(hub, "allenai/c4", kind="datasets") / "en"
    snapshot.mkdir()
    write(snapshot / "c4-train.00000-of-01024.json.gz")
    write(snapshot / "c4-validation.00000-of-00008.json.gz")
    assert calibration.calibration_windows("c4", TOKENIZER, 3, 50, seed=0).shape == (3, 50)
    assert len(calibration.evaluation_windows("c4", TOKENIZER, 50)) > 3
    wikitext = cache(hub, "Salesforce/wikitext", kind="datasets") / "wikitext-2-raw-v1"
    wikitext.mkdir()
    write(wikitext / "train-00000-of-00001.parquet")
    write(wikitext / "test-00000-of-00001.parquet")
    assert calibration.calibration_windows("wikitext2", TOKENIZER, 8, 50, seed=0).shape == (8, 50)
    np.testing.assert_array_equal(
        calibration.evaluation_windows("wikitext2", TOKENIZER, 50).ravel()[:200],
        TOKENIZER("\n\n".join(TEXTS))["input_ids"][:200],
    )


@pytest.mark.parametrize("source", ["c4", "wikitext2"])
def test_an_unreachable_hub_says_what_to_do(source: str, hub: Path) -> None:
    with pytest.raises(InputError, match="hub cannot be reached.*wikipedia"):
        calibration.calibration_windows(source, TOKENIZER, 1, 10, seed=0)


def test_a_folder_in_the_hubs_layout(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train-00000-of-00001.parquet")
    assert calibration.calibration_windows(str(folder), TOKENIZER, 3, 50, seed=0).shape == (3, 50)
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
    assert calibration.calibration_windows(
        str(data / "c4/c4-train-sample.jsonl"), TOKENIZER, 32, 512, seed=0
    ).shape == (32, 512)
    assert (
        len(
            calibration.evaluation_windows(
                str(data / "wikitext2/validation.jsonl"), TOKENIZER, 1024
            )
        )
        > 100
    )
