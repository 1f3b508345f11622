"""A text as a stream: every token once an epoch, in an order of the seed, and nothing of what is
held out."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from jaxprune import InputError, calibration_windows
from jaxprune.calibration.text_stream import TextStream
from tests.helpers import tiny


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twenty windows of ids, each of its own number."""
    np.save(tmp_path / "rows.npy", np.repeat(np.arange(20, dtype=np.int64)[:, None], 16, axis=1))
    return tmp_path / "rows.npy"


def stream(path: Path, seed: int = 0, **options: int) -> TextStream:
    return TextStream(str(path), None, 16, seed, **({"held_out": 4} | options))


def test_all_comes_once_an_epoch_but_what_is_held_out(
    rows: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = stream(rows)
    held = {int(window[0]) for window in found.held_out}
    first, second = (
        [int(window[0]) for window in part]
        for part in np.split(np.stack(list(islice(found.windows(), 32))), 2)
    )
    assert len(held) == 4 and sorted({*first} | held) == sorted({*second} | held) == [*range(20)]
    assert first != second and not held & {*first, *second}
    assert "the tuning repeats it" in caplog.text


def test_the_seed_fixes_the_order_and_it_goes_on_anywhere(rows: Path) -> None:
    whole = np.stack(list(islice(stream(rows).windows(), 40)))
    np.testing.assert_array_equal(np.stack(list(islice(stream(rows).windows(25), 15))), whole[25:])
    other = np.stack(list(islice(stream(rows, seed=1).windows(), 40)))
    assert not np.array_equal(whole, other)


def test_documents_are_joined_and_cut(tmp_path: Path) -> None:
    texts = [f"text {number} " * (5 + number) for number in range(12)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    tokenizer = tiny.tokenizer()
    found = TextStream(str(tmp_path / "texts.jsonl"), tokenizer, 16, held_out=2)
    assert found.held_out.shape == (2, 16)
    order = np.random.default_rng(0).permutation(12)[::-1]
    ids = [
        i for n in order[1:4] for part in (texts[n], "\n\n") for i in tokenizer(part)["input_ids"]
    ]
    np.testing.assert_array_equal(
        found.held_out.reshape(-1), tokenizer(texts[order[0]])["input_ids"][:32]
    )
    np.testing.assert_array_equal(
        np.stack(list(islice(found.windows(), 4))).reshape(-1), ids[: 4 * 16]
    )


def test_what_calibrates_comes_last(rows: Path) -> None:
    calibrating = {
        int(window[0]) for window in calibration_windows(str(rows), None, count=5, length=16)
    }
    first = [int(window[0]) for window in islice(stream(rows).windows(), 16)]
    assert set(first[-5:]) == calibrating


def test_of_one_document_the_beginning_is_held_out(tmp_path: Path) -> None:
    text, tokenizer = " ".join(f"word {number}" for number in range(200)), tiny.tokenizer()
    (tmp_path / "text.txt").write_text(text)
    found = TextStream(str(tmp_path / "text.txt"), tokenizer, 16, held_out=2)
    ids = tokenizer(text)["input_ids"]
    np.testing.assert_array_equal(found.held_out.reshape(-1), ids[:32])
    rest = [*map(tuple, np.array(ids[32 : len(ids) // 16 * 16]).reshape(-1, 16).tolist())]
    first, second = (
        [*map(tuple, part)]
        for part in np.split(np.stack([*islice(found.windows(), 2 * len(rest))]), 2)
    )
    assert (
        sorted(first) == sorted(second) == sorted(rest)
        and len({*map(tuple, (first, second, rest))}) == 3
    )
    other = TextStream(str(tmp_path / "text.txt"), tokenizer, 16, 1, held_out=2)
    assert [*map(tuple, islice(other.windows(), len(rest)))] != first
    np.testing.assert_array_equal(np.stack([*islice(found.windows(7), 3)]), first[7:10])


def test_what_is_passed_over_does_not_hold_up_a_run_that_stops(
    rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, passed = stream(rows), []
    [source] = found._sources.values()
    windows = source.windows()

    def slowly() -> Iterator[tuple[int, np.ndarray]]:
        for window in windows:
            passed.append(window)
            if len(passed) == 50:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.001)
            yield window

    monkeypatch.setattr(source, "windows", slowly)
    # background jobs of a shell ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(found.windows(10_000))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(passed) < 5000


def test_a_text_tells_about_how_many_tokens_it_has(rows: Path, tmp_path: Path) -> None:
    assert stream(rows).tokens == np.load(rows).size - stream(rows).held_out.size
    tokenizer, text = tiny.tokenizer(), tmp_path / "text.jsonl"
    tiny.write_text(text, documents=60)
    found = TextStream(str(text), tokenizer, 16, held_out=4)
    once = [
        window for window in islice(found._sources[str(text)].windows(), 10_000) if window[0] == 0
    ]
    assert found.tokens == pytest.approx(16 * len(once), rel=0.1)
    both = TextStream(f"{text}:3,{rows}:1", tokenizer, 16, held_out=4)
    assert both.tokens == pytest.approx(min(found.tokens * 4 / 3, np.load(rows).size * 4), rel=0.1)


@pytest.mark.parametrize("seed", range(4))
def test_no_book_is_held_out_whole(seed: int, tmp_path: Path) -> None:
    """Of two long documents, one of which has the held-out windows, and of rows longer than a
    window, all else is tuned on."""
    np.save(tmp_path / "books.npy", np.arange(2 * 400).reshape(2, 400))
    found = TextStream(str(tmp_path / "books.npy"), None, 16, seed, held_out=2)
    windows = np.stack(list(islice(found.windows(), 48)))
    assert (
        len({int(token) for token in windows.flat} | {int(token) for token in found.held_out.flat})
        == 800
    )
    assert not {int(token) for token in windows.flat} & {
        int(token) for token in found.held_out.flat
    }


def test_another_text_has_another_digest(rows: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", np.repeat(np.arange(1, 21)[:, None], 16, axis=1))
    assert (
        stream(rows).digest == stream(rows, seed=3).digest != stream(tmp_path / "other.npy").digest
    )


@pytest.mark.parametrize("held_out", [20, 21, 1000])
def test_too_little_text_is_said(rows: Path, held_out: int) -> None:
    with pytest.raises(InputError, match=f"less than the {(held_out + 1) * 16} tokens"):
        stream(rows, held_out=held_out)
    assert len(stream(rows, held_out=19).held_out) == 19


def test_what_is_made_ahead_is_not_said(rows: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(list(islice(stream(rows).windows(), 16))) == 16
    assert "the tuning repeats it" not in caplog.text
