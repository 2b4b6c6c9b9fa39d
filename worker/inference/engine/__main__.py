"""The engine process: it owns the models, and exchanges JSON lines with the server on stdin and stdout.

`python -m worker.inference.engine`. It ends when its stdin closes, however the server ended.
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
from transformers.utils import logging as transformers_logging

from worker.inference.engine.scheduler import Scheduler
from worker.inference.ipc import (
    Cancel,
    Configure,
    EngineInput,
    EngineOutput,
    EngineReady,
    EngineSettings,
    Failed,
    Generate,
    Preload,
    Stats,
    decode_engine_input,
    request_id_of,
)
from worker.inference.model.batch_invariance import is_batch_invariant
from worker.inference.model.loaded_models import LoadedModels
from worker.json_lines import MessageWriter, read_messages, take_stdin, take_stdout

log = logging.getLogger(__name__)

STATS_EVERY = 0.2  # seconds, while there is work; and at once when it runs out

Inbox = queue.SimpleQueue[EngineInput | None]
"""The server's messages; None when a base has been loaded."""


def listen(source: BinaryIO, inbox: Inbox, send: Callable[[EngineOutput], None]) -> None:
    """Put the server's messages into the inbox; end the process at the end of the input."""

    def reject(line: bytes) -> None:
        log.error("the server sent an unparseable message: %r", line[:200])
        send(Failed(id=request_id_of(line), status=500, message="the engine cannot read this request"))

    try:
        read_messages(source, decode_engine_input, inbox.put, reject)
    finally:
        os._exit(0)  # not sys.exit: the model thread may be deep in a forward


def run(inbox: Inbox, scheduler: Scheduler, writer: MessageWriter, heartbeat: float) -> None:
    """Run for ever: receive messages between steps, and report statistics at least once in `heartbeat` seconds."""
    sent, sent_at, at = Stats(), 0.0, 0.0
    while True:
        receive(inbox, scheduler, heartbeat)
        if scheduler.has_work:
            scheduler.step()
        if not scheduler.has_work or time.monotonic() - at > STATS_EVERY:
            stats, at = scheduler.stats, time.monotonic()
            if stats != sent or at - sent_at >= heartbeat:
                writer.send(stats)
                sent, sent_at = stats, at


def receive(inbox: Inbox, scheduler: Scheduler, timeout: float) -> None:
    """Hand all messages of the inbox to the scheduler. Without work, wait for one, at most `timeout` seconds."""
    while not scheduler.has_work or not inbox.empty():
        try:
            message = inbox.get(timeout=timeout)
        except queue.Empty:
            return
        if isinstance(message, Generate):
            scheduler.add(message)
        elif isinstance(message, Preload):
            scheduler.preload(message.model)
        elif isinstance(message, Cancel):
            scheduler.cancel(message.id)
        if not scheduler.has_work:
            return  # so that statistics are sent


def configure(inbox: Inbox) -> EngineSettings:
    """Apply the settings in the server's first message."""
    first = inbox.get()
    if not isinstance(first, Configure):
        raise SystemExit("the first line must be a configure message")
    if first.settings.threads:
        torch.set_num_threads(first.settings.threads)
    return first.settings


def main() -> None:
    """Start the reader thread, report ready, and run. Models are loaded on demand."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="engine: %(levelname)s %(message)s")
    untyped: Any = transformers_logging
    untyped.disable_progress_bar()
    writer, inbox = MessageWriter(take_stdout()), Inbox()
    reader_args = (take_stdin(), inbox, writer.send)
    threading.Thread(target=listen, args=reader_args, name="reader", daemon=True).start()
    settings = configure(inbox)
    models = LoadedModels(settings)
    dtype = str(models.dtype).removeprefix("torch.")
    invariant = is_batch_invariant(models.device, models.dtype)
    writer.send(EngineReady(pid=os.getpid(), device=str(models.device), dtype=dtype, batch_invariant=invariant))
    scheduler = Scheduler(models, settings, writer.send, on_loaded=lambda: inbox.put(None))
    run(inbox, scheduler, writer, settings.heartbeat)


if __name__ == "__main__":
    main()
