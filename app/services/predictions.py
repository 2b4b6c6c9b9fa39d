"""Predictions: resolve the model and the corpus, limit how many run at once, and build the answer."""

import time
from collections import Counter
from collections.abc import Generator as Generating
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

from app.db.tables import BaseModelRow
from app.domain.adapters import Adapter
from app.domain.calibration import Calibration
from app.domain.claims import Verdict, parse_verdict
from app.domain.errors import ClientDisconnectedError, ConflictError, VerituneError
from app.domain.identity import new_id
from app.domain.predictions import (
    CitedSentence,
    ObservedText,
    Predicted,
    PredictedAction,
    PredictedStep,
    Prediction,
    PredictionEvent,
    PredictRequest,
    ProbabilityMethod,
    Timings,
)
from app.domain.quotations import cite
from app.domain.react import ReactFormat, build_header, parse_steps
from app.domain.specs import Generation
from app.domain.trajectories import parse_action
from app.domain.tuning_methods import Quantization
from app.generation import Generator
from app.knowledge.base import KnowledgeExplorer, KnowledgeSource
from app.services.adapters import Adapters
from app.services.base_models import BaseModels
from app.services.corpora import Corpora
from app.services.prompt_session import IsCancelled, PromptSession, never_cancelled
from app.services.react_loop import ReactLoop, Trace, render_trajectory
from app.services.slots import Slots
from app.services.stored_predictions import StoredPredictions

BATCH_THREADS = 16
SAMPLING_TEMPERATURE = 0.7
UNGROUNDED_TOKENS = 256


