"""One sequence: a prompt, the tokens generated so far, their text, and why the generation ended.

Checks of a request what only the model's files can tell: vocabulary, context length and grammar.
"""

import torch

from worker.inference.engine.detokenizer import AnswerText, Detokenizer
from worker.inference.engine.grammar import GrammarCache, GrammarMatcher
from worker.inference.engine.sampling import Sampler, rank_prompt_tokens
from worker.inference.errors import GrammarError, RequestError, SamplingError
from worker.inference.ipc import Chunk, Finished, Generate, RankedToken, TokenLogprobs
from worker.inference.model.base import Base
from worker.inference.sampling_params import FinishReason


def tokenize_prompt(request: Generate, base: Base) -> Generate:
    """The request with its prompt as token ids. Raises RequestError if they do not fit the model."""
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
    """A prompt and its completion so far.

    - `token_ids`: prompt and completion.
    - `num_computed_tokens`: positions whose keys and values are in the KV cache.
    - `num_cached_tokens`: those of them that the prefix cache had.
    """

    def __init__(self, request: Generate, base: Base, grammars: GrammarCache) -> None:
        """`request`: tokenized. Raises RequestError if its grammar is not accepted."""
        self.id = request.id
        self.model = request.model
        self.stream = request.stream
        self.sampling = request.sampling
        self._base = base
        assert not isinstance(request.prompt, str)
        self.prompt_ids = request.prompt
        self.token_ids = list(self.prompt_ids)
        self.num_computed_tokens = self.num_cached_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._sampler = Sampler(self.sampling, base, _start_grammar(request, base, grammars))
        self._decoder = Detokenizer(base.tokenizer, self.prompt_ids, self.sampling.skip_special_tokens)
        self._text = AnswerText(self.sampling.stop, self.sampling.include_stop_str_in_output)
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[list[RankedToken]] = []
        self._prompt_error: SamplingError | None = None
        self._sent = 0

    @property
    def prefix_key(self) -> tuple[str, str]:
        """The model that computed these keys and values: only its own prompts may reuse them."""
        return self.model.digest, self.model.base_digest

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the prompt's own tokens are scored."""
        return self.sampling.prompt_logprobs is not None

    @property
    def skips_prefix_cache(self) -> bool:
        """Whether the prompt must be computed from its first token."""
        return self.sampling.deterministic or self.wants_prompt_logprobs

    @property
    def is_prefilled(self) -> bool:
        """Whether the whole prompt is in the KV cache."""
        return self.num_computed_tokens == len(self.prompt_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - len(self.prompt_ids)

    def add_computed(self, count: int, logits: torch.Tensor) -> None:
        """Note that `count` more prompt tokens are in the KV cache. If they are scored, `logits` is [count, vocab]."""
        if self.wants_prompt_logprobs:
            following = self.prompt_ids[self.num_computed_tokens + 1 : self.num_computed_tokens + 1 + count]
            top = self.sampling.prompt_logprobs or 0
            try:
                self._prompt_logprobs += rank_prompt_tokens(logits[: len(following)], following, top, self._base)
            except SamplingError as error:
                self._prompt_error = error
        self.num_computed_tokens += count

    def sample_next(self, logits: torch.Tensor) -> None:
        """Sample the next token from logits [vocab] and append it. Raises RequestError."""
        try:
            if self._prompt_error is not None:
                raise self._prompt_error
            token, logprobs = self._sampler.sample(logits, self.num_output_tokens)
            self.token_ids.append(token)
            if logprobs:
                self._logprobs.append(logprobs)
            self._end_by_token(token)
            if self.finish_reason is None:
                self._accept(token)
        except GrammarError as error:
            raise RequestError(str(error), "structured_outputs") from error
        except SamplingError as error:
            raise RequestError(str(error), status=error.status) from error

    def next_chunk(self) -> Chunk:
        """The tokens since the last chunk, and the text that is settled."""
        is_first = self._sent == 0
        text, ids, logprobs = self._take(final=False)
        prompt = self.prompt_ids if is_first else []
        return Chunk(id=self.id, text=text, token_ids=ids, logprobs=logprobs, prompt_token_ids=prompt)

    def finished_message(self) -> Finished:
        """The rest of the completion, once `finish_reason` is set."""
        assert self.finish_reason is not None
        text, ids, logprobs = self._take(final=True)
        return Finished(
            id=self.id,
            text=text,
            token_ids=ids,
            logprobs=logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            prompt_token_ids=self.prompt_ids,
            prompt_logprobs=[None, *self._prompt_logprobs] if self.wants_prompt_logprobs else None,
            cached_tokens=self.num_cached_tokens,
            completion_tokens=self.num_output_tokens,
        )

    def _take(self, final: bool) -> tuple[str, list[int], list[TokenLogprobs] | None]:
        since, self._sent = self._sent, self.num_output_tokens
        logprobs = self._logprobs[since:] if self.sampling.logprobs is not None else None
        return self._text.take(final), self.token_ids[len(self.prompt_ids) + since :], logprobs

    def _end_by_token(self, token: int) -> None:
        ends_by_id = token in self.sampling.stop_token_ids
        ends_by_eos = token in self._base.eos_ids and not self.sampling.ignore_eos
        if ends_by_id or ends_by_eos:
            self.finish_reason = "stop"
            self.stop_reason = token if ends_by_id else None
            if self.sampling.include_stop_str_in_output:
                self._text.add(self._decoder.push(token), search=False)

    def _accept(self, token: int) -> None:
        grammar = self._sampler.grammar
        if grammar is not None:
            grammar.accept(token)
        self._text.add(self._decoder.push(token), search=self.num_output_tokens > self.sampling.min_tokens)
        if self._text.stop is not None:
            self.finish_reason, self.stop_reason = "stop", self._text.stop
        elif grammar is not None and grammar.is_complete:
            self.finish_reason = "stop"
        elif self.num_output_tokens >= self.sampling.max_tokens:
            self.finish_reason = "length"


def _check_vocabulary(ids: list[int], base: Base, param: str) -> None:
    worst = max(ids, default=0)
    if worst >= base.vocabulary:
        raise RequestError(f"{param} holds token id {worst}, but the vocabulary ends at {base.vocabulary - 1}", param)


def _start_grammar(request: Generate, base: Base, grammars: GrammarCache) -> GrammarMatcher | None:
    wanted = request.sampling.structured_outputs
    if wanted is None:
        return None
    try:
        return grammars.start_matcher(base, wanted)
    except GrammarError as error:
        raise RequestError(str(error), "structured_outputs") from error
