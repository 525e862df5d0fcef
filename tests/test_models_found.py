"""Models are found where they are: by name, by a shorter name, by path; damaged files are skipped or reported."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest

from aiosd import config
from aiosd.errors import UsageError
from aiosd.llm import modelfile
from aiosd.models import fit, found, places, quants
from libaios.home import Home
from tests import tinymodels

DIGEST = "ab" * 32


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinymodels.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", d=32, layers=1, heads=2, kv_heads=1, ff=32)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, without variables that name other places."""
    for name in ("AIOSD_MODELS", "HF_HOME", "HF_HUB_CACHE", "OLLAMA_MODELS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def put(tiny: Path, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tiny.read_bytes())
    return path


def put_in_hub(tiny: Path, home: Path, repo: str, file: str, commit: str = "c1") -> Path:
    folder = home / ".cache/huggingface/hub" / f"models--{repo.replace('/', '--')}"
    blob = put(tiny, folder / "blobs" / f"{commit}-{Path(file).name}")
    link = folder / "snapshots" / commit / file
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(blob)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs/main").write_text("c1")
    return link


def put_in_ollama(tiny: Path, base: Path, name: str, digest: str = DIGEST) -> Path:
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "0" * 64},
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"},
    ]
    manifest = base / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return put(tiny, base / "blobs" / f"sha256-{digest}")


# ── by name ───────────────────────────────────────────────────────────────────────────────────────────────


def test_in_an_empty_home_there_is_the_embedded_model(home: Path) -> None:
    assert [model.name for model in found.listing()] == ["nano"]
    assert found.find("nano").path.endswith("nano.gguf")


def test_aiosds_own_folder(home: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tiny, home / ".cache/aiosd/models/Writer-7B-Q4_K_M.gguf")
    put(tiny, home / ".cache/aiosd/models/Other.gguf.parts/Other.gguf")  # an incomplete download
    assert [model.name for model in found.listing()] == ["nano", "Writer-7B-Q4_K_M"]
    assert found.find("writer-7b-q4_k_m").path == str(path)
    monkeypatch.setenv("AIOSD_MODELS", str(home / "elsewhere"))
    assert len(found.listing()) == 1


@pytest.mark.parametrize("word", ["ollama:llama3.2", "llama3.2", "ollama:llama3.2:latest", "LLAMA3.2:latest"])
def test_a_model_of_ollama(home: Path, tiny: Path, word: str) -> None:
    blob = put_in_ollama(tiny, home / ".ollama/models", "registry.ollama.ai/library/llama3.2/latest")
    model = found.find(word)
    assert (model.name, model.path, model.label) == ("ollama:llama3.2", str(blob), "llama3.2")


def test_tags_and_owners_of_ollama(home: Path, tiny: Path) -> None:
    base = home / ".ollama/models"
    put_in_ollama(tiny, base, "registry.ollama.ai/library/qwen3/8b", "01" * 32)
    put_in_ollama(tiny, base, "registry.ollama.ai/library/qwen3/14b", "02" * 32)
    put_in_ollama(tiny, base, "registry.ollama.ai/me/mine/latest", "03" * 32)
    put_in_ollama(tiny, base, "hf.co/org/name/Q8_0", "04" * 32)
    names = [model.name for model in found.listing()]
    assert sorted(names[1:]) == ["ollama:hf.co/org/name:Q8_0", "ollama:me/mine", "ollama:qwen3:14b", "ollama:qwen3:8b"]
    assert found.find("qwen3:8b").path.endswith("01")
    assert found.find("ollama:me/mine").label == "me_mine"
    with pytest.raises(UsageError, match=r"several models may be meant: ollama:qwen3:14b, ollama:qwen3:8b"):
        found.find("qwen3")


def test_files_of_our_folder_by_the_beginning_of_their_names(home: Path, tiny: Path) -> None:
    folder = home / ".cache/aiosd/models"
    for stem in ("qwen2.5-7b-q4_k_m", "qwen2.5-3b-q4_k_m", "SmolLM2-135M.Q4_1"):
        put(tiny, folder / f"{stem}.gguf")
    assert found.find("qwen2.5-7B").label == "qwen2.5-7b-q4_k_m"
    assert found.find("smollm2").path == found.find("SmolLM2-135M").path == str(folder / "SmolLM2-135M.Q4_1.gguf")
    with pytest.raises(UsageError, match=r"may be meant: qwen2\.5-3b-q4_k_m, qwen2\.5-7b-q4_k_m"):
        found.find("qwen2.5")
    assert found.find("qwen2").source == "path"  # another model, which does not exist here
    assert found.find("qwen2.5-7").source == "path"


