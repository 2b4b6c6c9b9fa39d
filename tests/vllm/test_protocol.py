"""vLLM passes the protocol tests of our inference server."""

import inspect
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from tests.e2e.conftest import SECRET
from tests.inference import test_protocol as protocol
from tests.inference.conftest import CompletionsClient

pytestmark = pytest.mark.vllm

globals().update(
    {
        name: test
        for name, test in vars(protocol).items()
        if name.startswith("test_") and "completions" in inspect.signature(test).parameters
    }
)


@pytest.fixture(scope="module")
def completions(vllm: str, exported: Path) -> Iterator[CompletionsClient]:
    tokenizer = Tokenizer.from_file(str(exported / "tokenizer.json"))
    prompt = tokenizer.encode("Claim: The Danube flows through Vienna", add_special_tokens=False).ids[:6]
    headers = {"Authorization": f"Bearer {SECRET}"}
    with httpx.Client(base_url=vllm, headers=headers, timeout=120, trust_env=False) as client:
        yield CompletionsClient(client, exported.name, prompt)
