"""Lines that one of the two processes cannot read: whoever waits is told, and nobody else is hurt."""

import subprocess
import sys
import time

import torch

from tests.conftest import ROOT
from tests.inference.conftest import ENGINE
from worker.inference.ipc import (
    Configure,
    EngineOutput,
    EngineReady,
    Failed,
    Generate,
    decode_engine_output,
    request_id_of,
)
from worker.inference.model.batch_invariance import is_batch_invariant
from worker.inference.sampling_params import SamplingParams, ServedModel
from worker.inference.server.engine_client import EngineClient
from worker.json_lines import encode_message


def test_an_engine_survives_what_it_cannot_read_and_says_whose_it_is() -> None:
    lines = [encode_message(Configure(settings=ENGINE)), b'{"op":"generate","id":"odd","model":1}\n', b"\xff[[\n"]
    with subprocess.Popen(
        [sys.executable, "-m", "worker.inference.engine"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as engine:
        assert engine.stdin is not None
        assert engine.stdout is not None
        engine.stdin.write(b"".join(lines))
        engine.stdin.flush()
        said = [decode_engine_output(engine.stdout.readline()) for _ in range(3)]
        engine.stdin.close()

    assert [message.id for message in said if isinstance(message, Failed)] == ["odd", ""]
    (ready,) = (message for message in said if isinstance(message, EngineReady))
    assert ready.batch_invariant is is_batch_invariant(torch.device(ready.device), getattr(torch, ready.dtype))


def test_the_client_learns_whether_answers_depend_on_other_requests() -> None:
    for batch_invariant in (True, False):
        link = EngineClient(ENGINE, lambda _: None)
        ready = EngineReady(pid=1, device="cpu", dtype="bfloat16", batch_invariant=batch_invariant)
        link._handle_line(encode_message(ready), time.monotonic())
        assert link.batch_invariant is batch_invariant


def test_an_answer_that_cannot_be_read_fails_whoever_waits_for_it() -> None:
    link, heard = EngineClient(ENGINE, lambda _: None), list[EngineOutput]()
    link._handle_line(encode_message(EngineReady(pid=1, device="cpu", dtype="float32")), time.monotonic())
    model = ServedModel(digest="one", base_digest="one", base_path="/nowhere", max_model_len=8)
    for name in ("mine", "another"):
        link.submit(Generate(id=name, model=model, prompt=[5], sampling=SamplingParams()), heard.append)

    link._handle_line(b'{"event":"finished","id":"mine","text":null}', 0.0)

    assert heard == [Failed(id="mine", status=500, message="the engine's answer cannot be read")]
    assert link.in_flight == 1


def test_the_id_of_a_line_is_told_by_its_place() -> None:
    assert request_id_of(encode_message(Failed(id="cmpl-1-0", status=500, message=""))) == "cmpl-1-0"
    assert request_id_of(b'{"event":"finished","text":"{\\"id\\":\\"mine\\"","id":"cmpl-1-0"}') == ""
    assert request_id_of(b"\xff") == ""
