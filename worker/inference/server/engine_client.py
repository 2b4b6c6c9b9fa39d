"""The front's hold on its engine: start it, restart it with back-off, pass lines both ways, put it to rest, end it.

An answer's messages go to the listener that was given with the request. Knows no HTTP and no torch.
"""

import asyncio
import contextlib
import logging
import math
import time
from asyncio.subprocess import Process
from collections.abc import Callable
from typing import NamedTuple

from pydantic import ValidationError

from worker.inference.ipc import (
    Cancel,
    Configure,
    EngineMessage,
    EngineSettings,
    Failed,
    Finished,
    Generate,
    Preload,
    Ready,
    ServerMessage,
    Stats,
    decode_server_message,
    line,
    request_id_of,
)
from worker.inference.protocol import ServedModel
from worker.inference.server.engine_process import kill_group, start_engine

log = logging.getLogger(__name__)

START_SECONDS = 10.0  # about what an engine takes to be ready; refined by the last start
FIRST_SECONDS = 2.0  # the same for its first answer, which loads a base; refined by the last first one
SHORT_ANSWER = 64  # tokens of an answer whose time is mostly that
FIRST_PAUSE, LONGEST_PAUSE, HEALTHY_AFTER = 0.5, 30.0, 60.0  # seconds
GRACE = 5.0  # seconds an engine has to end by itself once its stdin is closed
SILENCE = 10  # heartbeats
START_LIMIT = 300.0  # seconds to be ready in: what it imports may come from a cold or distant disk, once
REST_GRACE = 1.0  # the same where somebody waits for its memory
STARTING = "the inference engine is starting; try again soon"

Listener = Callable[[ServerMessage], None]


class _Awaited(NamedTuple):
    listener: Listener
    model: str


class EngineUnavailable(Exception):
    """No engine is ready; `retry_after` is in seconds."""

    def __init__(self, why: str, retry_after: int) -> None:
        super().__init__(why)
        self.retry_after = retry_after


