"""The server's client of its engine process: starts it, restarts it with back-off, exchanges messages, suspends it.

The messages about a request go to the listener that was given with it.
"""

import asyncio
import contextlib
import logging
import math
import time
from asyncio.subprocess import Process
from collections import deque
from collections.abc import Callable
from statistics import median_low
from typing import NamedTuple

from pydantic import ValidationError

from worker.inference.errors import EngineUnavailable
from worker.inference.ipc import (
    Cancel,
    Configure,
    EngineInput,
    EngineOutput,
    EngineReady,
    EngineSettings,
    Failed,
    Finished,
    Generate,
    Preload,
    Stats,
    decode_engine_output,
    request_id_of,
)
from worker.inference.sampling_params import ServedModel
from worker.inference.server.engine_process import kill_group, start_engine
from worker.json_lines import encode_message

log = logging.getLogger(__name__)

START_SECONDS = 10.0  # an estimate of the time until an engine is ready; measured starts replace it
FIRST_COMPLETION_SECONDS = 2.0  # an estimate of the first completion, which loads a base; measured ones replace it
RECENT = 5  # starts and first completions whose median is the estimate: beside other processes they take twice as long
SHORT_COMPLETION = 64  # tokens; the time of a first completion up to this is mostly loading
MIN_BACKOFF, MAX_BACKOFF, HEALTHY_AFTER = 0.5, 30.0, 60.0  # seconds
STOP_GRACE = 5.0  # seconds for an engine to end by itself after its stdin was closed
SUSPEND_GRACE = 1.0  # the same if a training job waits for its memory
MISSED_HEARTBEATS = 10  # an engine counts as stuck after so many
START_LIMIT = 300.0  # seconds until ready: what it imports may come once from a cold or distant disk
STARTING = "the inference engine is starting; try again soon"
INVARIANCE_WORDS = {
    True: "the engine's kernels are batch-invariant: an answer at temperature 0 does not depend on other requests",
    False: "the engine's kernels are not batch-invariant: at a near tie, an answer may depend on other requests",
}

Listener = Callable[[EngineOutput], None]


class _InFlight(NamedTuple):
    listener: Listener
    model: str


