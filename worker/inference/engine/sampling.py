"""Sampling: masks, temperature and top-p turn logits into the next token of one sequence, and its log-probabilities.

Log-probabilities are those of the distribution that was sampled from, after every mask, temperature and top-p: where
three tokens are allowed, three probabilities sum to 1. Those of a prompt's tokens are the model's own.
"""

from collections.abc import Sequence

import torch

from worker.inference.engine.grammar import GrammarMatcher
from worker.inference.errors import SamplingError
from worker.inference.ipc import RankedToken, TokenLogprobs, TopToken
from worker.inference.model.base import Base
from worker.inference.sampling_params import SamplingParams

GREEDY_BELOW = 1e-5
LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot write


class Sampler:
    """Samples one sequence's tokens. It owns the sequence's random generator and grammar matcher."""

    def __init__(self, sampling: SamplingParams, base: Base, grammar: GrammarMatcher | None) -> None:
        self._sampling = sampling
        self._base = base
        self.grammar = grammar
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._allowed = self._mask_of(sampling.allowed_token_ids)

    def sample(self, logits: torch.Tensor, num_output_tokens: int) -> tuple[int, TokenLogprobs | None]:
        """The next token, from logits [vocab] in float32. Raises SamplingError and GrammarError."""
        mask = self._mask(num_output_tokens)
        if mask is not None:
            logits = logits.masked_fill(~mask.to(logits.device), -torch.inf)
        if not bool(torch.isfinite(logits.max())):
            raise _no_token_error(mask)
        if self._sampling.temperature < GREEDY_BELOW:
            token = int(logits.argmax())
        else:
            logits = _apply_top_p(logits / self._sampling.temperature, self._sampling.top_p)
            token = int(torch.multinomial(logits.softmax(-1).cpu(), 1, generator=self._generator))
        return token, self._logprobs(logits, token)

    def _mask(self, num_output_tokens: int) -> torch.Tensor | None:
        mask = self._allowed
        if self.grammar is not None:
            allowed = self.grammar.mask(self._base.vocabulary)
            mask = allowed if mask is None else mask & allowed
        if num_output_tokens < self._sampling.min_tokens:
            ends = self._mask_of([*self._base.eos_ids, *self._sampling.stop_token_ids])
            if ends is not None:
                mask = ~ends if mask is None else mask & ~ends
        return mask

    def _mask_of(self, ids: list[int] | None) -> torch.Tensor | None:
        if not ids:
            return None
        mask = torch.zeros(self._base.vocabulary, dtype=torch.bool)
        mask[torch.tensor(ids)] = True
        return mask

    def _logprobs(self, logits: torch.Tensor, token: int) -> TokenLogprobs | None:
        if self._sampling.logprobs is None:
            return None
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(min(self._sampling.logprobs, len(logprobs)))
        top = [self._top(int(i), float(value)) for i, value in zip(ids, values, strict=True)]
        return TokenLogprobs(chosen=self._top(token, float(logprobs[token])), top=top)

    def _top(self, token: int, logprob: float) -> TopToken:
        return TopToken(id=token, logprob=max(logprob, LOWEST_LOGPROB), text=_text(token, self._base))


def rank_prompt_tokens(logits: torch.Tensor, ids: Sequence[int], count: int, base: Base) -> list[list[RankedToken]]:
    """For each position, its token of `ids` and then the `count` most probable ones, from unmasked logits
    [len(ids), vocab]. The most probable token has rank 1. Raises SamplingError."""
    if not bool(torch.isfinite(logits).all()):
        raise _no_token_error(None)
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(ids, device=logits.device, dtype=torch.long)[:, None])
    ranks = (logprobs > own).sum(1) + 1
    values, tops = logprobs.topk(min(count, logits.shape[1]))
    best = range(1, tops.shape[1] + 1)
    columns = torch.cat([own, values], 1).tolist(), tops.tolist(), ranks.tolist()
    return [
        [_ranked(*token, base) for token in zip([own_id, *others], worth, [rank, *best], strict=True)]
        for own_id, worth, others, rank in zip(ids, *columns, strict=True)
    ]


def _ranked(token: int, logprob: float, rank: int, base: Base) -> RankedToken:
    return RankedToken(id=token, logprob=max(logprob, LOWEST_LOGPROB), text=_text(token, base), rank=rank)


def _text(token: int, base: Base) -> str:
    text: str = base.tokenizer.decode([token], skip_special_tokens=False)
    return text


def _no_token_error(mask: torch.Tensor | None) -> SamplingError:
    if mask is not None and not bool(mask.any()):
        return SamplingError("the constraints together allow no token here", 400)
    return SamplingError("the model gave logits that are not finite", 500)


def _apply_top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Nucleus sampling (arXiv:1904.09751) of logits [vocab]: keep the smallest set of tokens whose probability reaches
    `top_p`, at least one."""
    if top_p >= 1:
        return logits
    ordered, ids = logits.sort(descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    beyond = before >= top_p
    beyond[0] = False  # float32 makes 0 of a very small `top_p`
    return logits.index_fill(0, ids[beyond], -torch.inf)