class EngineClient:
    """One engine at a time, over and over, until stopped; none while it rests. Lives on one event loop."""

    def __init__(
        self, settings: EngineSettings, on_stats: Callable[[Stats], None], start_limit: float = START_LIMIT
    ) -> None:
        """`start_limit`: the seconds after which an engine that is not ready is taken for stuck."""
        self._settings = settings
        self._start_limit = start_limit
        self._on_stats = on_stats
        self._awaited: dict[str, _Awaited] = {}
        self._process: Process | None = None
        self._ready = self._stopping = False
        self._awake = asyncio.Event()
        self._awake.set()
        self._why = STARTING
        self._expected_at = time.monotonic() + START_SECONDS
        self._start_seconds, self._first_seconds = START_SECONDS, FIRST_SECONDS
        self._first: tuple[str, float] | None = None
        self._failures = 0
        self.starts = 0

    @property
    def shaky(self) -> bool:
        """Whether this engine follows one that died early."""
        return self._failures > 0

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._ready and not self.resting

    @property
    def resting(self) -> bool:
        """Whether it was put to rest: there is no engine, or it is about to end."""
        return not self._awake.is_set()

    @property
    def why(self) -> str:
        """Why requests are not taken, for whoever asks."""
        return self._why if self.resting else STARTING

    @property
    def pid(self) -> int | None:
        """The engine's process id, while there is one."""
        return self._process.pid if self._process else None

    @property
    def in_flight(self) -> int:
        """How many answers are awaited."""
        return len(self._awaited)

    def in_flight_of(self, digest: str) -> int:
        """How many of them are this model's."""
        return sum(awaited.model == digest for awaited in self._awaited.values())

    @property
    def retry_after(self) -> int:
        """Whole seconds until an engine should be ready; of one that rests, until it has answered somebody."""
        left = self._expected_at - time.monotonic()
        if self.resting:
            left = max(0.0, left) + self._start_seconds + self._first_seconds
        return max(1, math.ceil(left))

    def submit(self, request: Generate, listener: Listener) -> None:
        """Ask for an answer; `listener` gets its messages, the last one Finished or Failed.

        Raises EngineUnavailable. An engine that dies on the way is a Failed with status 503.
        """
        if not self.ready:
            raise EngineUnavailable(self.why, self.retry_after)
        self._awaited[request.id] = _Awaited(listener, request.model.digest)
        self._first = self._first or (request.id, time.monotonic())
        self._tell(request)

    def expect(self, model: ServedModel) -> None:
        """Have a model loaded once the engine has nothing else to do, if there is room; nobody waits for it."""
        if self.ready:
            self._tell(Preload(model=model))

    def cancel(self, request_id: str) -> None:
        """Stop working on an answer; unknown and finished ones are fine."""
        if self._awaited.pop(request_id, None) is not None:
            self._tell(Cancel(id=request_id))

    async def run(self) -> None:
        """Keep an engine alive until `stop`."""
        while not self._stopping:
            await self._awake.wait()
            began = time.monotonic()
            try:
                await self._one_life()
            except OSError as error:
                log.error("the engine could not be started: %s", error)
            if self._stopping:
                return
            if self.resting:
                self._failures = 0
                continue
            self._failures = 0 if time.monotonic() - began > HEALTHY_AFTER else self._failures + 1
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** max(0, self._failures - 1))
            log.warning("the engine ended; starting another in %.1f s", pause)
            self._expected_at = time.monotonic() + pause + self._start_seconds
            await asyncio.sleep(pause)

    def refuse(self, why: str, seconds: float) -> None:
        """Take no requests from now on, and start no engine; it should come back after so many seconds."""
        self._awake.clear()
        self._why, self._expected_at = why, time.monotonic() + seconds

    async def rest(self, patience: float) -> None:
        """After `refuse`: give running answers `patience` seconds, then end the engine; what is left is Failed."""
        until = time.monotonic() + patience
        while self._awaited and self._ready and time.monotonic() < until:
            await asyncio.sleep(0.05)
        await self._end(REST_GRACE)
        log.info("the engine rests: %s", self._why)

    def wake(self) -> None:
        """Have an engine again; does nothing when it does not rest."""
        if self.resting:
            self._expected_at = time.monotonic() + self._start_seconds
            self._awake.set()

    async def stop(self) -> None:
        """End the engine for good."""
        self._stopping = True
        await self._end(GRACE)

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

    async def _one_life(self) -> None:
        began = time.monotonic()
        self._expected_at = began + self._start_seconds
        process = await start_engine()
        self._process, self._first = process, None
        self.starts += 1
        try:
            if self.resting:  # it was told so while the process was made
                return
            self._tell(Configure(settings=self._settings))
            assert process.stdout is not None
            while raw := await self._line(process.stdout):
                self._take(raw, began)
        except ValueError:
            log.exception("the engine said what cannot be read")
        finally:
            self._ready = False
            kill_group(process.pid)
            await process.wait()
            self._process = None
            self._on_stats(Stats())
            self._fail_all()

    async def _line(self, out: asyncio.StreamReader) -> bytes:
        """What the engine says next; nothing at its end, which a long silence is taken for."""
        patience = SILENCE * self._settings.heartbeat if self._ready else self._start_limit
        try:
            return await asyncio.wait_for(out.readline(), patience)
        except TimeoutError:
            log.error("the engine is stuck: it said nothing for %g s", patience)
            return b""

    def _take(self, raw: bytes, began: float) -> None:
        try:
            message = decode_server_message(raw)
        except ValidationError:
            log.error("the engine said what is no message: %r", raw[:200])
            self._fail_unread(request_id_of(raw))
            return
        if isinstance(message, Ready):
            self._ready = True
            self._start_seconds = time.monotonic() - began
            log.info("engine %d is ready on %s in %s", message.pid, message.device, message.dtype)
        elif isinstance(message, Stats):
            self._on_stats(message)
        else:
            ends = isinstance(message, Finished | Failed)
            if isinstance(message, Finished):
                self._learn_from(message)
            awaited = self._awaited.pop(message.id, None) if ends else self._awaited.get(message.id)
            if awaited is not None:
                awaited.listener(message)

    def _fail_unread(self, request_id: str) -> None:
        """Whoever waits for what cannot be read would wait for ever."""
        if awaited := self._awaited.get(request_id):
            self.cancel(request_id)
            awaited.listener(Failed(id=request_id, status=500, message="the engine's answer cannot be read"))

    def _learn_from(self, answer: Finished) -> None:
        """How long an engine's first answer takes, for those who are told when to come back."""
        if self._first and self._first[0] == answer.id and answer.completion_tokens <= SHORT_ANSWER:
            self._first_seconds = time.monotonic() - self._first[1]

    def _fail_all(self) -> None:
        why = self._why if self.resting else "the inference engine died; try again soon"
        left, self._awaited = self._awaited, {}
        for request_id, awaited in left.items():
            awaited.listener(Failed(id=request_id, status=503, message=why))

    def _tell(self, message: EngineMessage) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):  # its end is noticed on stdout
                self._process.stdin.write(line(message))
