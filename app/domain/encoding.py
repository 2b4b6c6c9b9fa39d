"""Segments → token ids, the same way for training and for serving. Knows no tokenizer: an `encode` is handed in.

Each atom is encoded alone and the ids are joined; BOS stands once at the front. So a trajectory's training ids are,
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
    render_turn,
)
from app.domain.trajectories import ActionName, Step, Trajectory

CLOSING_RESERVE = 96
"""Tokens kept free behind an observation for the thought and action that follow it."""

MIN_OBSERVATION_BUDGET = 16


@dataclass(frozen=True, slots=True)
class Tokenization:
    """What a tokenizer offers here. `encode` adds no special tokens and treats its text as if mid-document.

    `encode` spells its text: `<|im_end|>` in it is text. `encode_template` reads such control tokens as what they are.
    """

    encode: Callable[[str], Sequence[int]]
    encode_template: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    bos_id: int | None
    eos_id: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class EncodedSequence:
    """Token ids of one sequence and the half-open spans of it that are learned."""

    ids: tuple[int, ...]
    trained: tuple[tuple[int, int], ...]

    @property
    def labelled(self) -> int:
        """How many tokens carry a loss: the first token of a sequence is never predicted."""
        return sum(end - max(start, 1) for start, end in self.trained if end > max(start, 1))


@dataclass(frozen=True, slots=True)
class TrimmedTrajectory:
    """A trajectory whose observations fit their budgets, and what that took."""

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
        """All the ids, BOS first, and the learned spans (adjacent ones joined)."""
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
        """The first token of each atom → the atom. Raises ValueError when two begin alike."""
        firsts = {self.encode_segment(segment)[0]: segment for segment in names}
        if len(firsts) != len(names):
            raise ValueError(f"this tokenizer begins two of {[s.text for s in names]} with the same token")
        return firsts

    def map_action_tokens(self) -> dict[int, ActionName]:
        """The token that decides an action's kind → the kind."""
        atoms = {build_action_opening(name).text: name for name in ActionName}
        firsts = self.map_first_tokens([build_action_opening(name) for name in ActionName])
        return {token: atoms[segment.text] for token, segment in firsts.items()}

    def map_verdict_tokens(self) -> dict[int, Verdict]:
        """The token that decides a verdict → the verdict."""
        labels = [Segment(SegmentKind.ARGUMENT, verdict.value, trained=True) for verdict in Verdict]
        return {token: Verdict(s.text) for token, s in self.map_first_tokens(labels).items()}

    def get_observation_budget(self, used: int, limit: int) -> int:
        """How many tokens the next observation may take when `used` of `limit` are taken: half of what is left.

        Blind on purpose: it looks only at what stands before, so training and serving agree; and halving leaves
        room for any number of further steps.
        """
        return max(MIN_OBSERVATION_BUDGET, (limit - used - CLOSING_RESERVE) // 2)

    def count_sentences_that_fit(self, sentences: Sequence[str], budget: int) -> int:
        """How many whole sentences from the front fit `budget` tokens when written as one observation."""
        kept = 0
        for count in range(1, len(sentences) + 1):
            if len(self.tokens.encode(" " + " ".join(sentences[:count]))) > budget:
                break
            kept = count
        return kept

    def clip_sentence(self, sentence: str, budget: int) -> str:
        """The longest run of whole words from the front of one over-long sentence that fits; at least one word."""
        words = sentence.split()
        low, high = 1, max(1, len(words))
        while low < high:
            middle = (low + high + 1) // 2
            fits = len(self.tokens.encode(" " + " ".join(words[:middle]))) <= budget
            low, high = (middle, high) if fits else (low, middle - 1)
        return " ".join(words[:low])

    def shorten_observation(self, observation: str, budget: int) -> str:
        """The observation's first whole sentences that fit, or the clipped first one."""
        if len(self.tokens.encode(f" {observation}")) <= budget:
            return observation
        sentences = split_sentences(observation)
        kept = self.count_sentences_that_fit(sentences, budget)
        return " ".join(sentences[:kept]) if kept else self.clip_sentence(sentences[0], budget)

    def count_tokens(self, segments: Sequence[Segment]) -> int:
        return len(self.encode(segments).ids)

    def trim_observations(self, trajectory: Trajectory, limit: int) -> TrimmedTrajectory:
        """`trajectory` with every observation inside its budget for a sequence of at most `limit` tokens.

        Where the blind rule would lose a sentence that a later thought quotes, a window of whole sentences around
        the quotation is kept instead and `protected` is set.
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
            kept, guarded = self._shorten_around_quotations(
                step.observation, budget, _find_quotations(trajectory.steps[number + 1 :])
            )
            if kept != step.observation:
                trimmed += 1
                tokens += len(self.tokens.encode(step.observation)) - len(self.tokens.encode(kept))
                protected |= guarded
            steps.append(step.model_copy(update={"observation": kept}))
        shorter = trajectory.model_copy(update={"steps": tuple(steps)})
        return TrimmedTrajectory(shorter, trimmed, tokens, protected)

    def _get_untrimmed_length(self, limit: int) -> int:
        """Below this length no budget can bind: even one observation of this size is under half of `limit`."""
        return (limit - CLOSING_RESERVE) // 2

    def _count_tokens_before_observation(self, claim: str, before: Sequence[Step], step: Step) -> int:
        opened = render_turn(len(before) + 1, step.thought, step.action)
        waiting = [TURN_END, build_header("Observation", len(before) + 1)]
        return self.count_tokens([*self.form.render_prompt(claim, before), *opened, *waiting])

    def _shorten_around_quotations(self, observation: str, budget: int, quotations: Sequence[str]) -> tuple[str, bool]:
        """(what stays of the observation, whether it was kept around a quotation that the blind rule would lose)."""
        blind = self.shorten_observation(observation, budget)
        quoted = [q for q in quotations if q in observation]
        lost = [q for q in quoted if q not in blind]
        if not lost:
            return blind, False
        sentences = split_sentences(observation)
        every = [i for q in quoted for i, sentence in enumerate(sentences) if q in sentence]
        missed = [i for q in lost for i, sentence in enumerate(sentences) if q in sentence]
        # All that is quoted where that fits; else the first quotation that would go, for something has to.
        spans = [(min(every), max(every)), (missed[0], missed[0])] if missed else []
        for first, last in spans:
            if self._fits(sentences, first, last, budget):
                return self._widen(sentences, first, last, budget), True
        return blind, False

    def _fits(self, sentences: Sequence[str], first: int, last: int, budget: int) -> bool:
        inside = 0 <= first <= last < len(sentences)
        return inside and self.count_sentences_that_fit([" ".join(sentences[first : last + 1])], budget) == 1

    def _widen(self, sentences: Sequence[str], first: int, last: int, budget: int) -> str:
        """The sentences from `first` to `last` and as many around them as fit, those before them first."""
        while self._fits(sentences, first - 1, last, budget):
            first -= 1
        while self._fits(sentences, first, last + 1, budget):
            last += 1
        return " ".join(sentences[first : last + 1])


def _find_quotations(later: Sequence[Step]) -> list[str]:
    """What later thoughts put in double quotes: the words that a verdict is seen to rest on."""
    found: list[str] = []
    for step in later:
        parts = step.thought.replace("“", '"').replace("”", '"').split('"')
        found += [quoted.strip(" .,") for quoted in parts[1::2] if len(quoted.strip(" .,")) >= 4]
    return found
