"""JSON that names no key twice, and where it does."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.strict_json import RepeatedKeyError, parse_json, parse_row


@pytest.mark.parametrize(
    ("text", "loc"),
    [
        ('{"a": 1, "a": 1}', ("a",)),
        ('{"trainer": {"train_steps": 2}, "trainer": {"epochs": 1}}', ("trainer",)),
        ('{"trainer": {"epochs": 1, "seed": 2, "epochs": 2}}', ("trainer", "epochs")),
        ('[{"a": 1}, {"b": [{"c": 1, "c": 2}]}]', (1, "b", 0, "c")),
        ('{"a": {"b": 1, "b": 2}, "a": 3}', ("a",)),
        ('{"\\u0061": 1, "a": 2}', ("a",)),
    ],
)
def test_a_repeated_key_is_refused_with_its_path(text: str, loc: tuple[str | int, ...]) -> None:
    for parse in (parse_json, parse_row):
        with pytest.raises(RepeatedKeyError, match="is repeated") as caught:
            parse(text)
        assert caught.value.loc == loc


def test_the_message_names_the_key_and_its_parents_and_stays_short() -> None:
    with pytest.raises(RepeatedKeyError, match=r"the key 'epochs' is repeated in 'jobs.0'"):
        parse_json('{"jobs": [{"epochs": 1, "epochs": 2}]}')
    name = "k" * 10_000
    with pytest.raises(RepeatedKeyError) as caught:
        parse_json(f'{{"{name}": 1, "{name}": 2}}')
    assert len(str(caught.value)) < 200


def test_a_hundred_thousand_keys_are_no_work() -> None:
    text = json.dumps({f"k{number}": number for number in range(100_000)})
    assert len(parse_json(text)) == 100_000
    with pytest.raises(RepeatedKeyError):
        parse_json(f'{text[:-1]}, "k99999": 0}}')


def test_nan_is_null_in_a_row_alone() -> None:
    assert parse_row('{"label": NaN, "x": Infinity}') == {"label": None, "x": float("inf")}
    assert parse_json("NaN") != parse_json("NaN")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(document=_JSON)
def test_whatever_repeats_no_key_is_read_as_it_stands(document: object) -> None:
    assert parse_json(json.dumps(document)) == document
