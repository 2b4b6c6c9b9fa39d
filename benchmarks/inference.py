"""`python -m benchmarks.inference`: answers from many adapters over one base, against vLLM, PEFT and, where it is
built, llama.cpp in the same run.

    --quick                small counts, nothing kept: to see that everything runs
    --data DIR --cache DIR the real claims and trajectories, and where the converted base model lies (VERITUNE_CACHE)
    --only decode|turns|react    one of the parts, nothing kept

Everybody gets the same prompts and the same adapters over the same weights, in bfloat16 and greedily. Prints ratios
and writes `benchmarks/results/inference.json` with every raw figure. `make bench-inference` installs vLLM for it, and
`make llama` builds llama.cpp's server.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks import peft_peer
from benchmarks.claims import judging
from benchmarks.contender import environment
from benchmarks.decoding import OPENAI, Protocol, Row, Way, decoding, in_turns
from benchmarks.decoding import llama_cpp as llama_cpp_protocol
from benchmarks.deployment import BenchmarkError
from benchmarks.gguf import converted
from benchmarks.machine import ROOT, busy, head
from benchmarks.publishing import ADAPTERS, CORPUS, LIVE, Published, many, published
from benchmarks.serving import LLAMA_CPP, VLLM, application, llama_cpp, veritune, vllm
from worker.environment import for_tensors

RESULTS = ROOT / "benchmarks" / "results" / "inference.json"
PROMPT_TOKENS = 200
REGEX = r"[^\[\]\n]{1,2000}"
"""What an action's argument may hold, for a length that no answer reaches."""

LOADED, ROOM = 1_000, 16 << 30
"""Adapters of one engine, and the bytes that it may take."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How much is measured. `tokens`: of each answer; `times`: each figure; `claims`: at each concurrency."""

    rows: tuple[int, ...] = (1, 8, 16, 32)
    live: tuple[int, ...] = (0, 1, 4, 16)
    tokens: int = 64
    times: int = 5
    at_once: tuple[int, ...] = (1, 8, 16)
    claims: int = 64
    loaded: int = LOADED


QUICK = Counts(rows=(1, 4), live=(0, 1, 4), tokens=8, times=1, at_once=(2,), claims=4, loaded=40)

Table = dict[str, dict[str, Any]]
"""`rows × live` → the figures of one setting."""


@dataclass(frozen=True, slots=True)
class Task:
    """The requests that every server gets."""

    found: Published
    adapters: Path
    names: tuple[str, ...]
    prompts: list[list[int]]
    counts: Counts

    def rows(self, rows: int, live: int) -> list[Row]:
        """`live` adapters in turn, or the base alone."""
        chosen = self.names[:live] or (self.found.base.name,)
        return [Row(chosen[place % len(chosen)], self.prompts[place]) for place in range(rows)]

    @property
    def settings(self) -> list[tuple[int, int]]:
        return [(rows, live) for rows in self.counts.rows for live in self.counts.live if live <= rows]


def main() -> None:
    given = _arguments()
    counts = QUICK if given.quick else Counts()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # raises SystemExit, so that started processes are stopped
    began = time.monotonic()
    found = _step("adapters and corpus", published, given.data, given.cache.resolve())
    task = _task(found, counts)
    figures: dict[str, Any] = {"other_work": busy()}
    with tempfile.TemporaryDirectory(prefix="veritune-bench-") as directory:
        if given.only in (None, "decode"):
            figures["decode"] = decode(task, Path(directory))
        if given.only in (None, "turns"):
            figures["turns"] = turns(task, Path(directory))
        if given.only in (None, "react"):
            figures["react"] = react(task, given.data, given.cache.resolve(), Path(directory))
    result = head("veritune inference benchmark", "benchmarks.inference") | {
        "seconds": round(time.monotonic() - began, 1),
        "ratios": ratios(figures),
        "figures": figures,
    }
    print(json.dumps(result["ratios"], indent=1))
    if not (given.quick or given.only):
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=["decode", "turns", "react"])
    data = next((path for path in (ROOT / "shared" / "data", ROOT.parent / "shared" / "data") if path.is_dir()), None)
    parser.add_argument("--data", type=Path, default=data, required=data is None)
    cache = os.environ.get("VERITUNE_CACHE", str(ROOT / ".cache" / "veritune"))
    parser.add_argument("--cache", type=Path, default=Path(cache))
    given = parser.parse_args()
    if not VLLM.exists():
        raise SystemExit("vLLM is not installed in .cache/vllm: run `make bench-inference`")
    return given


