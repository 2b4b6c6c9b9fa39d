"""The ledger's arithmetic: which policy a job meets, what it reserves, and when inference is suspended."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.ledger import (
    Policy,
    PolicySetting,
    Reservation,
    Tenant,
    bytes_to_reserve,
    inference_bytes,
    policy_for,
    why_unavailable,
)

SIZES = st.integers(0, 1 << 40)


def job(size: int, policy: Policy = Policy.SHARE, ends_in: float | None = None) -> Reservation:
    return Reservation(tenant=Tenant.TRAINING, bytes=size, policy=policy, job_id=f"job_{size}", ends_in=ends_in)


@pytest.mark.parametrize(
    ("setting", "wanted", "policy"),
    [
        ("auto", 6, Policy.SHARE),
        ("auto", 7, Policy.YIELD),
        ("auto", None, Policy.YIELD),
        ("yield", 1, Policy.YIELD),
        ("exclusive", 1, Policy.EXCLUSIVE),
        ("exclusive", None, Policy.EXCLUSIVE),
    ],
)
def test_the_policy_follows_from_the_bytes_and_the_operators_setting(
    setting: PolicySetting, wanted: int | None, policy: Policy
) -> None:
    assert policy_for(setting, wanted, others=4, device=10) is policy


@given(wanted=st.none() | SIZES, others=SIZES, device=SIZES)
def test_a_job_that_shares_fits_and_reserves_at_most_the_device(wanted: int | None, others: int, device: int) -> None:
    for setting in ("auto", "yield", "exclusive"):
        policy = policy_for(setting, wanted, others, device)
        size = bytes_to_reserve(policy, wanted, device)
        assert size <= device
        if policy is Policy.SHARE:
            assert size + others <= device


def test_inference_may_use_half_of_the_device_by_default() -> None:
    assert inference_bytes(None, 16 << 30) == 8 << 30
    assert inference_bytes(7, 1_000) == 7


def test_inference_is_suspended_until_the_last_job_that_does_not_share_ends() -> None:
    assert why_unavailable([], None) is None
    assert why_unavailable([job(1), Reservation(tenant=Tenant.INFERENCE, bytes=9)], None) is None
    absence = why_unavailable([job(1, ends_in=500.0), job(2, Policy.YIELD, 7.0), job(3, Policy.EXCLUSIVE, 9.0)], None)
    assert absence is not None
    assert (absence.reason, absence.retry_after) == ("inference is suspended while a job trains (job_2 and job_3)", 9.0)


def test_an_overdue_end_is_now_and_an_unknown_end_stays_unknown() -> None:
    for given_end, told in ((-3.0, 0.0), (None, None)):
        absence = why_unavailable([job(2, Policy.YIELD, given_end)], None)
        assert absence is not None
        assert absence.retry_after == told


@pytest.mark.parametrize(("room", "away"), [(3, False), (2, True), (None, False)])
def test_inference_resumes_only_if_it_fits(room: int | None, away: bool) -> None:
    assert (why_unavailable([job(1), job(2)], room) is not None) is away
