"""What speaks against a job that could run: the warnings of its plan."""

from app.db.tables import DatasetRow
from app.domain.specs import TrainSpec
from app.services.encoded_rows import EncodingSummary
from app.services.splits import empty_parts

PROTECTED_SHARE = 0.05
"""Share of rows trimmed around a quotation from which the plan warns."""


def list_warnings(spec: TrainSpec, summary: EncodingSummary, dataset: DatasetRow, limit: int) -> tuple[str, ...]:
    """`limit`: longest sequence, in tokens."""
    warnings = [*empty_parts(spec, summary), *_warn_of_single_verdict(dataset), *_warn_of_missing_steps(dataset)]
    if summary.dropped:
        warnings.append(f"{summary.dropped} rows do not fit {limit} tokens and are dropped; see overlength")
    if summary.protected_share > PROTECTED_SHARE:
        warnings.append(
            f"{summary.protected_share:.0%} of the rows were trimmed around a quotation, which serving cannot do; "
            "raise global_max_sequence_length"
        )
    return tuple(warnings)


def _warn_of_missing_steps(dataset: DatasetRow) -> list[str]:
    """A warning if rows have no step but Finish: they teach verdicts that rest on nothing that was read."""
    without = dataset.report["steps"].get("1", 0)
    if not without:
        return []
    return [
        f"{without:,} rows of the dataset have no Search: they teach a verdict without reading; "
        "make trajectories with POST /datasets/synthesize"
    ]


def _warn_of_single_verdict(dataset: DatasetRow) -> list[str]:
    """A warning if all rows end in one verdict: a model that sees no other verdict always gives this one."""
    labels = [label for label, rows in dataset.report["labels"].items() if rows]
    if len(labels) != 1:
        return []
    return [f"every row of the dataset ends in {labels[0]}: the model will learn to say that; add rows of the others"]
