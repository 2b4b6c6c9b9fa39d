"""What one token is chosen from, and by whose grammar: without a model."""

import dataclasses
import math

import pytest
import torch

from tests.inference.conftest import Shelf
from worker.inference.engine.grammar import GrammarCache
from worker.inference.engine.sampling import Sampler, rank_prompt_tokens
from worker.inference.errors import GrammarError, SamplingError
from worker.inference.model.base import Base, load_base
from worker.inference.sampling_params import SamplingParams, StructuredOutputs

WORTH = {11: 0.0, 12: 1.0, 13: 2.0, 14: 3.0}
"""Logits of the only tokens that can come."""


@pytest.fixture(scope="module")
def base(shelf: Shelf) -> Base:
    return load_base(shelf.served("base"), torch.device("cpu"), torch.float32)


def chosen_from(base: Base, **sampling: float) -> dict[int, float]:
    """Token → its probability, of those that could be chosen."""
    logits = torch.full((base.vocabulary,), -torch.inf)
    for token, worth in WORTH.items():
        logits[token] = worth
    sampler = Sampler(SamplingParams.model_validate({"max_tokens": 1, "logprobs": 4, **sampling}), base, None)
    _token, told = sampler.sample(logits, 0)
    assert told is not None
    return {top.id: math.exp(top.logprob) for top in told.top if top.logprob > -100}


@pytest.mark.parametrize("temperature", [0.5, 1, 2.5])
def test_a_temperature_divides_the_logits(base: Base, temperature: float) -> None:
    whole = sum(math.exp(worth / temperature) for worth in WORTH.values())
    wanted = {token: math.exp(worth / temperature) / whole for token, worth in WORTH.items()}
    assert chosen_from(base, temperature=temperature) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, {14}), (0.7, {13, 14}), (0.9, {12, 13, 14}), (1, set(WORTH))])
def test_a_nucleus_is_the_fewest_tokens_that_reach_it(base: Base, top_p: float, kept: set[int]) -> None:
    assert set(chosen_from(base, temperature=1, top_p=top_p)) == kept


def test_a_nucleus_too_small_to_be_a_number_is_the_best_token(base: Base) -> None:
    assert chosen_from(base, temperature=1, top_p=1e-46) == {14: pytest.approx(1)}


def test_what_is_not_finite_is_not_ranked(base: Base) -> None:
    logits = torch.zeros(2, base.vocabulary)
    logits[0, 5] = torch.nan
    with pytest.raises(SamplingError, match="not finite"):
        rank_prompt_tokens(logits, [3, 4], 1, base)


def test_a_grammar_is_compiled_once(base: Base) -> None:
    grammars, wanted = GrammarCache(4), StructuredOutputs(regex="a+")
    grammars.start_matcher(base, wanted)
    (first,) = grammars._compiled.values()
    grammars.start_matcher(base, wanted)
    (again,) = grammars._compiled.values()
    assert again is first


def test_a_grammar_ends_by_its_own_bases_token(base: Base) -> None:
    """As of a base and its instruct sibling, which share a tokenizer."""
    grammars, wanted = GrammarCache(4), StructuredOutputs(choice=["a", "ab"])
    (end,) = base.eos_ids
    for eos, other in ((end, 7), (7, end)):
        grammar = grammars.start_matcher(dataclasses.replace(base, eos_ids=(eos,)), wanted)
        grammar.accept(base.tokenizer.encode("a", add_special_tokens=False).ids[0])
        allowed = grammar.mask(base.vocabulary)
        assert (bool(allowed[eos]), bool(allowed[other])) == (True, False)


def test_a_grammar_that_is_too_much_is_not_kept(base: Base) -> None:
    grammars = GrammarCache(4)
    grammar = grammars.start_matcher(base, StructuredOutputs(regex="(a{1000}){1000}"))
    with pytest.raises(GrammarError, match="cannot be followed"):
        grammar.accept(int(grammar.mask(base.vocabulary).nonzero()[0]))
    assert not grammars._compiled
