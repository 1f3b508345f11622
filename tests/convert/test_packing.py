import numpy as np
import pytest

from convert import packing
from convert.packing import Groups, Mask
from tests.helpers.zeros import grouped, zeroed

DTYPES = ["bfloat16", "float16", "float32", "float64"]


def round_trip(array: np.ndarray) -> tuple[packing.Places | None, float]:
    """Returns the layout, and the share of the bytes that remains."""
    places = packing.places_of(array)
    if places is None:
        return None, 1
    packed, values = packing.pack(array, places)
    assert len(packed) == places.nbytes(array.shape) and len(values) == places.count(array.shape)
    back = packing.unpack(packed, values, places, array.shape)
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())
    return places, (packed.nbytes + values.nbytes) / array.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 64), (64, 8), (1000, 2050), (2, 300_000)])
@pytest.mark.parametrize("density", [0.0, 0.3, 0.5])
def test_every_bit_comes_back(shape: tuple[int, int], density: float, dtype: str) -> None:
    round_trip(zeroed(shape, density, dtype))


@pytest.mark.parametrize(
    "n, m, most",
    [
        (2, 4, 0.547),
        (1, 4, 0.282),
        (4, 8, 0.555),
        (2, 8, 0.29),
        (1, 2, 0.532),
        (8, 16, 0.555),
        (3, 4, 0.783),
    ],
)
def test_groups_take_the_bits_of_their_combinations(n: int, m: int, most: float) -> None:
    places, share = round_trip(grouped((320, 640), n, m))
    assert places == Groups(n, m)
    assert share <= most


@pytest.mark.parametrize("density, most", [(0.5, 0.57), (0.3, 0.37)])
def test_unstructured_takes_a_bit_an_element(density: float, most: float) -> None:
    places, share = round_trip(zeroed((256, 512), density, "bfloat16"))
    assert isinstance(places, Mask)
    assert share <= most


def test_a_dense_array_stays_as_it_is() -> None:
    assert packing.places_of(zeroed((64, 64), 1, "bfloat16")) is None
    assert packing.places_of(zeroed((64, 64), 0.97, "bfloat16")) is None  # a mask takes 1/16


def test_a_negative_zero_and_a_nan_are_kept() -> None:
    array = zeroed((8, 64), 0.2, "float32")
    array[0, :4] = -0.0, np.nan, 0.0, -np.inf
    array.view(np.uint32)[1, 0] = 0x7FA00001  # a NaN that signals
    round_trip(array)


def test_groups_with_fewer_than_n_hold_zeros_among_their_values() -> None:
    array = grouped((256, 64), 2, 4)
    array[3, ::5] = 0
    array[4] = 0
    assert round_trip(array)[0] == Groups(2, 4)


def test_combinations_are_numbered_by_their_masks() -> None:
    array = np.zeros((8, 4), np.float32)
    for row, kept in enumerate([(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3), (0, 1), (0, 1)]):
        array[row, list(kept)] = 1
    packed, values = packing.pack(array, Groups(2, 4))
    assert np.unpackbits(packed, bitorder="little").reshape(8, 3).tolist() == [
        [int(bit) for bit in f"{number:03b}"[::-1]] for number in (0, 1, 2, 3, 4, 5, 0, 0)
    ]
    assert (values == 1).all()


@pytest.mark.parametrize("change", ["more", "fewer", "number"])
def test_places_that_do_not_fit_the_values_are_refused(change: str) -> None:
    array = grouped((8, 32), 2, 4) if change == "number" else zeroed((8, 32), 0.4, "bfloat16")
    places = packing.places_of(array)
    assert places is not None
    packed, values = packing.pack(array, places)
    if change == "number":
        packed = np.full_like(packed, 255)  # combination 7 of 6
    elif change == "more":
        values = values[:-1]
    else:
        values = np.append(values, values[:1])
    with pytest.raises(ValueError, match="kept|combination"):
        packing.unpack(packed, values, places, array.shape)
