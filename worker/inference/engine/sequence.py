"""One answer in the making: its tokens, its text as far as it is settled, and why it ends.

Checks what only the model can tell of a request (vocabulary, length, grammar). Knows no batches and no cache.
"""

import torch

from worker.inference.engine.detokenizer import AnswerText, Detokenizer
from worker.inference.engine.grammar import GrammarCache, GrammarError, GrammarMatcher
from worker.inference.engine.sampling import Sampler, SamplingError, ranked
from worker.inference.ipc import Chunk, Finished, Generate, RankedToken, TokenLogprobs
from worker.inference.model.base import Base
from worker.inference.protocol import FinishReason


class RequestError(Exception):
    """This request cannot be answered; `status` is the HTTP status, `param` the field at fault."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.status = message, param, status


def encoded(request: Generate, base: Base) -> Generate:
    """The request with its prompt in tokens. Raises RequestError when that does not fit the model."""
    ids = base.text.encode_document(request.prompt) if isinstance(request.prompt, str) else request.prompt
    _check_vocabulary(ids, base, "prompt")
    _check_vocabulary(request.sampling.allowed_token_ids or [], base, "allowed_token_ids")
    _check_vocabulary(request.sampling.stop_token_ids, base, "stop_token_ids")
    limit = min(request.model.max_model_len, base.context)
    if len(ids) + request.sampling.max_tokens > limit:
        raise RequestError(
            f"This model's maximum context length is {limit} tokens, but the prompt has {len(ids)} tokens "
            f"and max_tokens asks for {request.sampling.max_tokens} more. Shorten or lower one of them.",
            "prompt",
        )
    if not ids:
        raise RequestError("prompt is empty: it encodes to no token", "prompt")
    return request.model_copy(update={"prompt": ids})


class Sequence:
    """A prompt and the answer so far. `length` counts the positions whose keys and values are stored."""

    def __init__(self, request: Generate, base: Base, grammars: GrammarCache) -> None:
        """`request`: encoded. Raises RequestError when the model knows no such grammar."""
        self.id = request.id
        self.model = request.model
        self.stream = request.stream
        self.sampling = request.sampling
        self._base = base
        assert not isinstance(request.prompt, str)
        self.prompt = request.prompt
        self.tokens = list(self.prompt)
        self.length = self.cached = 0
        self.finish: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._sampler = Sampler(self.sampling, base, _start_grammar(request, base, grammars))
        self._decoder = Detokenizer(base.tokenizer, self.prompt, self.sampling.skip_special_tokens)
        self._text = AnswerText(self.sampling.stop, self.sampling.include_stop_str_in_output)
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[list[RankedToken]] = []
        self._unsound: SamplingError | None = None
        self._sent = 0

    @property
    def reads_as(self) -> tuple[str, str]:
        """Whose keys and values these are: another adapter's, or those over another base, are of no use."""
        return self.model.digest, self.model.base_digest

    @property
    def is_scored(self) -> bool:
        """Whether the prompt's own tokens have their probabilities told."""
        return self.sampling.prompt_logprobs is not None

    @property
    def reads_all(self) -> bool:
        """Whether the prompt must be read from its first token, whatever is known of it."""
        return self.sampling.deterministic or self.is_scored

    @property
    def produced(self) -> int:
        """How many tokens the answer has."""
        return len(self.tokens) - len(self.prompt)

    def take_in(self, count: int, logits: torch.Tensor) -> None:
        """`count` more tokens of the prompt are stored. Where it is scored, `logits` [count, V] stand behind them."""
        if self.is_scored:
            following = self.prompt[self.length + 1 : self.length + 1 + count]
            top = self.sampling.prompt_logprobs or 0
            try:
                self._prompt_logprobs += ranked(logits[: len(following)], following, top, self._base)
            except SamplingError as error:
                self._unsound = error
        self.length += count

    def advance(self, logits: torch.Tensor) -> None:
        """Choose the next token from logits [V] and take it in. Raises RequestError."""
        try:
            if self._unsound is not None:
                raise self._unsound
            token, logprobs = self._sampler.choose(logits, self.produced)
            self.tokens.append(token)
            if logprobs:
                self._logprobs.append(logprobs)
            self._end_by_token(token)
            if self.finish is None:
                self._accept(token)
        except GrammarError as error:
            raise RequestError(str(error), "structured_outputs") from error
        except SamplingError as error:
            raise RequestError(str(error), status=error.status) from error

    def piece(self) -> Chunk:
        """What is settled since the last piece."""
        is_first = self._sent == 0
        text, ids, logprobs = self._take(final=False)
        prompt = self.prompt if is_first else []
        return Chunk(id=self.id, text=text, token_ids=ids, logprobs=logprobs, prompt_token_ids=prompt)

    def finished(self) -> Finished:
        """The rest of the answer, once `finish` is set."""
        assert self.finish is not None
        text, ids, logprobs = self._take(final=True)
        return Finished(
            id=self.id,
            text=text,
            token_ids=ids,
            logprobs=logprobs,
            finish_reason=self.finish,
            stop_reason=self.stop_reason,
            prompt_token_ids=self.prompt,
            prompt_logprobs=[None, *self._prompt_logprobs] if self.is_scored else None,
            cached_tokens=self.cached,
            completion_tokens=self.produced,
        )

    def _take(self, final: bool) -> tuple[str, list[int], list[TokenLogprobs] | None]:
        since, self._sent = self._sent, self.produced
        logprobs = self._logprobs[since:] if self.sampling.logprobs is not None else None
        return self._text.take(final), self.tokens[len(self.prompt) + since :], logprobs

    def _end_by_token(self, token: int) -> None:
        ends_by_id = token in self.sampling.stop_token_ids
        ends_by_eos = token in self._base.eos_ids and not self.sampling.ignore_eos
        if ends_by_id or ends_by_eos:
            self.finish = "stop"
            self.stop_reason = token if ends_by_id else None
            if self.sampling.include_stop_str_in_output:
                self._text.add(self._decoder.push(token), search=False)

    def _accept(self, token: int) -> None:
        grammar = self._sampler.grammar
        if grammar is not None:
            grammar.accept(token)
        self._text.add(self._decoder.push(token), search=self.produced > self.sampling.min_tokens)
        if self._text.stop is not None:
            self.finish, self.stop_reason = "stop", self._text.stop
        elif grammar is not None and grammar.complete:
            self.finish = "stop"
        elif self.produced >= self.sampling.max_tokens:
            self.finish = "length"


def _check_vocabulary(ids: list[int], base: Base, param: str) -> None:
    worst = max(ids, default=0)
    if worst >= base.vocabulary:
        raise RequestError(f"{param} holds token id {worst}, but the vocabulary ends at {base.vocabulary - 1}", param)


def _start_grammar(request: Generate, base: Base, grammars: GrammarCache) -> GrammarMatcher | None:
    wanted = request.sampling.structured_outputs
    if wanted is None:
        return None
    try:
        return grammars.start(base, wanted)
    except GrammarError as error:
        raise RequestError(str(error), "structured_outputs") from error
