"""Packed windows hold every text once, and a token sees just its own text."""

import numpy as np
import pytest

from jaxprune.errors import InputError
from jaxprune.evaluation.packing import Packed, Request, batches, group, pack
from jaxprune.streaming.hidden_states import batch_size


def requests(count: int, seed: int, longest: int) -> list[Request]:
    generator = np.random.default_rng(seed)
    contexts = [
        tuple(generator.integers(1, 9, generator.integers(1, longest)).tolist())
        for _ in range(count // 3 + 1)
    ]
    made = []
    for _ in range(count):
        continuation = tuple(
            generator.integers(1, 9, generator.integers(1, min(12, longest))).tolist()
        )
        made.append(Request(contexts[generator.integers(len(contexts))], continuation))
    return made


def read_back(packed: list[Packed], count: int) -> dict[int, list[tuple[list[int], int]]]:
    """Request -> for each predicted token what is seen where it is predicted, in order of
    positions, and the token."""
    found: dict[int, list[tuple[list[int], int]]] = {number: [] for number in range(count)}
    for windows in packed:
        layout = windows.layout
        for request, row, column, target in zip(
            windows.request, windows.rows, windows.columns, windows.targets, strict=True
        ):
            before = slice(0, column + 1)
            same = layout.group[row, before] == layout.group[row, column]
            branch = layout.branch[row, before]
            seen = same & ((branch == 0) | (branch == layout.branch[row, column]))
            assert (layout.positions[row, before][seen] == np.arange(seen.sum())).all()
            found[int(request)].append((windows.tokens[row, before][seen].tolist(), int(target)))
    return found


@pytest.mark.parametrize("windows", [1, 3, 16, 17, 33, 100, 250])
def test_few_windows_are_empty_and_few_shapes_are_made(windows: int) -> None:
    asked = [Request((number,) * 256, (1,)) for number in range(windows)]
    (packed,) = pack(asked, group(asked, 256), 256, tokens_per_batch=16 * 256)
    rows = len(packed.tokens)
    batches = -(-windows // 16)
    assert windows <= rows < windows + 2 * batches
    assert rows % batches == 0 and (rows // batches) % 2 == 0 and rows // batches <= 16


@pytest.mark.parametrize(("count", "longest"), [(1, 5), (40, 30), (60, 300), (30, 700), (25, 9)])
def test_every_token_sees_its_own_text(count: int, longest: int) -> None:
    asked = requests(count, seed=count, longest=longest)
    groups = group(asked, longest)
    packed = pack(asked, groups, longest, tokens_per_batch=1024)
    for number, found in read_back(packed, count).items():
        context, continuation = asked[number]
        whole = [*context, *continuation][-(longest + 1) :]
        start = len(whole) - len(continuation)
        assert found == [(whole[:end], whole[end]) for end in range(start, len(whole))]
    for windows in packed:
        rows, length = windows.tokens.shape
        assert length <= longest
        most = max(1, 1024 // length)
        assert batch_size(rows, length) in range(max(1, most // 8), most + 1)


def test_a_context_is_laid_down_once() -> None:
    asked = [
        Request((1, 2, 3), (4,)),
        Request((1, 2, 3), (5,)),
        Request((1, 2, 3), (4, 6)),
        Request((1, 2, 3), (4,)),
    ]
    (one,) = group(asked, 100)
    assert one.branches == {(): [0, 1, 3], (4,): [2]} and one.size == 4
    (packed,) = pack(asked, [one], 100, 1024)
    assert packed.tokens.shape == (1, 100) and packed.tokens[0, :5].tolist() == [1, 2, 3, 4, 0]
    assert packed.request.tolist() == [0, 1, 3, 2, 2]


def test_groups_that_do_not_fit_are_split() -> None:
    asked = [Request((1,) * 6, (token, token, token)) for token in range(2, 9)]
    groups = group(asked, 10)
    assert [one.size for one in groups] == [10, 10, 10, 8]
    assert sorted(
        number for one in groups for numbers in one.branches.values() for number in numbers
    ) == list(range(7))


def test_windows_are_filled() -> None:
    asked = requests(600, seed=0, longest=100)
    groups = group(asked, 2048)
    (packed,) = pack(asked, groups, 2048, tokens_per_batch=1024)
    assert (packed.layout.group >= 0).mean() > 0.9


def test_batches_hold_so_many_tokens() -> None:
    groups = group(requests(50, seed=1, longest=40), 100)
    cut = list(batches(groups, 120))
    assert [one for load in cut for one in load] == groups
    assert all(sum(one.size for one in load) <= 120 or len(load) == 1 for load in cut)
    assert len(cut) > 3


@pytest.mark.parametrize("bad", [Request((), (1,)), Request((1,), ()), Request((1,), (1,) * 11)])
def test_what_cannot_be_scored_is_refused(bad: Request) -> None:
    with pytest.raises(InputError, match="what follows"):
        group([bad], 10)
