"""The training benchmark's figures → ratios, and the table of docs/benchmarks.md."""

from statistics import median
from typing import Any

from benchmarks.trl_run import EXTRA, TUNED

NAMES = {
    "veritune": "Veritune",
    "trl_best": "TRL at its best",
    "trl_default": "TRL at its defaults",
    "limit": "the limit",
    "veritune_packed": "Veritune, base in 4 bits",
}


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """Medians over the rounds; TRL's best is the fastest pace that any way of its reached, in the rounds or before.
    `vs_…` and `of_limit`: ours over theirs, more is better. Memory, loss, scaling: the same, but less is better, and 1
    is equal."""
    rounds = figures["rounds"]
    pace = {name: _median(rounds, name, "tokens_per_second") for name in NAMES}
    growth = {name: median(r[name]["memory"]["peak_growth_mib"] for r in rounds) for name in NAMES if name != "limit"}
    ways = figures["trl_ways"]
    pace["trl_best"] = max(
        pace["trl_best"],
        *(way["tokens_per_second"] for name, way in ways.items() if way["correct"] and name not in EXTRA),
    )
    found = {
        "vs_trl_best": pace["veritune"] / pace["trl_best"],
        "vs_trl_default": pace["veritune"] / pace["trl_default"],
        "of_limit": pace["veritune"] / pace["limit"],
        "packed_vs_trl_best": pace["veritune_packed"] / pace["trl_best"],
        "vs_trl_with_our_environment": pace["veritune"] / ways[TUNED]["tokens_per_second"],
    }
    for peer in ("trl_best", "trl_default"):
        found[f"memory_packed_vs_{peer}"] = growth["veritune_packed"] / growth[peer]
        found[f"memory_vs_{peer}"] = growth["veritune"] / growth[peer]
        found[f"loss_vs_{peer}"] = _loss(figures, "veritune") / _loss(figures, peer)
    fill, costs = figures["filling"]["cpu"], figures["scaling"]
    found |= {
        "budget_filled": fill["filled"],
        "micro_batches_even": fill["even"],
        "padding": fill["padding_share"],
        "data_cost_per_token_8000_vs_64_rows": _cost(costs[-1]) / _cost(costs[0]),
        "data_share_of_an_update": _cost(costs[-1]) * 1e-6 * pace["veritune"],
    }
    return {name: round(value, 4) for name, value in found.items()}


def _median(rounds: list[dict[str, Any]], name: str, key: str) -> float:
    return float(median(r[name][key] for r in rounds))


def _loss(figures: dict[str, Any], name: str) -> float:
    rounds = range(1, len(figures["rounds"]) + 1)
    return float(median(figures["losses"][f"{name} {number}"] for number in rounds))


def _cost(scaling: dict[str, float]) -> float:
    return scaling["choosing_and_collating_us_per_token"]


def table(result: dict[str, Any]) -> str:
    """Markdown: who was how fast, in how much memory, with what loss; then the ratios, the profile and the rest."""
    figures = result["figures"]
    parts = [_contenders(figures), _ratio_table(result["ratios"]), _profile(figures), _start_up(figures)]
    return "\n\n".join([_heading(result), *parts, _ways(figures), _counts(figures)])


def _heading(result: dict[str, Any]) -> str:
    machine, work = result["machine"], result["work"]
    return (
        f"`{result['command']}`, {result['date'][:10]}, {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, revision {result['code_revision']}: {work['rows']} rows, {work['tokens']:,} "
        f"tokens, {work['updates']} updates of {work['rows_per_update']} rows, "
        f"{len(result['figures']['rounds'])} rounds."
    )


def _contenders(figures: dict[str, Any]) -> str:
    rows = ["| contender | tokens/s, each round | peak memory growth | loss afterwards |", "|---|---|---|---|"]
    for name, words in NAMES.items():
        runs = [r[name] for r in figures["rounds"]]
        paces = ", ".join(f"{run['tokens_per_second']:.0f}" for run in runs)
        if name == "limit":
            rows.append(f"| {words} | {paces} | | |")
            continue
        memory = median(run["memory"]["peak_growth_mib"] for run in runs)
        label = f"{words} ({figures['trl_best_way']})" if name == "trl_best" else words
        rows.append(f"| {label} | {paces} | {memory:.0f} MiB | {_loss(figures, name):.4f} |")
    return "\n".join([*rows, f"| the base, untrained | | | {figures['losses']['base']:.4f} |"])


def _ratio_table(ratios: dict[str, float]) -> str:
    return "\n".join(["| ratio | |", "|---|---|", *(f"| {name} | {value:.3g} |" for name, value in ratios.items())])


def _profile(figures: dict[str, Any]) -> str:
    dense, packed = figures["profile"]["shares"], figures["profile_packed"]["shares"]
    rows = ["| where an update's time goes | dequantised once | base in 4 bits |", "|---|---|---|"]
    return "\n".join(rows + [f"| {part} | {dense[part]:.1%} | {packed.get(part, 0):.1%} |" for part in dense])


def _start_up(figures: dict[str, Any]) -> str:
    starts = [r["veritune"]["start_up"] for r in figures["rounds"]]
    loading = figures["profile"]["loading"]
    rows = ["| from process start to the first update | seconds |", "|---|---|"]
    rows += [f"| {part.replace('_', ' ')} | {median(start[part] for start in starts):.2f} |" for part in starts[0]]
    return "\n".join([*rows, f"| loading alone, without quantising | {loading['load']:.2f} |"])


def _ways(figures: dict[str, Any]) -> str:
    rows = ["| TRL, set as | tokens/s | trains the same |", "|---|---|---|"]
    for name, way in figures["trl_ways"].items():
        pace = f"{way['tokens_per_second']:.0f}" if "error" not in way else "failed"
        rows.append(f"| {name} | {pace} | {'yes' if way['correct'] else 'no'} |")
    return "\n".join(rows)


def _counts(figures: dict[str, Any]) -> str:
    rows = [
        "| counted over the whole dataset | budget | filled | at most | even | padding |",
        "|---|---|---|---|---|---|",
    ]
    for device, fill in figures["filling"].items():
        filled = (
            f"{fill['filled']:.1%} | {fill['filled_at_most']:.1%} | {fill['even']:.1%} | {fill['padding_share']:.1%}"
        )
        rows.append(f"| {device} | {fill['token_budget']} tokens | {filled} |")
    rows += ["", "| rows | reading, µs a token | choosing and collating, µs a token |", "|---|---|---|"]
    for cost in figures["scaling"]:
        chosen = cost["choosing_and_collating_us_per_token"]
        rows.append(f"| {cost['rows']:,} | {cost['reading_us_per_token']:.2f} | {chosen:.2f} |")
    return "\n".join(rows)