def test_incomplete_downloads_of_ollama_are_not_found(home: Path, tiny: Path) -> None:
    base = home / ".ollama/models"
    put_in_ollama(tiny, base, "registry.ollama.ai/library/gone/latest").unlink()
    for number, text in enumerate(["", "[]", "{}", '{"layers": [3]}', '{"layers": null}', "\xff"]):
        path = base / f"manifests/registry.ollama.ai/library/bad{number}/latest"
        path.parent.mkdir(parents=True)
        path.write_bytes(text.encode("latin-1"))
    escape = [{"mediaType": "application/vnd.ollama.image.model", "digest": "../../../secret"}]
    (base / "manifests/registry.ollama.ai/library/bad0/latest").write_text(json.dumps({"layers": escape}))
    (home / "secret").touch()
    assert len(found.listing()) == 1
    with pytest.raises(UsageError, match="ollama:gone: not on this machine"):
        found.find("ollama:gone")


def test_a_folder_set_for_ollama(home: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_ollama(tiny, home / "big/disk", "registry.ollama.ai/library/phi4/latest")
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "big/disk"))
    assert found.find("phi4").source == "ollama"


def test_models_of_lm_studio(home: Path, tiny: Path) -> None:
    path = put(tiny, home / ".lmstudio/models/Qwen/Qwen3-4B-GGUF/Qwen3-4B-Q4_K_M.gguf")
    put(tiny, home / ".lmstudio/models/Qwen/Qwen3-4B-GGUF/mmproj-Qwen3-4B-F16.gguf")
    put(tiny, home / ".cache/lm-studio/models/old/Old-GGUF/old-Q8_0.gguf")
    names = [model.name for model in found.listing()[1:]]
    assert names == ["lmstudio:Qwen/Qwen3-4B-GGUF:Q4_K_M", "lmstudio:old/Old-GGUF:Q8_0"]
    for word in (names[0], "qwen3-4b-gguf", "Qwen3-4B-Q4_K_M", "lmstudio:Qwen/Qwen3-4B-GGUF"):
        assert found.find(word).path == str(path)


def test_a_folder_set_for_lm_studio(home: Path, tiny: Path) -> None:
    put(tiny, home / "disk/a/b/c-Q4_0.gguf")
    (home / ".lmstudio").mkdir()
    (home / ".lmstudio/settings.json").write_text(json.dumps({"downloadsFolder": str(home / "disk")}))
    assert [model.name for model in found.listing()[1:]] == ["lmstudio:a/b:Q4_0"]
    (home / ".lmstudio/settings.json").write_text("{")
    assert len(found.listing()) == 1


def test_the_cache_of_the_hub(home: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put_in_hub(tiny, home, "Org/Name-GGUF", "name-q4_k_m.gguf")
    put_in_hub(tiny, home, "Org/Name-GGUF", "name-q8_0.gguf", "c0")
    put_in_hub(tiny, home, "Org/Name-GGUF", "name-q4_k_m.gguf", "c0")
    assert [model.name for model in found.listing()[1:]] == ["hf:Org/Name-GGUF:Q4_K_M", "hf:Org/Name-GGUF:Q8_0"]
    for word in ("hf:Org/Name-GGUF", "hf:Org/Name-GGUF:q4_k_m", "name-q4_k_m", "Org/Name-GGUF:Q4_K_M"):
        assert found.find(word).path == str(path), word
    assert found.find("hf:Org/Name-GGUF:Q8_0").path.endswith("c0/name-q8_0.gguf")
    with pytest.raises(found.NotHere, match=r"hf:Org/Name-GGUF:Q2_K: not on this machine; aiosd pull Org/Name-GGUF:Q2"):
        found.find("hf:Org/Name-GGUF:Q2_K")
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "none"))
    assert len(found.listing()) == 1