def _task(found: Published, counts: Counts) -> Task:
    names = tuple(f"live-{number:02}" for number in range(LIVE))
    draw = random.Random(7)
    prompts = [[draw.randrange(500, 40_000) for _ in range(PROMPT_TOKENS)] for _ in range(max(counts.rows))]
    return Task(found, many(found, names), names, prompts, counts)


def decode(task: Task, directory: Path) -> dict[str, Any]:
    """Throughput after the first token, by rows and live adapters."""
    most = max(task.counts.rows)
    table, own = directory / "table.json", {}
    table.write_text(json.dumps(_models(task)), encoding="utf-8")
    figures: dict[str, Any] = {}
    with veritune(table, directory / "front.log", max_batch=most, memory_bytes=ROOM) as server:
        own = _step("veritune", _decode, task, server.url, task.settings)
    theirs: Table = {}
    for live in task.counts.live:
        wanted = [setting for setting in task.settings if setting[1] == live]
        with vllm(task.found.base, task.adapters, directory / "vllm.log", live=live) as server:
            theirs |= _step(f"vllm, {live} adapters", _decode, task, server.url, wanted)
            if live == 4:
                ways = _free_and_held(task, server.url)
                figures["regex_vllm"] = _step("vllm, by a regex", _paces, ways, task.counts)
    peers = {"vllm": theirs, "peft": _step("peft", _peft, task, directory)}
    if LLAMA_CPP.exists():
        peers["llama_cpp"] = _llama_cpp(task, directory)
    figures["same_tokens"] = {
        peer: {key: _same(own[key]["answers"], row["answers"]) for key, row in table.items()}
        for peer, table in peers.items()
    }
    for row in (row for table in (own, *peers.values()) for row in table.values()):
        del row["answers"]
    return figures | {"veritune": own} | peers


def _models(task: Task) -> dict[str, dict[str, Any]]:
    """What the front serves: the base, the live adapters, and many more under other names."""
    base = {
        "base_digest": task.found.base.name,
        "base_path": str(task.found.base),
        "max_model_len": 2_048,
    }
    digests = [*task.names, *(f"more-{number:04}" for number in range(task.counts.loaded))]
    directories = [task.adapters / task.names[number % LIVE] for number in range(len(digests))]
    named = dict(zip(digests, directories, strict=True))
    adapters = {name: base | {"digest": name, "adapter_path": str(path)} for name, path in named.items()}
    return {task.found.base.name: base | {"digest": task.found.base.name}} | adapters


def _decode(task: Task, url: str, settings: Sequence[tuple[int, int]], protocol: Protocol = OPENAI) -> Table:
    found = {}
    for rows, live in settings:
        way = Way(url, task.rows(rows, live), protocol=protocol)
        figures = decoding(way, task.counts.tokens, task.counts.times)
        found[f"{rows} rows, {live} live"] = figures
        print(f"\n  {rows} rows, {live} live: {figures['tokens_per_second']}", end="", flush=True)
    return found


def turns(task: Task, directory: Path) -> dict[str, Any]:
    """Rows of 4 adapters as they are, held by a grammar, and by an engine that has loaded many others, in turns."""
    table = directory / "table.json"
    table.write_text(json.dumps(_models(task)), encoding="utf-8")
    room = {"max_batch": max(task.counts.rows), "memory_bytes": ROOM}
    with (
        veritune(table, directory / "few.log", **room) as few,
        veritune(table, directory / "many.log", **room) as many,
    ):
        loaded = _step(f"veritune, {task.counts.loaded} adapters loaded", _load, task, many.url)
        ways = _free_and_held(task, few.url) | {"many loaded": Way(many.url, _of_four(task))}
        found: dict[str, Any] = _step("veritune, in turns", _paces, ways, task.counts, 2)
    return found | {"loaded": loaded}