@dataclass(frozen=True, slots=True)
class PredictionModel:
    """The model that answers: its digest at inference, and the format and the limit that it was trained with."""

    digest: str
    adapter: str | None
    base: BaseModelRow
    form: ReactFormat
    limit: int
    generation: Generation
    calibration: Calibration | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One finished trajectory."""

    trace: Trace
    session: PromptSession


class Predictions:
    def __init__(
        self,
        stored: StoredPredictions,
        adapters: Adapters,
        base_models: BaseModels,
        corpora: Corpora,
        generator: Generator,
        slots: int,
        max_sequence_length: int,
    ) -> None:
        self._stored = stored
        self._adapters = adapters
        self._base_models = base_models
        self._corpora = corpora
        self._generator = generator
        self._slots = Slots(slots)
        self._cap = max_sequence_length

    def predict(self, request: PredictRequest, is_cancelled: IsCancelled = never_cancelled) -> Prediction:
        """Judge one claim. Raises CutOffError between two model calls if the request is cancelled."""
        model = self._resolve_model(request)
        with self._slots.slot({model.digest}):
            return self._drain(request, model, is_cancelled)

    def predict_from(
        self,
        request: PredictRequest,
        source: KnowledgeSource,
        calibration: Calibration | None,
        is_cancelled: IsCancelled,
    ) -> Prediction:
        """Judge one claim of an evaluation, with Observations from `source`. It takes no slot of the users'."""
        model = replace(self._resolve_model(request), calibration=calibration)
        return self._drain(request, model, is_cancelled, source)

    def stream(
        self, request: PredictRequest, is_cancelled: IsCancelled = never_cancelled
    ) -> Generating[PredictionEvent]:
        """Judge one claim and yield its events. The first event comes after all checks have passed."""
        model = self._resolve_model(request)
        with self._slots.slot({model.digest}):
            yield from self._run(request, model, is_cancelled)

    def predict_batch(
        self, requests: Sequence[PredictRequest], is_cancelled: IsCancelled = never_cancelled
    ) -> list[Prediction | VerituneError]:
        """Judge many claims, several at a time. A claim that fails has its error at its index."""

        def one(request: PredictRequest) -> Prediction | VerituneError:
            try:
                return self._drain(request, self._resolve_model(request), is_cancelled)
            except ClientDisconnectedError:  # the whole batch is cancelled
                raise
            except VerituneError as error:
                return error

        with (
            self._slots.slot(self._resolve_digests(requests)),
            ThreadPoolExecutor(min(BATCH_THREADS, len(requests))) as pool,
        ):
            return list(pool.map(one, requests))

    def check(self) -> None:
        """Raise VerituneError, with the message of inference, if no claim could be judged now."""
        self._generator.check()

    def _resolve_digests(self, requests: Sequence[PredictRequest]) -> set[str]:
        """The digests of the models that a batch uses. Each is looked up once. Unknown ones are left out."""
        asked = {(one.adapter, one.base_model, "adapter" in one.model_fields_set): one for one in requests}
        found = set()
        for one in asked.values():
            with suppress(VerituneError):  # the batch's answer has this error at the request's index
                found.add(self._resolve_model(one).digest)
        return found

    def _drain(
        self,
        request: PredictRequest,
        model: PredictionModel,
        is_cancelled: IsCancelled,
        source: KnowledgeSource | None = None,
    ) -> Prediction:
        for event in self._run(request, model, is_cancelled, source):
            if isinstance(event, Predicted):
                return event.prediction
        raise AssertionError("the loop ends with a prediction")

    def _run(
        self,
        request: PredictRequest,
        model: PredictionModel,
        is_cancelled: IsCancelled,
        source: KnowledgeSource | None = None,
    ) -> Iterator[PredictionEvent]:
        """`source`: replaces the corpus."""
        started = time.monotonic()
        self._stored.refuse_taken(request.name)
        runs: list[Run] = []
        if request.mode == "ungrounded":
            runs.append(self._run_ungrounded(request, self._start_session(model, None, is_cancelled), model.limit))
            corpus = None
        else:
            corpus, opened = self._corpora.open(request.corpus)
            for sample in range(request.samples):
                session = self._start_session(model, sample if request.samples > 1 else None, is_cancelled)
                loop = ReactLoop(
                    session, KnowledgeExplorer(source or opened), request.claim, request.max_steps, model.limit
                )
                for event in loop.run():
                    if sample == 0:
                        yield event
                runs.append(Run(loop.trace, session))
        prediction = _build_prediction(request, model, runs, corpus, time.monotonic() - started)
        if request.store:
            self._stored.add(prediction)
        yield Predicted(prediction=prediction)

    def _resolve_model(self, request: PredictRequest) -> PredictionModel:
        adapter: Adapter | None
        if request.adapter is not None:
            adapter = self._adapters.get(request.adapter)
        elif "adapter" not in request.model_fields_set and request.base_model is None:
            adapter = self._adapters.default()
        else:
            adapter = None
        if adapter is None:
            base = self._base_models.get(request.base_model)
            digest = self._base_models.served_digest(base, Quantization())
            context = self._base_models.describe(base).context_length
            return PredictionModel(digest, None, base, ReactFormat(), min(self._cap, context), Generation())
        base = self._base_models.by_digest(adapter.manifest.base.digest)
        if request.base_model not in (None, base.name):
            raise ConflictError(
                f"the adapter {adapter.id} was trained on {base.name}; leave base_model {request.base_model} out",
                code="adapter_of_another_base",
            )
        generation = Generation.model_validate(adapter.manifest.spec["generation"])
        form = ReactFormat.model_validate(adapter.manifest.format)
        limit = adapter.manifest.max_sequence_length
        return PredictionModel(adapter.digest, adapter.id, base, form, limit, generation, adapter.calibration)

    def _start_session(self, model: PredictionModel, sample: int | None, is_cancelled: IsCancelled) -> PromptSession:
        generation = model.generation
        temperature = generation.temperature or (0.0 if sample is None else SAMPLING_TEMPERATURE)
        room = max(16, model.limit // 4)
        return PromptSession(
            generator=self._generator,
            encoder=self._base_models.encoder(model.base, model.form),
            model=model.digest,
            temperature=temperature,
            top_p=generation.top_p,
            max_thought_tokens=min(generation.max_new_tokens, room),
            seed=sample,
            is_cancelled=is_cancelled,
        )

    def _run_ungrounded(self, request: PredictRequest, session: PromptSession, limit: int) -> Run:
        """Ungrounded mode: the model writes the whole trajectory, Observations included, within `limit` tokens."""
        session.start(session.encoder.form.render_instructions(request.claim))
        opening = list(session.ids)
        session.append([build_header("Thought", 1)])
        room = limit - len(session.ids) - 1
        text = session.generate_trajectory(max(1, min(UNGROUNDED_TOKENS, room)))
        trace = Trace(steps=_build_steps(f"Thought 1:{text}"))
        session.ids = opening
        trace.probabilities = session.score_verdicts(1)
        finish = trace.steps[-1].action if trace.steps else None
        verdict = parse_verdict(finish.argument) if finish and finish.name == "Finish" else None
        trace.forced = verdict is None
        trace.verdict = verdict or max(trace.probabilities, key=lambda v: trace.probabilities[v])
        return Run(trace, session)


def _build_steps(text: str) -> list[PredictedStep]:
    """Parse a trajectory that the model wrote alone, up to its first Finish. Its Observations are the model's own."""
    steps = []
    for raw in parse_steps(text)[1]:
        action = _build_action(raw.action)
        observation = ObservedText(text=" ".join(raw.observation.split()), source="model") if raw.observation else None
        done = action is not None and action.name == "Finish"
        thought = " ".join((raw.thought or "").split())
        steps.append(PredictedStep(thought=thought, action=action, observation=None if done else observation))
        if done:
            break
    return steps


def _build_action(text: str | None) -> PredictedAction | None:
    if text is None:
        return None
    line = text.strip().split("\n", 1)[0]
    try:
        action = parse_action(line)
    except ValueError:
        return PredictedAction(name="", argument=line)
    return PredictedAction(name=action.name, argument=action.argument)


def _cite(trace: Trace, verdict: Verdict) -> tuple[tuple[CitedSentence, ...], bool]:
    """(the sentences that decided, whether the last Thought's quotations were all observed)."""
    observed = [step.observation.text for step in trace.steps if step.observation and step.observation.page]
    return cite(trace.steps[-1].thought if trace.steps else "", verdict, observed, trace.read)


def _build_prediction(
    request: PredictRequest, model: PredictionModel, runs: list[Run], corpus: str | None, seconds: float
) -> Prediction:
    method: ProbabilityMethod = "vote" if len(runs) > 1 else "verdict_branch"
    votes = Counter(run.trace.verdict for run in runs)
    verdict = votes.most_common(1)[0][0]
    shown = next(run for run in runs if run.trace.verdict is verdict)
    voted = {v: votes[v] / len(runs) for v in Verdict}
    probabilities = voted if method == "vote" else shown.trace.probabilities
    # Without Observations the scores are others than those that were fitted.
    if request.mode == "grounded" and method == "verdict_branch" and model.calibration is not None:
        method, probabilities = "verdict_branch_calibrated", model.calibration.apply(probabilities)
    meter = shown.session.meter
    for other in runs:
        if other is not shown:
            meter.add(other.session.meter)
    grounded = request.mode == "grounded"
    decided = verdict is not Verdict.NOT_ENOUGH_INFO
    withheld = verdict if decided and probabilities[verdict] < request.verdict_policy.abstain_below else None
    unread = grounded and not decided and not shown.trace.read_a_page
    answered = Verdict.NOT_ENOUGH_INFO if withheld else verdict
    evidence, verified = _cite(shown.trace, answered)
    return Prediction(
        id=new_id("pred"),
        name=request.name,
        claim=request.claim,
        verdict=answered,
        withheld=withheld,
        confidence=probabilities[verdict],
        probabilities=probabilities,
        probability_method=method,
        agrees=probabilities[verdict] >= max(probabilities.values()),
        grounded=grounded,
        forced=shown.trace.forced,
        abstained=unread or withheld is not None,
        steps=tuple(shown.trace.steps),
        evidence=evidence,
        quotes_verified=verified,
        read=tuple(shown.trace.read),
        text=render_trajectory(shown.trace),
        adapter=model.adapter,
        base_model=model.base.name,
        corpus=corpus,
        usage=meter.usage(),
        timings=Timings(
            total=round(seconds, 4),
            generation=round(meter.seconds - meter.scoring_seconds, 4),
            scoring=round(meter.scoring_seconds, 4),
            search=round(sum(run.trace.search_seconds for run in runs), 4),
        ),
    )
