"""Conversations under the checkpoint's chat template, and several sources in proportion."""

import datetime
import json
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from jaxprune import InputError, calibration
from jaxprune.calibration.source_weights import interleaved, shares, weights_of
from jaxprune.calibration.text_stream import TextStream
from tests.helpers import tiny

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"


def chat_tokenizer(template: Any = TEMPLATE) -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def talk(number: int, turns: int = 8) -> list[dict[str, str]]:
    return [
        {"role": ("user", "assistant")[turn % 2], "content": f"say {number} {turn}"}
        for turn in range(turns)
    ]


def chats(path: Path, count: int = 12, **others: Any) -> str:
    rows = [{"messages": talk(number), "source": "x"} | others for number in range(count)]
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.parquet"])
def test_windows_are_what_the_template_makes_of_conversations(name: str, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    windows = calibration.calibration_windows(chats(tmp_path / name), tokenizer, 4, 64, seed=0)
    ids: list[int] = []
    for number in np.random.default_rng(0).permutation(12):
        text = "".join(f"<{m['role']}>{m['content']}</s>" for m in talk(int(number)))
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
    made = np.array(ids[: len(ids) // 64 * 64]).reshape(-1, 64)
    assert len({bytes(window) for window in windows}) == 4
    assert all((made == window).all(axis=1).any() for window in windows)


def test_a_text_of_conversations_is_evaluated_on_under_the_template_too(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    windows = calibration.evaluation_windows(chats(tmp_path / "a.jsonl"), tokenizer, 32, 2)
    text = "".join(f"<{m['role']}>{m['content']}</s>" for m in talk(0) + talk(1))
    np.testing.assert_array_equal(
        windows.reshape(-1), tokenizer(text, add_special_tokens=False)["input_ids"][:64]
    )


def test_rows_with_text_are_taken_as_text(tmp_path: Path) -> None:
    path = chats(tmp_path / "a.jsonl", text="A plain text. " * 10)
    windows = calibration.calibration_windows(path, tiny.tokenizer(), 2, 16, pack=True)
    assert "plain text" in tiny.tokenizer().decode(windows.reshape(-1))


def test_a_template_writes_the_same_date_every_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated = chat_tokenizer("{{ strftime_now('%d %B %Y') }}" + TEMPLATE)
    windows = calibration.calibration_windows(chats(tmp_path / "a.jsonl"), dated, 4, 32)
    text = dated.decode(windows.reshape(-1))
    assert "26 July 2024" in text and datetime.date.today().strftime("%B %Y") not in text


@pytest.mark.parametrize(
    ("rows", "tokenizer", "said"),
    [
        ([{"messages": talk(0)}], tiny.tokenizer(), "no chat template"),
        (
            [{"messages": talk(0)}],
            chat_tokenizer("{{ raise_exception('no system role') }}"),
            "no system role",
        ),
        ([{"messages": talk(0)}], chat_tokenizer("{% for %}"), "takes no such conversation"),
        ([{"messages": talk(0)}], chat_tokenizer("{{ 1 // 0 }}"), "takes no such conversation"),
        (
            [{"messages": talk(0)}],
            chat_tokenizer("{{ messages + 1 }}"),
            "takes no such conversation",
        ),
        ([{"messages": talk(0)}], chat_tokenizer({"tool_use": TEMPLATE}), "no chat template"),
        ([{"messages": talk(0)}, {"text": "a"}], chat_tokenizer(), "line 2"),
        ([{"messages": talk(0)}, {"messages": []}], chat_tokenizer(), "messages"),
        ([{"messages": [{"role": "user"}]}], chat_tokenizer(), "content"),
        ([{"messages": [{"role": "user", "content": ["parts"]}]}], chat_tokenizer(), "content"),
        ([{"messages": "text"}], chat_tokenizer(), "messages"),
        ([{"text": "a"}, {"messages": talk(0)}], chat_tokenizer(), "line 2"),
    ],
)
def test_bad_conversations_are_refused(
    rows: list[Any], tokenizer: Any, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError) as error:
        calibration.calibration_windows(str(path), tokenizer, 1, 8)
    assert said in str(error.value) and "chats.jsonl" in str(error.value)


def test_a_stream_looks_at_all_conversations_before_the_first(tmp_path: Path) -> None:
    rows = [{"messages": talk(number)} for number in range(40)]
    rows[17]["messages"][0]["role"] = "system"
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + TEMPLATE
    )
    with pytest.raises(InputError, match="conversation 18: .*no system role"):
        TextStream(str(path), chat_tokenizer(strict), 16, held_out=2)


def ids_of(path: Path, value: int, rows: int = 40) -> str:
    np.save(path, np.full((rows, 16), value))
    return str(path)


def test_sources_share_windows_in_proportion(tmp_path: Path) -> None:
    one, other = ids_of(tmp_path / "one.npy", 1), ids_of(tmp_path / "other.npy", 2)
    windows = calibration.calibration_windows(f"{one}:3,{other}:1", None, 16, 16)
    assert [int(window[0]) for window in windows] == [1, 1, 2, 1] * 4
    assert (
        calibration.calibration_windows(f"{one},{other}", None, 4, 16)[:, 0] == [1, 2, 1, 2]
    ).all()
    stream = TextStream(f"{one}:3,{other}:1", None, 16, held_out=8)
    assert np.bincount(stream.held_out[:, 0]).tolist() == [0, 6, 2]
    found = np.stack(list(islice(stream.windows(), 100)))
    assert np.bincount(found[:, 0]).tolist() == [0, 75, 25]
    np.testing.assert_array_equal(found[33:], np.stack(list(islice(stream.windows(33), 67))))
    digests = {
        stream.digest,
        TextStream(f"{one}:2,{other}:1", None, 16).digest,
        TextStream(one, None, 16).digest,
    }
    assert len(digests) == 3


def test_chats_and_text_mix(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": "plain words " * 20}) for _ in range(8))
    )
    source = f"{chats(tmp_path / 'chats.jsonl')},{tmp_path / 'text.jsonl'}"
    tokenizer = chat_tokenizer()
    windows = calibration.calibration_windows(source, tokenizer, 4, 32, pack=True)
    assert ["plain" in tokenizer.decode(window) for window in windows] == [False, True, False, True]


def test_a_name_that_exists_is_one_source() -> None:
    assert weights_of("a,b:2", lambda name: name == "a,b:2") == {"a,b:2": 1}
    assert weights_of("a:2,b:0.5,c", lambda name: name == "a:2") == {"a:2": 1, "b": 0.5, "c": 1}


def test_shares_are_whole_and_near() -> None:
    assert shares({"a": 1, "b": 1, "c": 1}, 16) == {"a": 6, "b": 5, "c": 5}
    assert shares({"a": 9, "b": 1}, 4) == {"a": 4, "b": 0} and shares({"a": 0.1}, 10**9) == {
        "a": 10**9
    }


def test_sources_take_turns_in_proportion() -> None:
    order = list(islice(interleaved({"a": 5, "b": 2}), 70))
    assert all(abs(order[:n].count("b") - n * 2 / 7) <= 1 for n in range(1, 71))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("a.npy:0,b.npy", "positive number"),
        ("a.npy:1.2.3,b.npy", "positive number"),
        ("a.npy:-1,b.npy", "weight of a.npy must be a positive number, not -1"),
        ("a.npy,b.npy:many", "weight of b.npy must be a positive number, not many"),
        ("a.npy,a.npy", "twice"),
        ("a.npy,", "without a name"),
        ("nothing-of-the-kind:2", "no text 'nothing-of-the-kind'"),
        ("nothing,wikipedia:2", "no text 'nothing'"),
    ],
)
def test_bad_mixes_are_refused(source: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        calibration.calibration_windows(source, None, 4, 16)


def test_a_source_without_a_window_is_refused(tmp_path: Path) -> None:
    source = f"{ids_of(tmp_path / 'one.npy', 1)}:9,{ids_of(tmp_path / 'other.npy', 2)}:1"
    with pytest.raises(InputError, match="of 4 windows none is of"):
        calibration.calibration_windows(source, None, 4, 16)