def _of_four(task: Task) -> list[Row]:
    return task.rows(min(16, max(task.counts.rows)), 4)


def _free_and_held(task: Task, url: str) -> dict[str, Way]:
    """Rows of 4 adapters, and the same rows with structured outputs."""
    held = {"structured_outputs": {"regex": REGEX}}
    return {"free": Way(url, _of_four(task)), "held": Way(url, _of_four(task), held)}


def _paces(ways: Mapping[str, Way], counts: Counts, often: int = 1) -> dict[str, Any]:
    """Of ways in turns, `often` as many as usual."""
    found = in_turns(ways, counts.tokens, often * counts.times)
    return {name: {key: each[key] for key in ("tokens_per_second", "each")} for name, each in found.items()}


def _load(task: Task, url: str) -> float:
    """Load the many adapters; return how many the engine has loaded then."""
    for first in range(0, task.counts.loaded, len(task.prompts)):
        numbers = range(first, min(first + len(task.prompts), task.counts.loaded))
        decoding(Way(url, [Row(f"more-{n:04}", task.prompts[0][:8]) for n in numbers]), 1, 1)
    return _in_memory(url)


def _in_memory(url: str) -> float:
    """The number of adapters that the engine has loaded."""
    told = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    return next(float(line.split()[1]) for line in told if line.startswith("veritune:loaded_adapters "))


