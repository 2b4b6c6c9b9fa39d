"""Completions are those of transformers and PEFT: alone, in a batch, from the prefix cache, and with constraints."""

import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.inference.conftest import PROMPT, Server, TinyModels

Logits = Callable[[str, list[int]], torch.Tensor]
Reference = Callable[[str, list[int], int], list[int]]


@pytest.fixture(scope="module")
def logits(tiny: TinyModels) -> Logits:
    """Logits [num_tokens, vocab] of transformers and PEFT, one sequence at a time, without a KV cache of ours."""
    base = AutoModelForCausalLM.from_pretrained(tiny.base, dtype=torch.float32)
    with warnings.catch_warnings():
        # PEFT asks transformers for a property by its old name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        model = PeftModel.from_pretrained(base, str(tiny.one), adapter_name="one")
    model.load_adapter(str(tiny.two), adapter_name="two")

    def logits(name: str, ids: list[int]) -> torch.Tensor:
        if name != "base":
            model.set_adapter(name)
        with torch.inference_mode(), model.disable_adapter() if name == "base" else nullcontext():
            found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits
        return found[0]

    return logits


@pytest.fixture(scope="module")
def reference(logits: Logits) -> Reference:
    """Greedy completions by those logits."""

    def greedy(name: str, prompt: list[int], count: int) -> list[int]:
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(logits(name, ids)[-1].argmax()))
        return ids[len(prompt) :]

    return greedy


def prompts(count: int, salt: int) -> list[list[int]]:
    """Prompts of many lengths. Prompts of different salts share no prefix."""
    return [[3 + (salt * 97 + i * 31 + j * 7) % 390 for j in range(2 + 5 * i)] for i in range(count)]


@pytest.mark.parametrize("model", ["base", "one", "two"])
def test_greedy_completions_are_those_of_peft(server: Server, reference: Reference, model: str) -> None:
    for prompt in prompts(3, salt=1):
        assert server.ids(model=model, prompt=prompt, max_tokens=20, ignore_eos=True) == reference(model, prompt, 20)


def test_adapters_and_base_differ(server: Server) -> None:
    answers = [server.ids(model=model) for model in ("base", "one", "two")]

    assert answers[0] != answers[1] != answers[2] != answers[0]


def test_the_batch_does_not_change_completions(server: Server, reference: Reference) -> None:
    asked = [(model, prompt) for model in ("base", "one", "two") for prompt in prompts(8, salt=2)]

    def ask(one: tuple[str, list[int]]) -> list[int]:
        length = 5 + len(one[1]) % 11  # so that they finish at different steps
        return server.ids(model=one[0], prompt=one[1], max_tokens=length, ignore_eos=True)

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(ask, asked))

    for (model, prompt), answer in zip(asked, answers, strict=True):
        assert answer == reference(model, prompt, len(answer))


def test_a_deterministic_completion_has_the_same_logprobs_alone_and_in_a_batch(server: Server) -> None:
    prompt = [3 + i % 390 for i in range(300)]

    def ask(prompt: list[int], deterministic: bool) -> Any:
        options = {"deterministic": deterministic, "logprobs": 5, "max_tokens": 12, "ignore_eos": True}
        return server.choice(model="one", prompt=prompt, **options)["logprobs"]

    alone = ask(prompt, True)
    with ThreadPoolExecutor(12) as pool:
        neighbours = [pool.submit(ask, other, False) for other in prompts(8, salt=5)]
        same = [pool.submit(ask, prompt, True) for _ in range(3)]
        assert all(future.result() == alone for future in same)
        assert all(future.result() for future in neighbours)


