"""Encodes segments as token ids, in the same way for training and for serving.

Each segment is encoded alone, and the ids are joined. BOS comes once, at the front. So a trajectory's training ids are,
token for token, the ids that serving builds up turn by turn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app.domain.claims import Verdict
from app.domain.corpora import split_sentences
from app.domain.react import (
    TURN_END,
    ReactFormat,
    Segment,
    SegmentKind,
    build_action_opening,
    build_header,
    build_label,
    render_turn,
)
from app.domain.trajectories import ActionName, Step, Trajectory

CLOSING_RESERVE = 96
"""Tokens that stay free behind an observation, for the next thought and action."""

MIN_OBSERVATION_BUDGET = 16


@dataclass(frozen=True, slots=True)
class Tokenization:
    """A base model's tokenizer, as functions.

    `encode` adds no special tokens and treats its text as the middle of a document. It encodes `<|im_end|>` as plain
    text. `encode_template` encodes it as the control token.
    """

    encode: Callable[[str], Sequence[int]]
    encode_template: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    bos_id: int | None
    eos_id: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class EncodedSequence:
    """Token ids of one sequence. `trained`: the half-open spans that carry a loss."""

    ids: tuple[int, ...]
    trained: tuple[tuple[int, int], ...]

    @property
    def labelled(self) -> int:
        """Number of tokens that carry a loss. The first token of a sequence is never predicted."""
        return sum(end - max(start, 1) for start, end in self.trained if end > max(start, 1))


@dataclass(frozen=True, slots=True)
class TrimmedTrajectory:
    """A trajectory whose observations fit their budgets.

    `observations`: number that were shortened. `tokens`: number removed. `protected`: a quotation moved a window."""

    trajectory: Trajectory
    observations: int
    tokens: int
    protected: bool


class Encoder:
    """Encodes the segments of one prompt format with one tokenizer."""

    def __init__(self, tokens: Tokenization, form: ReactFormat) -> None:
        self.tokens = tokens
        self.form = form
        self._fixed: dict[Segment, tuple[int, ...]] = {}

    def encode_segment(self, segment: Segment) -> tuple[int, ...]:
        if segment.kind is SegmentKind.END:
            return (self.tokens.eos_id,)
        if segment.kind in (SegmentKind.CLAIM, SegmentKind.THOUGHT, SegmentKind.ARGUMENT, SegmentKind.OBSERVATION):
            return tuple(self.tokens.encode(segment.text))
        if segment not in self._fixed and len(self._fixed) < 1_000:
            self._fixed[segment] = self._encode_fixed(segment)
        return self._fixed.get(segment) or self._encode_fixed(segment)

    def _encode_fixed(self, segment: Segment) -> tuple[int, ...]:
        encode = self.tokens.encode_template if segment.kind is SegmentKind.TEMPLATE else self.tokens.encode
        return tuple(encode(segment.text))

    def encode(self, segments: Sequence[Segment]) -> EncodedSequence:
        """Token ids with BOS first, and the trained spans, adjacent ones joined."""
        ids: list[int] = [] if self.tokens.bos_id is None else [self.tokens.bos_id]
        spans: list[tuple[int, int]] = []
        for segment in segments:
            start = len(ids)
            ids.extend(self.encode_segment(segment))
            if not segment.trained or start == len(ids):
                continue
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], len(ids))
            else:
                spans.append((start, len(ids)))
        return EncodedSequence(tuple(ids), tuple(spans))

    def map_first_tokens(self, names: Sequence[Segment]) -> dict[int, Segment]:
        """First token of each segment → the segment. Raises ValueError if two begin with the same token."""
        firsts = {self.encode_segment(segment)[0]: segment for segment in names}
        if len(firsts) != len(names):
            raise ValueError(f"this tokenizer begins two of {[s.text for s in names]} with the same token")
        return firsts

    def map_action_tokens(self) -> dict[int, ActionName]:
        """First token of each action's name → the action."""
        atoms = {build_action_opening(name).text: name for name in ActionName}
        firsts = self.map_first_tokens([build_action_opening(name) for name in ActionName])
        return {token: atoms[segment.text] for token, segment in firsts.items()}

    def map_verdict_tokens(self) -> dict[int, Verdict]:
        """First token of each verdict → the verdict."""
        labels = [build_label(verdict) for verdict in Verdict]
        return {token: Verdict(s.text) for token, s in self.map_first_tokens(labels).items()}

    def get_observation_budget(self, used: int, limit: int) -> int:
        """Number of tokens for the next observation, if `used` of `limit` are taken: half of what is left.

        It depends only on the tokens before the observation, so training and serving agree. Halving leaves room for
        any number of further steps.
        """
        return max(MIN_OBSERVATION_BUDGET, (limit - used - CLOSING_RESERVE) // 2)

    def count_sentences_that_fit(self, sentences: Sequence[str], budget: int) -> int:
        """Number of leading sentences that fit `budget` tokens as one observation."""
        count_that_fits = 0
        for count in range(1, len(sentences) + 1):
            if len(self.tokens.encode(" " + " ".join(sentences[:count]))) > budget:
                break
            count_that_fits = count
        return count_that_fits

    def clip_sentence(self, sentence: str, budget: int) -> str:
        """The longest run of leading words of a sentence that fits `budget` tokens; at least one word.

        Binary search.
        """
        words = sentence.split()
        low, high = 1, max(1, len(words))
        while low < high:
            middle = (low + high + 1) // 2
            fits = len(self.tokens.encode(" " + " ".join(words[:middle]))) <= budget
            low, high = (middle, high) if fits else (low, middle - 1)
        return " ".join(words[:low])

    def shorten_observation(self, observation: str, budget: int) -> str:
        """The leading sentences that fit `budget` tokens; if not even the first fits, its leading words."""
        if len(self.tokens.encode(f" {observation}")) <= budget:
            return observation
        sentences = split_sentences(observation)
        count = self.count_sentences_that_fit(sentences, budget)
        return " ".join(sentences[:count]) if count else self.clip_sentence(sentences[0], budget)

    def count_tokens(self, segments: Sequence[Segment]) -> int:
        return len(self.encode(segments).ids)

    def trim_observations(self, trajectory: Trajectory, limit: int) -> TrimmedTrajectory:
        """Shortens every observation of `trajectory` to its budget in a sequence of `limit` tokens.

        `shorten_observation` could remove a sentence that a later thought quotes. Then a window of whole sentences
        around the quotation stays instead, and `protected` is set.
        """
        if self.count_tokens(self.form.render_trajectory(trajectory)) <= self._get_untrimmed_length(limit):
            return TrimmedTrajectory(trajectory, 0, 0, protected=False)
        steps: list[Step] = []
        trimmed = tokens = 0
        protected = False
        for number, step in enumerate(trajectory.steps):
            if step.observation is None:
                steps.append(step)
                continue
            used = self._count_tokens_before_observation(trajectory.claim, steps, step)
            budget = self.get_observation_budget(used, limit)
            shortened, is_protected = self._shorten_around_quotations(
                step.observation, budget, _find_quotations(trajectory.steps[number + 1 :])
            )
            if shortened != step.observation:
                trimmed += 1
                tokens += len(self.tokens.encode(step.observation)) - len(self.tokens.encode(shortened))
                protected |= is_protected
            steps.append(step.model_copy(update={"observation": shortened}))
        shorter = trajectory.model_copy(update={"steps": tuple(steps)})
        return TrimmedTrajectory(shorter, trimmed, tokens, protected)

    def _get_untrimmed_length(self, limit: int) -> int:
        """No observation of a trajectory up to this length can exceed its budget: the budget is at least as long."""
        return (limit - CLOSING_RESERVE) // 2

    def _count_tokens_before_observation(self, claim: str, before: Sequence[Step], step: Step) -> int:
        opened = render_turn(len(before) + 1, step.thought, step.action)
        waiting = [TURN_END, build_header("Observation", len(before) + 1)]
        return self.count_tokens([*self.form.render_prompt(claim, before), *opened, *waiting])

    def _shorten_around_quotations(self, observation: str, budget: int, quotations: Sequence[str]) -> tuple[str, bool]:
        """(the observation shortened, whether it is a window around a quotation that would be lost otherwise)."""
        shortened = self.shorten_observation(observation, budget)
        quoted = [q for q in quotations if q in observation]
        lost = [q for q in quoted if q not in shortened]
        if not lost:
            return shortened, False
        sentences = split_sentences(observation)
        every = [i for q in quoted for i, sentence in enumerate(sentences) if q in sentence]
        missed = [i for q in lost for i, sentence in enumerate(sentences) if q in sentence]
        # Keep all quotations if they fit, else the first one that would be lost.
        spans = [(min(every), max(every)), (missed[0], missed[0])] if missed else []
        for first, last in spans:
            if self._fits(sentences, first, last, budget):
                return self._widen(sentences, first, last, budget), True
        return shortened, False

    def _fits(self, sentences: Sequence[str], first: int, last: int, budget: int) -> bool:
        inside = 0 <= first <= last < len(sentences)
        return inside and self.count_sentences_that_fit([" ".join(sentences[first : last + 1])], budget) == 1

    def _widen(self, sentences: Sequence[str], first: int, last: int, budget: int) -> str:
        """The sentences from `first` to `last`, extended first to the front, then to the back, as far as `budget`
        allows."""
        while self._fits(sentences, first - 1, last, budget):
            first -= 1
        while self._fits(sentences, first, last + 1, budget):
            last += 1
        return " ".join(sentences[first : last + 1])


def _find_quotations(later: Sequence[Step]) -> list[str]:
    """Texts of at least 4 characters that later thoughts put in double quotes. The verdict rests on them."""
    found: list[str] = []
    for step in later:
        parts = step.thought.replace("“", '"').replace("”", '"').split('"')
        found += [quoted.strip(" .,") for quoted in parts[1::2] if len(quoted.strip(" .,")) >= 4]
    return found
