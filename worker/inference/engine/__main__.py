"""The engine: a process that owns the models, and speaks JSON lines with the front on stdin and stdout.

It lives as long as its stdin: when that closes, however the front died, a watcher thread ends the process.
Run it as `python -m worker.inference.engine`. Knows no HTTP and nothing of the application.
"""

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO

import torch
from pydantic import ValidationError
from transformers.utils import logging as transformers_logging

from worker.inference.engine.scheduler import Scheduler
from worker.inference.ipc import (
    Cancel,
    Configure,
    EngineMessage,
    EngineSettings,
    Failed,
    Generate,
    Preload,
    Ready,
    ServerMessage,
    Stats,
    decode_engine_message,
    line,
    request_id_of,
)
from worker.inference.model.loaded_models import LoadedModels

log = logging.getLogger(__name__)

STATS_EVERY = 0.2  # seconds, while busy; and at once when work runs out

Inbox = queue.SimpleQueue[EngineMessage | None]
"""The front's messages; None when there is news without one."""


class MessageWriter:
    """The way out: one JSON line a message. What libraries print goes to stderr instead."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(self, message: ServerMessage) -> None:
        """Send one message; from any thread, since a line is one write."""
        self._out.write(line(message))
        self._out.flush()


def listen(source: BinaryIO, inbox: Inbox, say: Callable[[ServerMessage], None]) -> None:
    """Pass the front's lines on; end the process when there are no more."""
    try:
        for raw in source:
            try:
                inbox.put(decode_engine_message(raw))
            except ValidationError:
                log.error("the front said what is no message: %r", raw[:200])
                say(Failed(id=request_id_of(raw), status=500, message="the engine cannot read this request"))
    finally:
        os._exit(0)  # not sys.exit: the model thread may be deep in a forward


def serve(inbox: Inbox, scheduler: Scheduler, mouth: MessageWriter, heartbeat: float) -> None:
    """Work for ever: take messages in between turns, and report what happened; at least once a `heartbeat`."""
    told, told_at, at = Stats(), 0.0, 0.0
    while True:
        take_in(inbox, scheduler, heartbeat)
        if scheduler.busy:
            scheduler.turn()
        if not scheduler.busy or time.monotonic() - at > STATS_EVERY:
            stats, at = scheduler.stats, time.monotonic()
            if stats != told or at - told_at >= heartbeat:
                mouth.say(stats)
                told, told_at = stats, at


def take_in(inbox: Inbox, scheduler: Scheduler, patience: float) -> None:
    """Hand over every message that is there; wait for one, but not for longer, when there is nothing else to do."""
    while not scheduler.busy or not inbox.empty():
        try:
            message = inbox.get(timeout=patience)
        except queue.Empty:
            return
        if isinstance(message, Generate):
            scheduler.add(message)
        elif isinstance(message, Preload):
            scheduler.expect(message.model)
        elif isinstance(message, Cancel):
            scheduler.cancel(message.id)
        if not scheduler.busy:
            return  # so that the front hears how things stand


def configure(inbox: Inbox) -> EngineSettings:
    """The front's first message."""
    first = inbox.get()
    if not isinstance(first, Configure):
        raise SystemExit("the first line must be a configure message")
    if first.settings.threads:
        torch.set_num_threads(first.settings.threads)
    return first.settings


def main() -> None:
    """The process: listen, load nothing yet, say ready, serve."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="engine: %(levelname)s %(message)s")
    untyped: Any = transformers_logging
    untyped.disable_progress_bar()
    mouth, inbox = MessageWriter(), Inbox()
    threading.Thread(target=listen, args=(sys.stdin.buffer, inbox, mouth.say), name="listener", daemon=True).start()
    settings = configure(inbox)
    models = LoadedModels(settings)
    dtype = str(models.dtype).removeprefix("torch.")
    mouth.say(Ready(pid=os.getpid(), device=str(models.device), dtype=dtype))
    serve(inbox, Scheduler(models, settings, mouth.say, lambda: inbox.put(None)), mouth, settings.heartbeat)


if __name__ == "__main__":
    main()
