"""From logits to the next token of one sequence: restrict, temper, choose, and account for it.

Log-probabilities are of the distribution that was chosen from: after every mask, temperature and top-p. A
caller who allows three tokens gets three probabilities that sum to 1. Those of a prompt's tokens are the model's own.
Knows no text and no batches.
"""

from collections.abc import Sequence

import torch

from worker.inference.engine.grammar import GrammarMatcher
from worker.inference.ipc import RankedToken, TokenLogprobs, TopToken
from worker.inference.model.base import Base
from worker.inference.protocol import SamplingParams

GREEDY_BELOW = 1e-5
LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot write


class SamplingError(Exception):
    """No token can be chosen; `status` tells whether the request (400) or the model (500) is at fault."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Sampler:
    """Chooses one sequence's tokens; owns its random numbers and its place in its grammar."""

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

    def choose(self, logits: torch.Tensor, produced: int) -> tuple[int, TokenLogprobs | None]:
        """The next token after `produced` ones, from logits [V] in float32. Raises SamplingError."""
        mask = self._mask(produced)
        if mask is not None:
            logits = logits.masked_fill(~mask.to(logits.device), -torch.inf)
        if not bool(torch.isfinite(logits.max())):
            raise _hopeless(mask)
        if self._sampling.temperature < GREEDY_BELOW:
            token = int(logits.argmax())
        else:
            logits = _nucleus(logits / self._sampling.temperature, self._sampling.top_p)
            token = int(torch.multinomial(logits.softmax(-1).cpu(), 1, generator=self._generator))
        return token, self._logprobs(logits, token)

    def _mask(self, produced: int) -> torch.Tensor | None:
        mask = self._allowed
        if self.grammar is not None:
            steps = self.grammar.mask(self._base.vocabulary)
            mask = steps if mask is None else mask & steps
        if produced < self._sampling.min_tokens:
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


def ranked(logits: torch.Tensor, ids: Sequence[int], count: int, base: Base) -> list[list[RankedToken]]:
    """For each position, its token of `ids` and then the `count` most probable ones; from logits [len(ids), V] before
    any mask. A rank is 1 where no token is more probable. Raises SamplingError."""
    if not bool(torch.isfinite(logits).all()):
        raise _hopeless(None)
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


def _hopeless(mask: torch.Tensor | None) -> SamplingError:
    if mask is not None and not bool(mask.any()):
        return SamplingError("the constraints together allow no token here", 400)
    return SamplingError("the model gave logits that are not finite", 500)


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the smallest set of tokens whose probability reaches `top_p`; at least one."""
    if top_p >= 1:
        return logits
    ordered, ids = logits.sort(descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    beyond = before >= top_p
    beyond[0] = False  # float32 makes 0 of a very small `top_p`
    return logits.index_fill(0, ids[beyond], -torch.inf)
