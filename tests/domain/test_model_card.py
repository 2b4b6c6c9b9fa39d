"""The README.md that is published beside the weights."""

from datetime import UTC, datetime

from app.domain.adapters import Manifest, ManifestBase, render_model_card

MANIFEST = Manifest(
    job_id="job_1",
    kind="peft",
    base=ManifestBase(name="tiny", revision="1", digest="0" * 64),
    quantization=None,
    spec={},
    dataset_digest="1" * 64,
    dataset_rows=8,
    protected_share=0.0,
    format={},
    max_sequence_length=64,
    seed=1,
    metrics={"loss": 46.8},
    packages={},
    code_revision="1",
    servable_by=(),
    created_at=datetime.now(UTC),
)


def test_what_speaks_against_an_adapter_stands_on_its_card() -> None:
    warned = MANIFEST.model_copy(update={"warnings": ("the loss rose",)})
    assert "- **warning**: the loss rose\n- seed: 1" in render_model_card("first", warned)
    assert "warning" not in render_model_card("first", MANIFEST)