@pytest.mark.parametrize("model", ["base", "one"])
def test_prompt_logprobs_are_those_of_transformers(server: Server, logits: Logits, model: str) -> None:
    prompt = [3 + (i * 7) % 390 for i in range(490)]  # prefilled in several chunks
    expected = logits(model, prompt).log_softmax(-1)
    # The prefix cache has the prompt now; it must not be used.
    alone = server.ids(model=model, prompt=prompt, max_tokens=8, ignore_eos=True)

    with ThreadPoolExecutor(9) as pool:
        neighbours = [pool.submit(server.ids, prompt=other, max_tokens=20) for other in prompts(8, salt=6)]
        choice = server.choice(model=model, prompt=prompt, prompt_logprobs=3, max_tokens=8, ignore_eos=True)
        assert all(future.result() for future in neighbours)

    first, *others = choice["prompt_logprobs"]
    assert choice["token_ids"] == alone
    assert first is None
    assert len(others) == len(prompt) - 1
    for row, token, ranked in zip(expected, prompt[1:], others, strict=False):
        logprobs = {int(name): entry["logprob"] for name, entry in ranked.items()}
        best = row.topk(3)
        assert logprobs[token] == pytest.approx(float(row[token]), abs=1e-4)
        assert sorted(logprobs.values())[-3:] == pytest.approx(sorted(best.values.tolist()), abs=1e-4)
        assert ranked[str(token)]["rank"] == int((row > row[token]).sum()) + 1


def test_a_seed_repeats_a_completion_and_another_seed_does_not(server: Server) -> None:
    answers = [server.ids(temperature=1.0, seed=seed, max_tokens=12) for seed in (7, 7, 8)]

    assert answers[0] == answers[1] != answers[2]


def test_a_small_top_p_is_greedy(server: Server) -> None:
    assert server.ids(temperature=1.0, top_p=1e-6) == server.ids()


def test_an_extended_prompt_is_restored_from_the_prefix_cache(server: Server, reference: Reference) -> None:
    prompt = prompts(9, salt=3)[-1]
    first = server.ask(prompt=prompt, max_tokens=10, ignore_eos=True).json()
    grown = [*prompt, *first["choices"][0]["token_ids"], 77, 88]

    second = server.ask(prompt=grown, max_tokens=10, ignore_eos=True).json()

    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == len(prompt) + 9
    assert second["choices"][0]["token_ids"] == reference("base", grown, 10)


def test_a_repeated_prompt_still_computes_its_last_token(server: Server) -> None:
    prompt = prompts(9, salt=4)[-1]
    first = server.ask(prompt=prompt).json()

    second = server.ask(prompt=prompt).json()

    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == len(prompt) - 1
    assert second["choices"][0]["token_ids"] == first["choices"][0]["token_ids"]


def test_no_adapter_uses_anothers_prefix_cache(server: Server, reference: Reference) -> None:
    prompt = prompts(9, salt=5)[-1]
    server.ask(model="base", prompt=prompt, ignore_eos=True)
    server.ask(model="two", prompt=prompt, ignore_eos=True)

    answer = server.ask(model="one", prompt=prompt, ignore_eos=True).json()

    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert answer["choices"][0]["token_ids"] == reference("one", prompt, 16)


def test_a_stop_string_is_cut_across_tokens(server: Server) -> None:
    plain = server.choice(max_tokens=12)
    text = plain["text"]
    stop = text[4:9]  # tokens here have one to three characters

    stopped = server.choice(max_tokens=12, stop=[stop, "never generated"])
    kept = server.choice(max_tokens=12, stop=stop, include_stop_str_in_output=True)

    assert stopped["text"] == text[: text.index(stop)]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", stop)
    assert kept["text"] == text[: text.index(stop) + len(stop)]
    assert 1 < len(stopped["token_ids"]) < len(plain["token_ids"])
    assert stopped["token_ids"] == plain["token_ids"][: len(stopped["token_ids"])]