@pytest.mark.parametrize("word", ["hf:", "hf:name", "hf:a/b/c", "hf:../x", "hf:/b:Q4_0", "hf:a/ b"])
def test_what_names_no_model_of_a_hub(home: Path, word: str) -> None:
    with pytest.raises(UsageError, match="names no model of a hub"):
        found.find(word)


# ── by path ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_goes_first(home: Path, tiny: Path) -> None:
    put_in_ollama(tiny, home / ".ollama/models", "registry.ollama.ai/library/phi4/latest")
    here = put(tiny, home / "here/phi4")
    assert found.find("phi4", str(home / "here")).path == str(here)
    assert found.find("phi4", str(home)).source == "ollama"


def test_a_path_is_taken_as_it_is(home: Path) -> None:
    model = found.find("~/none.gguf", "/")
    assert (model.source, model.path, model.label) == ("path", str(home / "none.gguf"), "none")
    assert found.find("some/folder/x", "/base").path == "/base/some/folder/x"


def test_settings_take_names(home: Path, tiny: Path) -> None:
    put_in_ollama(tiny, home / ".ollama/models", "registry.ollama.ai/library/llama3.2/3b")
    put_in_hub(tiny, home, "Org/Name", "name-q4_k_m.gguf")

    def names(text: str) -> list[tuple[str, str]]:
        settings = config.load({}, Home(home), environ={"AIOSD_MODEL": text}, cwd="/")
        return [(model.name, Path(model.path).name) for model in settings.models]

    assert names("x=llama3.2:/a/b.gguf") == [("x", f"sha256-{DIGEST}"), ("b", "b.gguf")]
    both = names("hf:Org/Name:Q4_K_M,y=ollama:llama3.2:3b,nano")
    assert both == [("name-q4_k_m", "name-q4_k_m.gguf"), ("y", f"sha256-{DIGEST}"), ("nano", "nano.gguf")]
    (home / "aiosd.toml").write_text('[[model]]\npath = "hf:Org/Name"\nslots = 3\n')
    (model,) = config.load({}, Home(home), home / "aiosd.toml", {}, "/").models
    assert (model.name, model.slots) == ("name-q4_k_m", 3)


def test_reading_settings_again_fetches_nothing(home: Path, tiny: Path) -> None:
    """The supervisor reads them on SIGHUP, and must not wait for a network."""
    link = put_in_hub(tiny, home, "Org/Name", "name-q4_k_m.gguf")
    settings = config.load({"model": ["hf:Org/Name"]}, Home(home), environ={}, cwd="/")
    assert config.reload(settings)[0].models == settings.models
    link.unlink()
    with pytest.raises(found.NotHere):
        config.reload(settings)


# ── split files ───────────────────────────────────────────────────────────────────────────────────────────


def split(source: Path, folder: Path, tensors_per_file: int = 4) -> list[Path]:
    """The model in several files, as llama.cpp's tool splits it."""
    reader = gguf.GGUFReader(source)
    folder.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama", split_max_tensors=tensors_per_file)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("tiny-*-of-*.gguf"))


def test_any_part_names_the_whole_model(home: Path, tiny: Path) -> None:
    files = split(tiny, home / "parts")
    assert len(files) > 1
    for file in files:
        model = found.find(str(file))
        assert (model.path, model.label) == (str(files[0]), "tiny")
    head = modelfile.read(str(files[0]))
    assert head.size == sum(file.stat().st_size for file in files)
    assert head.number("block_count") == 1


def test_a_split_model_is_listed_once(home: Path, tiny: Path) -> None:
    files = split(tiny, home / ".cache/aiosd/models")
    (_, model) = found.listing()
    assert model.name == "tiny"
    files[-1].unlink()
    assert "no such file (the model is split into" in found.row(model, 1 << 40)["problem"]


# ── what a listing tells ──────────────────────────────────────────────────────────────────────────────────


def test_a_listing_shows_the_data_of_the_file(home: Path, tiny: Path) -> None:
    put(tiny, home / ".cache/aiosd/models/a-Q4_0.gguf")
    row = found.row(found.find("a-q4_0"), 1 << 40)
    assert (row["ctx"], row["family"], row["quantisation"], row["fits"]) == (4096, "llama", "Q4_0", True)
    assert row["size"] == tiny.stat().st_size < row["needs_bytes"]
    assert found.row(found.find("a-q4_0"), row["needs_bytes"] - 1)["fits"] is False


