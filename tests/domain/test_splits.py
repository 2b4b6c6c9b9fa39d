"""Splits of a dataset: named by a column, or drawn."""

import pytest

from app.domain.splits import SplitName, draw_split, read_split_name


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (0, SplitName.TRAIN),
        ("1", SplitName.VALIDATION),
        (2.0, SplitName.TEST),
        (" Train ", SplitName.TRAIN),
        ("validation", SplitName.VALIDATION),
        ("TEST", SplitName.TEST),
        (None, None),
        ("  ", None),
    ],
)
def test_a_columns_value_names_a_split(value: object, part: SplitName | None) -> None:
    assert read_split_name(value) is part


@pytest.mark.parametrize("value", [3, -1, 0.5, float("nan"), True, "dev", [1], {}])
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="write 0, 1, 2 or train, validation, test"):
        read_split_name(value)


def test_a_draw_falls_into_its_share() -> None:
    shares = (0.5, 0.25, 0.25)
    assert [draw_split(drawn, shares) for drawn in (0.0, 0.49, 0.5, 0.74, 0.75, 0.99)] == [
        *[SplitName.TRAIN] * 2,
        *[SplitName.VALIDATION] * 2,
        *[SplitName.TEST] * 2,
    ]


def test_no_draw_falls_into_a_split_without_a_share() -> None:
    """The largest draw, with shares that add up to slightly less than 1."""
    assert draw_split(1 - 2**-32, (0.7, 0.3 - 1e-9, 0.0)) is SplitName.TRAIN
    assert draw_split(0.0, (0.0, 1.0, 0.0)) is SplitName.VALIDATION
