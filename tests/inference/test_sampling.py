"""Sampling of one token, and grammars, without a model."""

import dataclasses
import math

import pytest
import torch

from tests.inference.conftest import TinyModels
from worker.inference.engine.grammar import GrammarCache
from worker.inference.engine.sampling import Sampler, rank_prompt_tokens
from worker.inference.errors import GrammarError, SamplingError
from worker.inference.model.base import Base, load_base
from worker.inference.sampling_params import SamplingParams, StructuredOutputs

LOGITS = {11: 0.0, 12: 1.0, 13: 2.0, 14: 3.0}
"""Logits of the only tokens that can be sampled."""


@pytest.fixture(scope="module")
def base(tiny: TinyModels) -> Base:
    return load_base(tiny.served("base"), torch.device("cpu"), torch.float32)


def distribution(base: Base, **sampling: float) -> dict[int, float]:
    """The tokens that could be sampled, and their probabilities."""
    logits = torch.full((base.vocabulary,), -torch.inf)
    for token, logit in LOGITS.items():
        logits[token] = logit
    sampler = Sampler(SamplingParams.model_validate({"max_tokens": 1, "logprobs": 4, **sampling}), base, None)
    _token, logprobs = sampler.sample(logits, 0)
    assert logprobs is not None
    return {top.id: math.exp(top.logprob) for top in logprobs.top if top.logprob > -100}


@pytest.mark.parametrize("temperature", [0.5, 1, 2.5])
def test_a_temperature_divides_the_logits(base: Base, temperature: float) -> None:
    whole = sum(math.exp(logit / temperature) for logit in LOGITS.values())
    wanted = {token: math.exp(logit / temperature) / whole for token, logit in LOGITS.items()}
    assert distribution(base, temperature=temperature) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, {14}), (0.7, {13, 14}), (0.9, {12, 13, 14}), (1, set(LOGITS))])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(base: Base, top_p: float, kept: set[int]) -> None:
    assert set(distribution(base, temperature=1, top_p=top_p)) == kept


def test_a_top_p_that_underflows_keeps_the_best_token(base: Base) -> None:
    assert distribution(base, temperature=1, top_p=1e-46) == {14: pytest.approx(1)}


def test_logits_that_are_not_finite_are_not_ranked(base: Base) -> None:
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


def test_a_grammar_ends_with_its_own_bases_eos_token(base: Base) -> None:
    """A base and its instruct variant share a tokenizer and differ in the EOS token."""
    grammars, wanted = GrammarCache(4), StructuredOutputs(choice=["a", "ab"])
    (end,) = base.eos_ids
    for eos, other in ((end, 7), (7, end)):
        grammar = grammars.start_matcher(dataclasses.replace(base, eos_ids=(eos,)), wanted)
        grammar.accept(base.tokenizer.encode("a", add_special_tokens=False).ids[0])
        allowed = grammar.mask(base.vocabulary)
        assert (bool(allowed[eos]), bool(allowed[other])) == (True, False)


def test_a_grammar_that_is_too_large_is_not_cached(base: Base) -> None:
    grammars = GrammarCache(4)
    grammar = grammars.start_matcher(base, StructuredOutputs(regex="(a{1000}){1000}"))
    with pytest.raises(GrammarError, match="cannot be followed"):
        grammar.accept(int(grammar.mask(base.vocabulary).nonzero()[0]))
    assert not grammars._compiled
