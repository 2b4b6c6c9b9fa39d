"""The glossary names what is there: every file exists, and every word of ours occurs in the code."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTIONS = re.split(r"^## ", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
ROWS = [
    [cell.strip() for cell in line.strip("|\n ").split(" | ")]
    for section in SECTIONS
    for line in section.splitlines()
    if line.startswith("| ") and not line.startswith(("| our word", "| word"))
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_file_is_there_and_every_word_occurs_in_it(row: list[str]) -> None:
    words, *_, files = row
    texts = [(ROOT / path).read_text(encoding="utf-8") for path in re.findall(r"`([^`]+)`", files)]
    assert texts, "a row names at least one file"
    for word in words.replace("`", "").split(", "):
        assert any(re.search(rf"\b_?{re.escape(word)}\b", text) for text in texts), word


@pytest.mark.parametrize(("title", "least"), [("Training", 10), ("The inference engine", 20)])
def test_training_and_inference_have_a_section(title: str, least: int) -> None:
    (section,) = (section for section in SECTIONS if section.startswith(title))
    assert section.count("\n| ") > least
