"""Ids sort by the time of their creation."""

from concurrent.futures import ThreadPoolExecutor

from app.domain.identity import new_id


def test_ids_of_one_millisecond_sort_in_the_order_they_were_made() -> None:
    made = [new_id("job") for _ in range(5_000)]
    assert made == sorted(made)
    assert all(len(one) == len("job_") + 20 for one in made)


def test_threads_never_share_an_id() -> None:
    with ThreadPoolExecutor(8) as pool:
        made = [one for batch in pool.map(lambda _: [new_id("ds") for _ in range(500)], range(8)) for one in batch]
    assert len(set(made)) == len(made)