def _peft(task: Task, directory: Path) -> Table:
    threads = os.cpu_count() or 1
    asked = [
        {
            "prompts": [row.prompt for row in rows],
            "names": [peft_peer.BASE if row.model == task.found.base.name else row.model for row in rows],
        }
        for rows in (task.rows(*setting) for setting in task.settings)
    ]
    work = {
        "base": str(task.found.base),
        "adapters": {name: str(task.adapters / name) for name in task.names},
        "rows": asked,
        "tokens": task.counts.tokens,
        "times": max(1, task.counts.times // 2),
        "threads": threads,
    }
    path = directory / "peft.json"
    path.write_text(json.dumps(work), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.peft_peer", str(path)]
    own = environment(for_tensors(), threads)
    done = subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(done.stderr[-3000:])
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {f"{rows} rows, {live} live": line for (rows, live), line in zip(task.settings, lines, strict=True)}


def _llama_cpp(task: Task, directory: Path) -> Table:
    """A server for each setting, with as many slots and adapters as that has: that is when it is fastest."""
    base, adapters = _step("llama.cpp's files", converted, task.found.base, [task.adapters / n for n in task.names])
    found: Table = {}
    for rows, live in task.settings:
        with llama_cpp(base, adapters[:live], directory / "llama.log", rows=rows) as server:
            protocol = llama_cpp_protocol(task.names[:live])
            found |= _step("llama.cpp", _decode, task, server.url, [(rows, live)], protocol)
    return found


def _same(mine: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of tokens before the first difference between two answers."""
    same = sum(
        next((at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
        for one, other in zip(mine, theirs, strict=True)
    )
    return round(same / sum(len(one) for one in mine), 3)


def react(task: Task, data: Path, cache: Path, directory: Path) -> dict[str, Any]:
    """Claims judged by four adapters in turn; every round gets claims of its own, the same for both servers."""
    rounds = _claims(data, task.counts)
    figures: dict[str, Any] = {}
    home, log = task.found.home, directory / "react.log"
    for name in ("veritune", "vllm"):
        with _server(name, task, cache, directory) as server, application(home, cache, server.url, log) as api:
            ask = (ADAPTERS, CORPUS)
            judging(api.url, rounds[-1], *ask, 4)  # a first request loads and compiles; keep it out of the figures
            figures[name] = {
                str(at_once): _step(f"{name}, {at_once} at once", judging, api.url, claims, *ask, at_once)
                for at_once, claims in zip(task.counts.at_once, rounds, strict=False)
            }
    figures["agreement"] = _agreement(figures)
    return figures


def _server(name: str, task: Task, cache: Path, directory: Path) -> Any:
    if name == "vllm":
        log = directory / "vllm.log"
        return vllm(task.found.base, task.found.adapters, log, live=4, rows=16)
    table = directory / "published.json"
    base = {"base_digest": task.found.base.name, "base_path": str(task.found.base)}
    base |= {"max_model_len": 2_048}  # type: ignore[dict-item]
    known = {d: base | {"digest": d, "adapter_path": str(task.found.adapters / d)} for d in task.found.digests}
    table.write_text(json.dumps(known), encoding="utf-8")
    return veritune(table, directory / "front.log")


def _claims(data: Path, counts: Counts) -> list[list[str]]:
    """Distinct claims, drawn once: `claims` for each concurrency, and eight to warm up with."""
    rows = (data / "fever_claims.jsonl").read_text("utf-8").splitlines()
    drawn = random.Random(5).sample(rows, counts.claims * len(counts.at_once) + 8)
    texts = [json.loads(row)["claim"] for row in drawn]
    starts = range(0, counts.claims * len(counts.at_once), counts.claims)
    return [*(texts[start : start + counts.claims] for start in starts), texts[-8:]]


def _agreement(figures: dict[str, Any]) -> dict[str, float]:
    pairs = [(figures["veritune"][key], figures["vllm"][key]) for key in figures["veritune"]]
    found = {}
    for what in ("verdicts", "texts"):
        same = [one == other for mine, theirs in pairs for one, other in zip(mine[what], theirs[what], strict=True)]
        found[what] = round(sum(same) / len(same), 3)
    for mine, theirs in pairs:
        del mine["texts"], theirs["texts"]
    return found


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """Ours over the peer's: more is better, but for `read_tokens_vs_no_cache`."""
    found: dict[str, float] = {}
    if decoded := figures.get("decode"):
        for key, mine in decoded["veritune"].items():
            rows, live = (int(word) for word in key.replace(" rows,", "").replace(" live", "").split())
            for peer in decoded["same_tokens"]:
                name = f"mixed{rows}_vs_{peer}" if live == 4 else f"rows{rows}_live{live}_vs_{peer}"
                found[name] = mine["tokens_per_second"] / decoded[peer][key]["tokens_per_second"]
        pace = {key: row["tokens_per_second"] for key, row in decoded["veritune"].items()}
        if "16 rows, 16 live" in pace:
            found["live16_vs_live1"] = pace["16 rows, 16 live"] / pace["16 rows, 1 live"]
    if met := figures.get("turns"):
        free, held, many_loaded = (met[name]["tokens_per_second"] for name in ("free", "held", "many loaded"))
        found |= {"regex_vs_free": held / free, "many_loaded_vs_few": many_loaded / free}
    if judged := figures.get("react"):
        for key, mine in judged["veritune"].items():
            found[f"react{key}_vs_vllm"] = mine["claims_per_second"] / judged["vllm"][key]["claims_per_second"]
            found[f"read_tokens_vs_no_cache_{key}"] = mine["read_tokens_a_claim"] / mine["a_claim"]["prompt_tokens"]
        found["react_vs_vllm"] = found[f"react{key}_vs_vllm"]
        found["verdicts_alike"] = judged["agreement"]["verdicts"]
    return {name: round(value, 3) for name, value in found.items()}


def _step(name: str, work: Any, *arguments: Any) -> Any:
    print(f"{name} … ", end="", flush=True)
    began = time.monotonic()
    figures = work(*arguments)
    print(f"  {time.monotonic() - began:.0f} s", flush=True)
    return figures


if __name__ == "__main__":
    main()
