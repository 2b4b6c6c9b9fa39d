"""What the house promises of itself: light imports, true documentation."""

import subprocess
import sys

import pytest

from app.cli import application
from app.main import create_app
from app.settings import Settings
from tests.conftest import ROOT
from tests.vllm.server import FLAGS

HEAVY = ("torch", "transformers", "peft", "bitsandbytes")


@pytest.mark.parametrize(
    "module", ["app.main", "app.cli", "worker.supervisor", "worker.slot", "worker.inference.server.app"]
)
def test_what_needs_no_tensors_loads_no_gpu_library(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_every_setting_is_documented() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    missing = [name for name in Settings.model_fields if f"`VERITUNE_{name.upper()}`" not in page]
    assert missing == []


def test_every_route_is_documented() -> None:
    page = (ROOT / "docs" / "http.md").read_text("utf-8")
    app = create_app()
    routes = [f"`{method.upper()} {path}`" for path, verbs in app.openapi()["paths"].items() for method in verbs]
    assert [route for route in routes if route not in page] == []


def test_every_command_is_documented() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    commands = [f"veritune {command.name}" for command in application.registered_commands]
    for group in application.registered_groups:
        assert group.typer_instance is not None
        commands += [f"veritune {group.name} {c.name}" for c in group.typer_instance.registered_commands]
    assert [command for command in commands if f"`{command}" not in page] == []


def test_the_guide_starts_vllm_as_the_tests_do() -> None:
    command = (ROOT / "docs" / "guides" / "vllm.md").read_text("utf-8").split("vllm serve", 1)[1].split("```", 1)[0]
    told = " ".join(command.replace("\\", " ").split())
    assert [flag for flag in FLAGS if flag not in told] == []


def test_the_house_names_no_banned_room() -> None:
    banned = {"utils", "helpers", "common", "manager", "base_service", "misc"}
    found = [p for folder in ("app", "worker") for p in (ROOT / folder).rglob("*.py") if p.stem in banned]
    assert found == []


def test_the_log_and_the_docs_name_no_machine_path() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert [p.name for p in pages if "/root/" in p.read_text("utf-8")] == []
