"""A line that server or engine cannot parse fails the request that it belongs to, and no other."""

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


def test_an_engine_fails_only_the_request_of_a_line_that_it_cannot_parse() -> None:
    lines = [encode_message(Configure(settings=ENGINE)), b'{"op":"generate","id":"odd","model":1}\n', b"\xff[[\n"]
    with subprocess.Popen(
        [sys.executable, "-m", "worker.inference.engine"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as engine:
        assert engine.stdin is not None
        assert engine.stdout is not None
        engine.stdin.write(b"".join(lines))
        engine.stdin.flush()
        outputs = [decode_engine_output(engine.stdout.readline()) for _ in range(3)]
        engine.stdin.close()

    assert [message.id for message in outputs if isinstance(message, Failed)] == ["odd", ""]
    (ready,) = (message for message in outputs if isinstance(message, EngineReady))
    assert ready.batch_invariant is is_batch_invariant(torch.device(ready.device), getattr(torch, ready.dtype))


def test_the_client_learns_whether_the_engine_is_batch_invariant() -> None:
    for batch_invariant in (True, False):
        client = EngineClient(ENGINE, lambda _: None)
        ready = EngineReady(pid=1, device="cpu", dtype="bfloat16", batch_invariant=batch_invariant)
        client._handle_line(encode_message(ready), time.monotonic())
        assert client.batch_invariant is batch_invariant


def test_an_output_that_cannot_be_parsed_fails_its_request_alone() -> None:
    client, received = EngineClient(ENGINE, lambda _: None), list[EngineOutput]()
    client._handle_line(encode_message(EngineReady(pid=1, device="cpu", dtype="float32")), time.monotonic())
    model = ServedModel(digest="one", base_digest="one", base_path="/nowhere", max_model_len=8)
    for name in ("mine", "another"):
        client.submit(Generate(id=name, model=model, prompt=[5], sampling=SamplingParams()), received.append)

    client._handle_line(b'{"event":"finished","id":"mine","text":null}', 0.0)

    assert received == [Failed(id="mine", status=500, message="the engine's answer cannot be read")]
    assert client.in_flight == 1


def test_the_request_id_is_only_read_from_the_start_of_a_line() -> None:
    assert request_id_of(encode_message(Failed(id="cmpl-1-0", status=500, message=""))) == "cmpl-1-0"
    assert request_id_of(b'{"event":"finished","text":"{\\"id\\":\\"mine\\"","id":"cmpl-1-0"}') == ""
    assert request_id_of(b"\xff") == ""