def test_a_damaged_file_does_not_spoil_a_listing(home: Path, tiny: Path) -> None:
    for number in range(0, tiny.stat().st_size, 997):
        path = home / f".cache/aiosd/models/cut{number}.gguf"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiny.read_bytes()[:number])
    rows = [found.row(model, 1 << 40) for model in found.listing()]
    assert sum("problem" in row for row in rows) > 3
    assert all("\n" not in row.get("problem", "") for row in rows)


def test_memory_that_is_free_is_known() -> None:
    assert 0 < fit.available_memory() < 1 << 62


def test_places_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", none)
    assert places.cache() == Path("/.cache")


# ── quantisations ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("Qwen2.5-7B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("qwen2.5-7b-instruct-q4_k_m-00001-of-00002.gguf", "Q4_K_M"),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("gemma-3-4b-it-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("model-fp16.gguf", "F16"),
        ("BF16/big-00001-of-00009.gguf", "BF16"),
        ("Q8_0/model-Q6_K.gguf", "Q6_K"),
        ("IQ1_S-IQ3_XXS.gguf", "IQ3_XXS"),
        ("model-Q4_0_4_4.gguf", ""),
        ("q4.gguf", ""),
        ("model.gguf", ""),
    ],
)
def test_the_quantisation_is_read_from_the_name(name: str, quant: str) -> None:
    assert quants.of_name(name) == quant


FILES = [
    "README.md", "config.json", "m-Q2_K.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "m-UD-Q4_K_M.gguf", "mmproj-F16.gguf",
    "m.imatrix.gguf", "BF16/m-BF16-00001-of-00002.gguf", "BF16/m-BF16-00002-of-00002.gguf",
]  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "files"),
    [
        ("", ("m-Q4_K_M.gguf",)),
        ("q8_0", ("m-Q8_0.gguf",)),
        ("UD-Q4_K_M", ("m-UD-Q4_K_M.gguf",)),
        ("BF16", ("BF16/m-BF16-00001-of-00002.gguf", "BF16/m-BF16-00002-of-00002.gguf")),
        ("m-Q2_K.gguf", ("m-Q2_K.gguf",)),
        ("m-BF16-00001-of-00002.gguf", ("BF16/m-BF16-00001-of-00002.gguf", "BF16/m-BF16-00002-of-00002.gguf")),
    ],
)
def test_the_chosen_file(wanted: str, files: tuple[str, ...]) -> None:
    assert quants.choose(FILES, wanted, "r").files == files


@pytest.mark.parametrize(
    ("have", "nearest"),
    [
        (["Q2_K", "Q5_K_M", "Q8_0"], "Q5_K_M"),
        (["Q3_K_S", "Q4_0", "F16"], "Q4_0"),
        (["Q2_K", "F32"], "Q2_K"),
        (["Q8_0"], "Q8_0"),
    ],
)
def test_without_the_default_the_nearest(have: list[str], nearest: str) -> None:
    assert quants.choose([f"m-{quant}.gguf" for quant in have], "", "r").quant == nearest


@pytest.mark.parametrize(
    ("files", "wanted", "words"),
    [
        (["README.md", "model.safetensors", "mmproj-F16.gguf"], "", "r: holds no model in GGUF format"),
        (FILES, "Q3_K_M", "r: has no Q3_K_M; there are Q2_K, Q4_K_M, UD-Q4_K_M, Q8_0, BF16"),
        (["a-Q4_0.gguf", "b-Q4_0.gguf"], "Q4_0", "several files are meant; name one: a-Q4_0.gguf, b-Q4_0.gguf"),
        (["a-00001-of-00002.gguf"], "", "a-00002-of-00002.gguf is missing"),
    ],
)
def test_quantisations_that_do_not_exist(files: list[str], wanted: str, words: str) -> None:
    with pytest.raises(UsageError) as told:
        quants.choose(files, wanted, "r")
    assert words in str(told.value)


def test_file_types_have_names_that_files_have() -> None:
    assert all(quants.of_name(f"m-{name}.gguf") == name for name in quants.FILE_TYPES.values())