class EngineClient:
    """Runs one engine after another until stopped, and none while suspended. All methods run on one event loop."""

    def __init__(
        self, settings: EngineSettings, on_stats: Callable[[Stats], None], start_limit: float = START_LIMIT
    ) -> None:
        """`start_limit`: the seconds after which an engine that is not ready counts as stuck."""
        self._settings = settings
        self._start_limit = start_limit
        self._on_stats = on_stats
        self._in_flight: dict[str, _InFlight] = {}
        self._process: Process | None = None
        self._ready = self._stopping = self.batch_invariant = False
        self._may_run = asyncio.Event()
        self._may_run.set()
        self._reason = STARTING
        self._ready_at = time.monotonic() + START_SECONDS
        self._recent_starts: deque[float] = deque(maxlen=RECENT)
        self._recent_first_completions: deque[float] = deque(maxlen=RECENT)
        self._first_request: tuple[str, float] | None = None
        self._failures = 0
        self.starts = 0

    @property
    def crashed_recently(self) -> bool:
        """Whether the engine before this one ended early."""
        return self._failures > 0

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return self._ready and not self.suspended

    @property
    def suspended(self) -> bool:
        """Whether no engine may run: there is none, or it is about to end."""
        return not self._may_run.is_set()

    @property
    def unavailable_reason(self) -> str:
        """Why requests are not accepted."""
        return self._reason if self.suspended else STARTING

    @property
    def pid(self) -> int | None:
        """The engine's process id, while there is one."""
        return self._process.pid if self._process else None

    @property
    def in_flight(self) -> int:
        """Requests without their last message."""
        return len(self._in_flight)

    def in_flight_of(self, digest: str) -> int:
        """The same for one model."""
        return sum(in_flight.model == digest for in_flight in self._in_flight.values())

    @property
    def retry_after(self) -> int:
        """Whole seconds until an engine should be ready. If suspended, until it has finished a first completion."""
        left = self._ready_at - time.monotonic()
        if self.suspended:
            first_completion = median_low(self._recent_first_completions or (FIRST_COMPLETION_SECONDS,))
            left = max(0.0, left) + self._start_seconds + first_completion
        return max(1, math.ceil(left))

    @property
    def _start_seconds(self) -> float:
        return median_low(self._recent_starts or (START_SECONDS,))

    def submit(self, request: Generate, listener: Listener) -> None:
        """Send a request. `listener` gets its messages, the last one Finished or Failed.

        Raises EngineUnavailable. If the engine dies, the message is a Failed with status 503.
        """
        if not self.ready:
            raise EngineUnavailable(self.unavailable_reason, self.retry_after)
        self._in_flight[request.id] = _InFlight(listener, request.model.digest)
        self._first_request = self._first_request or (request.id, time.monotonic())
        self._send(request)

    def preload(self, model: ServedModel) -> None:
        """Send a preload hint: the engine loads this model when it has nothing else to do."""
        if self.ready:
            self._send(Preload(model=model))

    def cancel(self, request_id: str) -> None:
        """Cancel a request. It may have finished already."""
        if self._in_flight.pop(request_id, None) is not None:
            self._send(Cancel(id=request_id))

    async def run(self) -> None:
        """Keep an engine alive until `stop`."""
        while not self._stopping:
            await self._may_run.wait()
            began = time.monotonic()
            try:
                await self._run_engine()
            except OSError as error:
                log.error("the engine could not be started: %s", error)
            if self._stopping:
                return
            if self.suspended:
                self._failures = 0
                continue
            self._failures = 0 if time.monotonic() - began > HEALTHY_AFTER else self._failures + 1
            pause = min(MAX_BACKOFF, MIN_BACKOFF * 2 ** max(0, self._failures - 1))
            log.warning("the engine ended; starting another in %.1f s", pause)
            self._ready_at = time.monotonic() + pause + self._start_seconds
            await asyncio.sleep(pause)

    def refuse_requests(self, reason: str, seconds: float) -> None:
        """Accept no requests from now on, and start no engine. `seconds`: when it should be back."""
        self._may_run.clear()
        self._reason, self._ready_at = reason, time.monotonic() + seconds

    async def suspend(self, grace: float) -> None:
        """After `refuse_requests`: end the engine. `grace`: seconds for running requests to finish; the others fail."""
        until = time.monotonic() + grace
        while self._in_flight and self._ready and time.monotonic() < until:
            await asyncio.sleep(0.05)
        await self._end(SUSPEND_GRACE)
        log.info("the engine is suspended: %s", self._reason)

    def resume(self) -> None:
        """Run engines again. Does nothing if not suspended."""
        if self.suspended:
            self._ready_at = time.monotonic() + self._start_seconds
            self._may_run.set()

    async def stop(self) -> None:
        """End the engine for good."""
        self._stopping = True
        await self._end(STOP_GRACE)

    async def _end(self, grace: float) -> None:
        """Close its stdin, then kill what is left of its group."""
        process = self._process
        if process is None or process.stdin is None:
            return
        process.stdin.close()
        try:  # one that is still starting does not listen yet, and holds nothing
            await asyncio.wait_for(process.wait(), grace if self._ready else 0)
        except TimeoutError:
            kill_group(process.pid)
            await process.wait()

    async def _run_engine(self) -> None:
        began = time.monotonic()
        self._ready_at = began + self._start_seconds
        process = await start_engine()
        self._process, self._first_request = process, None
        self.starts += 1
        try:
            if self.suspended:  # since the process was created
                return
            self._send(Configure(settings=self._settings))
            assert process.stdout is not None
            while raw := await self._read_line(process.stdout):
                self._handle_line(raw, began)
        except ValueError:
            log.exception("the engine sent a line that is too long")
        finally:
            self._ready = False
            kill_group(process.pid)
            await process.wait()
            self._process = None
            self._on_stats(Stats())
            self._fail_all()

    async def _read_line(self, out: asyncio.StreamReader) -> bytes:
        """The engine's next line; empty if it has ended or counts as stuck."""
        timeout = MISSED_HEARTBEATS * self._settings.heartbeat if self._ready else self._start_limit
        try:
            return await asyncio.wait_for(out.readline(), timeout)
        except TimeoutError:
            log.error("the engine is stuck: it sent nothing for %g s", timeout)
            return b""

    def _handle_line(self, raw: bytes, began: float) -> None:
        try:
            message = decode_engine_output(raw)
        except ValidationError:
            log.error("the engine sent an unparseable message: %r", raw[:200])
            self._fail_unparseable(request_id_of(raw))
            return
        if isinstance(message, EngineReady):
            self._ready = True
            self._recent_starts.append(time.monotonic() - began)
            self.batch_invariant = message.batch_invariant
            log.info("engine %d is ready on %s in %s", message.pid, message.device, message.dtype)
            log.info(INVARIANCE_WORDS[message.batch_invariant])
        elif isinstance(message, Stats):
            self._on_stats(message)
        else:
            ends = isinstance(message, Finished | Failed)
            if isinstance(message, Finished):
                self._update_estimate(message)
            in_flight = self._in_flight.pop(message.id, None) if ends else self._in_flight.get(message.id)
            if in_flight is not None:
                in_flight.listener(message)

    def _fail_unparseable(self, request_id: str) -> None:
        """Fail the request that an unparseable message belongs to: it would wait for ever."""
        if in_flight := self._in_flight.get(request_id):
            self.cancel(request_id)
            in_flight.listener(Failed(id=request_id, status=500, message="the engine's answer cannot be read"))

    def _update_estimate(self, finished: Finished) -> None:
        """Measure how long an engine's first completion takes, for `retry_after`."""
        if (
            self._first_request
            and self._first_request[0] == finished.id
            and finished.completion_tokens <= SHORT_COMPLETION
        ):
            self._recent_first_completions.append(time.monotonic() - self._first_request[1])

    def _fail_all(self) -> None:
        reason = self._reason if self.suspended else "the inference engine died; try again soon"
        left, self._in_flight = self._in_flight, {}
        for request_id, in_flight in left.items():
            in_flight.listener(Failed(id=request_id, status=503, message=reason))

    def _send(self, message: EngineInput) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):  # its end is noticed on stdout
                self._process.stdin.write(encode_message(message))
