"""vLLM keeps the promises that our own front and engine keep: the very same tests, through the very same client."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from app.domain.encoding import Tokenization
from app.generation import Generator
from app.tokenizers import load_tokenization
from tests.e2e.conftest import SECRET
from tests.generation import test_generators as contract
from tests.generation.test_generators import Connect, connecting
from tests.generation.test_generators import asked as asked

pytestmark = pytest.mark.vllm

OURS_ALONE = ("test_a_suspended_server_says_when_it_is_back",)
"""vLLM is never suspended for a job."""

globals().update(
    {name: test for name, test in vars(contract).items() if name.startswith("test_") and name not in OURS_ALONE}
)


@pytest.fixture(scope="module")
def tokens(exported: Path) -> Tokenization:
    return load_tokenization((exported / "tokenizer.json").read_bytes(), bos_id=None, eos_id=2)


@pytest.fixture(scope="module")
def model(exported: Path) -> str:
    return exported.name


@pytest.fixture
def connect(vllm: str) -> Iterator[Connect]:
    with connecting(vllm, SecretStr(SECRET)) as made:
        yield made


@pytest.fixture
def generator(connect: Connect) -> Generator:
    return connect()
