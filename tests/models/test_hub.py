import shutil
from fnmatch import fnmatch

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import IncompleteSnapshotError

from tests.tiny import write_json, write_tiny
from vla2_models.checkpoint import open_checkpoint
from vla2_models.errors import CheckpointError
from vla2_models.hub import CHECKPOINT, TOWER, TOWER_WITH_WEIGHTS, Source, locate, shard_names
from vla2_models.miniature import MODEL_ID, TOWER_ID

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    """An empty hub cache, and no way out of this machine."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def hub_dir(tmp_path):
    write_tiny(tmp_path / "hub")
    return tmp_path / "hub"


def fill_cache(hub_cache, hub_dir, name, commit=COMMIT, ref="main"):
    """Lay a folder out as huggingface_hub keeps what it has fetched."""
    repo = hub_cache / ("models--" + name.replace("/", "--"))
    snapshot = repo / "snapshots" / commit
    shutil.copytree(hub_dir / name, snapshot)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / ref).write_text(commit)
    return snapshot


def refusal(name, source=None, **kwargs):
    with pytest.raises(CheckpointError) as caught:
        locate(name, source or Source(), **kwargs)
    line = str(caught.value)
    assert "\n" not in line
    assert name in line
    return line


def test_by_products_of_training_ears_are_not_fetched():
    for name in ("audio_tower.bin", "mm_projector_a.bin"):
        assert not any(fnmatch(name, pattern) for pattern in CHECKPOINT.patterns)


def test_path_is_taken_as_it_is(hub_dir):
    found = locate(str(hub_dir / MODEL_ID), Source())
    assert (found.id, found.folder) == (str(hub_dir / MODEL_ID), hub_dir / MODEL_ID)
    assert found.revision is None


def test_path_comes_before_the_hub_dir(hub_dir, tmp_path, monkeypatch):
    shutil.copytree(hub_dir / MODEL_ID, tmp_path / "here" / MODEL_ID)
    monkeypatch.chdir(tmp_path / "here")
    found = locate(MODEL_ID, Source(hub_dir))
    assert found.folder.resolve() == tmp_path / "here" / MODEL_ID


def test_home_is_expanded(hub_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(hub_dir))
    assert locate(f"~/{MODEL_ID}", Source()).folder == hub_dir / MODEL_ID


def test_hub_dir_comes_before_the_cache(hub_cache, hub_dir):
    fill_cache(hub_cache, hub_dir, MODEL_ID)
    found = locate(MODEL_ID, Source(hub_dir))
    assert (found.id, found.folder, found.revision) == (MODEL_ID, hub_dir / MODEL_ID, None)


@pytest.mark.parametrize("offline", [True, False])
def test_cache_is_used_without_the_hub(hub_cache, hub_dir, offline):
    snapshot = fill_cache(hub_cache, hub_dir, MODEL_ID)
    found = locate(MODEL_ID, Source(offline=offline))
    assert (found.folder, found.revision) == (snapshot, COMMIT)


def test_checkpoint_and_tower_both_come_from_the_cache(hub_cache, hub_dir):
    fill_cache(hub_cache, hub_dir, MODEL_ID)
    fill_cache(hub_cache, hub_dir, TOWER_ID)
    checkpoint = open_checkpoint(MODEL_ID, Source(offline=True))
    assert checkpoint.located.revision == COMMIT
    assert checkpoint.config.mm_vision_tower == TOWER_ID


def test_absent_tower_is_named(hub_cache, hub_dir):
    fill_cache(hub_cache, hub_dir, MODEL_ID)
    with pytest.raises(CheckpointError, match=f"'{TOWER_ID}' is not in the hub cache"):
        open_checkpoint(MODEL_ID, Source(offline=True))


@pytest.mark.parametrize("revision", ["v2", OTHER, OTHER[:12]], ids=["tag", "commit", "short"])
def test_revision_chooses_the_snapshot(hub_cache, hub_dir, revision):
    fill_cache(hub_cache, hub_dir, MODEL_ID)
    other = fill_cache(hub_cache, hub_dir, MODEL_ID, commit=OTHER, ref="v2")
    if revision == OTHER[:12]:  # only the hub knows short commits
        assert "fetched offline" in refusal(MODEL_ID, Source(offline=True), revision=revision)
        return
    found = locate(MODEL_ID, Source(offline=True), revision=revision)
    assert (found.folder, found.revision) == (other, OTHER)


def test_revision_of_a_folder_is_refused(hub_dir):
    line = refusal(MODEL_ID, Source(hub_dir), revision="main")
    assert "is a folder on this disk; --revision is for models from the hub" in line


def test_snapshot_without_config_is_as_good_as_none(hub_cache, hub_dir):
    snapshot = fill_cache(hub_cache, hub_dir, MODEL_ID)
    (snapshot / "config.json").unlink()
    assert "is not fetched offline" in refusal(MODEL_ID, Source(offline=True))


def test_snapshot_that_lacks_a_shard_is_as_good_as_none(hub_cache, hub_dir):
    snapshot = fill_cache(hub_cache, hub_dir, MODEL_ID)
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    write_json(snapshot / "model.safetensors.index.json", {"weight_map": weight_map})
    (snapshot / "model.safetensors").rename(snapshot / "model-00001-of-00002.safetensors")
    assert "is not fetched offline" in refusal(MODEL_ID, Source(offline=True))


def test_snapshot_without_its_single_weight_file_is_as_good_as_none(hub_cache, hub_dir):
    snapshot = fill_cache(hub_cache, hub_dir, MODEL_ID)
    (snapshot / "model.safetensors").unlink()
    assert "is not fetched offline" in refusal(MODEL_ID, Source(offline=True))


def to_small_form(snapshot, names):
    (snapshot / "model.safetensors").unlink()
    (snapshot / "tokenizer_config.json").unlink()
    for name in names:
        (snapshot / name).write_bytes(b"")


@pytest.mark.parametrize(
    "names",
    [
        ["mm_projector.bin"],
        ["mm_projector.safetensors"],
        ["adapter_model.bin", "adapter_config.json", "non_lora_trainables.bin"],
    ],
    ids=lambda names: names[0],
)
def test_small_form_needs_no_whole_model(hub_cache, hub_dir, names):
    snapshot = fill_cache(hub_cache, hub_dir, MODEL_ID)
    to_small_form(snapshot, names)
    assert locate(MODEL_ID, Source(offline=True)).folder == snapshot


@pytest.mark.parametrize("rest", ["adapter_config.json", "non_lora_trainables.bin"])
def test_adapter_in_part_is_as_good_as_none(hub_cache, hub_dir, rest):
    to_small_form(fill_cache(hub_cache, hub_dir, MODEL_ID), ["adapter_model.bin", rest])
    assert "is not fetched offline" in refusal(MODEL_ID, Source(offline=True))


def test_projector_beside_an_index_does_not_make_up_for_its_shards(hub_cache, hub_dir):
    snapshot = fill_cache(hub_cache, hub_dir, MODEL_ID)
    to_small_form(snapshot, ["mm_projector.bin"])
    weight_map = {"a": "model-00001-of-00002.safetensors"}
    write_json(snapshot / "model.safetensors.index.json", {"weight_map": weight_map})
    assert "is not fetched offline" in refusal(MODEL_ID, Source(offline=True))


@pytest.mark.parametrize(
    ("name", "is_fetched"),
    [
        ("config.json", True),
        ("model-00001-of-00004.safetensors", True),
        ("vocab.json", True),
        ("merges.txt", True),
        ("tokenizer.model", True),
        ("mm_projector.bin", True),
        ("adapter_model.bin", True),
        ("non_lora_trainables.bin", True),
        ("pytorch_model.bin", False),
        ("training_args.bin", False),
        ("optimizer.pt", False),
        ("modeling.py", False),
    ],
)
def test_only_what_a_public_checkpoint_consists_of_is_fetched(name, is_fetched):
    assert any(fnmatch(name, pattern) for pattern in CHECKPOINT.patterns) == is_fetched


def test_tower_without_weights_is_whole_only_where_none_are_wanted(hub_cache, hub_dir):
    snapshot = fill_cache(hub_cache, hub_dir, TOWER_ID)
    offline = Source(offline=True)
    assert locate(TOWER_ID, offline, wanted=TOWER).folder == snapshot
    assert "fetched offline" in refusal(TOWER_ID, offline, wanted=TOWER_WITH_WEIGHTS)
    (snapshot / "pytorch_model.bin").write_bytes(b"")
    assert locate(TOWER_ID, offline, wanted=TOWER_WITH_WEIGHTS).folder == snapshot


def test_tower_whose_preprocessor_was_not_fetched_is_as_good_as_none(hub_cache, hub_dir):
    snapshot = fill_cache(hub_cache, hub_dir, TOWER_ID)
    assert locate(TOWER_ID, Source(offline=True), wanted=TOWER).folder == snapshot
    (snapshot / "preprocessor_config.json").unlink()
    assert "fetched offline" in refusal(TOWER_ID, Source(offline=True), wanted=TOWER)


def test_offline_message_names_where_it_looked(hub_dir):
    line = refusal("owner/absent", Source(hub_dir, offline=True))
    assert f"not in the hub cache or under '{hub_dir}', and is not fetched offline" in line


@pytest.mark.parametrize("error", [RuntimeError("cut"), TimeoutError("cut"), ValueError("cut")])
def test_fetching_that_breaks_is_a_line_that_says_how_to_go_on(monkeypatch, error):
    def fetch(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    line = refusal("owner/some")
    assert "could not be fetched" in line
    assert line.endswith("cut; the same command goes on where it was")


@pytest.mark.parametrize("offline", [True, False])
def test_snapshot_that_lacks_what_is_not_needed_does_offline(
    hub_cache, hub_dir, monkeypatch, offline
):
    snapshot = fill_cache(hub_cache, hub_dir, MODEL_ID)

    def fetch(*_args, local_files_only, **_kwargs):
        # trainer_state.json, say
        raise IncompleteSnapshotError("a file is missing", str(snapshot))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    if offline:
        assert locate(MODEL_ID, Source(offline=True)).folder == snapshot
        (snapshot / "config.json").unlink()
    assert MODEL_ID in refusal(MODEL_ID, Source(offline=offline))


def test_hub_that_cannot_be_reached_is_a_line(hub_cache):
    assert "the hub cannot be reached" in refusal("owner/absent")


@pytest.mark.parametrize(
    "name", ["absent", "a/b/c", "./absent/folder", "owner/na me", "/absent", ""]
)
def test_name_that_is_neither_path_nor_hub_id_is_refused(name):
    assert f"'{name}' does not exist" in refusal(name)


def test_file_instead_of_a_folder_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    line = refusal(str(tmp_path / "model.safetensors"))
    assert line.endswith("is a file; give the folder that holds it")


def test_folder_without_index_has_no_shards(tmp_path):
    assert shard_names(tmp_path) == []