def test_a_stop_token_ends_the_completion_and_has_no_text(server: Server) -> None:
    plain = server.choice(max_tokens=8)
    stop = plain["token_ids"][3]

    stopped = server.choice(max_tokens=8, stop_token_ids=[stop])

    assert stopped["token_ids"] == plain["token_ids"][:4]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", stop)
    assert plain["text"].startswith(stopped["text"])
    assert len(stopped["text"]) < len(plain["text"])


def test_min_tokens_delays_the_end(server: Server) -> None:
    stop = server.ids(max_tokens=8)[3]

    longer = server.choice(max_tokens=8, stop_token_ids=[stop], min_tokens=6)

    assert len(longer["token_ids"]) >= 6


def test_eos_ends_a_completion_unless_ignored(server: Server) -> None:
    only_eos: dict[str, Any] = {"allowed_token_ids": [1], "max_tokens": 3}

    assert server.choice(**only_eos)["token_ids"] == [1]
    assert server.choice(**only_eos)["finish_reason"] == "stop"
    assert server.choice(**only_eos)["text"] == ""
    assert server.choice(**only_eos, ignore_eos=True)["token_ids"] == [1, 1, 1]


@pytest.mark.parametrize("seed", range(4))
def test_a_regex_is_followed(server: Server, seed: int) -> None:
    regex = r"Search\[[^\[\]\n]{1,20}\]"

    choice = server.choice(structured_outputs={"regex": regex}, temperature=1.0, seed=seed, max_tokens=60)

    assert re.fullmatch(regex, choice["text"], re.ASCII | re.DOTALL)
    assert choice["finish_reason"] == "stop"


def test_a_choice_is_one_of_those_given(server: Server) -> None:
    choices = ["Search", "Lookup (a|b)", "Finish.*"]

    texts = {
        server.choice(structured_outputs={"choice": choices}, temperature=1.0, seed=seed, max_tokens=30)["text"]
        for seed in range(8)
    }

    assert texts <= set(choices)
    assert len(texts) > 1


def test_a_prefix_of_another_choice_can_be_chosen(server: Server) -> None:
    eos_or_more = {"choice": ["a", "ab"]}

    ends = [server.choice(structured_outputs=eos_or_more, temperature=5.0, seed=seed) for seed in range(12)]

    assert {end["text"] for end in ends} == {"a", "ab"}
    assert {end["finish_reason"] for end in ends} == {"stop"}


def test_json_follows_its_schema(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"sure": {"type": "boolean"}},
        "required": ["sure"],
        "additionalProperties": False,
    }

    text = server.choice(structured_outputs={"json": schema}, max_tokens=200)["text"]

    assert re.fullmatch(r'\{\s*"sure"\s*:\s*(true|false)\s*\}', text)


def test_a_catastrophic_regex_is_completed_or_refused_in_time(server: Server) -> None:
    response = server.ask(structured_outputs={"regex": "(.*a.{300}){40}|((x+x+)+y){1,500}"}, max_tokens=20)

    assert response.status_code in (200, 400)
    assert response.elapsed.total_seconds() < 5
    assert server.ids() == server.ids()


def test_special_tokens_are_shown_only_on_request(server: Server) -> None:
    pad: dict[str, Any] = {"allowed_token_ids": [2], "max_tokens": 2}

    assert server.choice(**pad)["text"] == ""
    assert server.choice(**pad, skip_special_tokens=False)["text"] == "<pad><pad>"


def test_a_prompt_that_is_text_stays_text(server: Server) -> None:
    for name in ("<s>", "</s>", "<pad>"):
        prompt = server.choice(prompt=f"The Danube {name} flows.")["prompt_token_ids"]

        assert not {0, 1, 2} & set(prompt)


def test_a_prompt_may_end_in_half_a_character(server: Server) -> None:
    halves = server.choice(prompt="The Danube é")["prompt_token_ids"][:-1]

    choice = server.choice(prompt=halves, allowed_token_ids=[67], max_tokens=2)

    assert "Danube" not in choice["text"]
    assert choice["prompt_token_ids"] == halves != PROMPT
