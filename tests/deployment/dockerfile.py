"""Dockerfile.gpu as its stages and their instructions, and .dockerignore as a question."""

import re
from dataclasses import dataclass
from fnmatch import fnmatch

from tests.conftest import ROOT

FILE = ROOT / "Dockerfile.gpu"


@dataclass(frozen=True, slots=True)
class Stage:
    """`parent` is a stage's name or an image. `instructions` are (word, the rest of its line), lines joined."""

    name: str
    parent: str
    instructions: tuple[tuple[str, str], ...]

    def all(self, word: str) -> list[str]:
        return [rest for found, rest in self.instructions if found == word]


def read_stages() -> dict[str, Stage]:
    stages: dict[str, Stage] = {}
    text = re.sub(r"^#.*\n", "", FILE.read_text("utf-8"), flags=re.MULTILINE)
    for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            parent, name = rest.split(" AS ")
            stages[name] = Stage(name, parent, ())
        elif word:
            stages[name] = Stage(name, stages[name].parent, (*stages[name].instructions, (word, rest)))
    return stages


def copied_from_here(stage: Stage) -> list[str]:
    """What a stage copies out of the checkout."""
    return [source for rest in stage.all("COPY") if "--from" not in rest for source in rest.split()[:-1]]


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps `path` out of the build: the last pattern that fits decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if pattern and not line.startswith("#") and any(fnmatch(part, pattern) for part in (path, path.split("/")[-1])):
            ignored = not line.startswith("!")
    return ignored
