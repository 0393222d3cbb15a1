import logging
from pathlib import Path

import accelerate.hooks
import pytest
import torch
from accelerate import init_empty_weights

from tests.tiny import FAMILIES, generate, load_tiny, tiny_language_model, write_tiny
from vla2_models.placement import Placement, plan_placement
from vla2cli.config import GenerationSettings

PARTS = (
    "model.embed_tokens",
    "model.layers.0",
    "model.layers.1",
    "model.layers.2",
    "model.norm",
    "model.rotary_emb",
    "lm_head",
)
SPLITS = {
    "end_on_disk": ["cpu"] * 3 + ["disk"] * 4,
    "start_on_disk": ["disk"] * 3 + ["cpu"] * 4,
    "middle_on_disk": ["cpu", "cpu", "disk", "cpu", "cpu", "cpu", "cpu"],
    "all_on_disk": ["disk"] * 7,
}
PROMPTS = (torch.arange(11), torch.tensor([90, 5, 5, 17]))


def tiny_model(family, dtype=torch.float32, **changes):
    """A random model, the same each time; its weights are large, so that it says many things."""
    return tiny_language_model(family, dtype, **({"initializer_range": 0.2} | changes))


def say(model, prompts=PROMPTS):
    """Go on greedily from prompts of two lengths, through embeddings, then ids, with a cache."""
    embed = model.get_input_embeddings()
    settings = GenerationSettings(eos_token_ids=(), max_new_tokens=12)
    return generate(model, [embed(ids) for ids in prompts], settings, [0] * len(prompts))


def assert_says_the_same(model, whole):
    found, expected = say(model), say(whole)
    assert [row.ids for row in found] == [row.ids for row in expected]
    assert len(set(expected[0].ids)) > 3
    for row, wanted in zip(found, expected, strict=True):
        # the same weights and the same sums
        assert torch.equal(row.first_logits, wanted.first_logits)


def sizes_of(model, device_map, dtype=torch.float32):
    """Bytes of the weights on each device, by the map."""
    sizes = dict.fromkeys(device_map.values(), 0)
    for name, weight in model.named_parameters():
        (part,) = [part for part in device_map if f"{name}.".startswith(f"{part}.") or not part]
        sizes[device_map[part]] += weight.numel() * dtype.itemsize
    return sizes


def is_whole(device_map, num_layers=3):
    """Whether no decoder layer is on two devices."""
    layers = [".".join(part.split(".")[:3]) for part in device_map if ".layers." in part]
    return len(set(layers)) == len(layers) <= num_layers


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_model_split_over_memory_and_disk_says_what_the_whole_one_says(family, split, tmp_path):
    model = tiny_model(family)
    Placement(dict(zip(PARTS, SPLITS[split], strict=True)), tmp_path / "offload").spread(model)
    assert_says_the_same(model, tiny_model(family))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_model_with_little_memory_is_planned_onto_the_disk_and_says_the_same(
    family, dtype, tmp_path
):
    model = tiny_model(family, dtype)
    size = sum(weight.nbytes for weight in model.parameters())
    device_map = plan_placement(model, dtype, max_memory={"cpu": size * 3 // 4})
    assert set(device_map.values()) == {"cpu", "disk"}
    assert Placement(device_map, tmp_path).main_device == torch.device("cpu")
    Placement(device_map, tmp_path).spread(model)
    assert_says_the_same(model, tiny_model(family, dtype))


def test_plain_forward_pass_gives_the_whole_models_logits(tmp_path):
    model, whole = tiny_model("qwen2"), tiny_model("qwen2")
    Placement(dict(zip(PARTS, SPLITS["end_on_disk"], strict=True)), tmp_path).spread(model)
    ids = PROMPTS[0][None]
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, whole(input_ids=ids).logits)


@pytest.mark.parametrize("split", SPLITS)
def test_tied_embeddings_stay_equal_when_they_are_split(split, tmp_path):
    tied = {"tie_word_embeddings": True}
    model = tiny_model("qwen2", **tied)
    Placement(dict(zip(PARTS, SPLITS[split], strict=True)), tmp_path).spread(model)
    assert_says_the_same(model, tiny_model("qwen2", **tied))


def test_memory_mapped_weights_can_go_to_the_disk(tmp_path):
    folder = write_tiny(tmp_path / "hub")
    model, whole = (load_tiny(folder).language_model for _ in range(2))
    Placement({"model": "disk", "lm_head": "cpu"}, tmp_path / "offload").spread(model)
    assert [row.ids for row in say(model)] == [row.ids for row in say(whole)]


def test_weights_on_disk_are_not_in_memory(tmp_path):
    model = tiny_model("mixtral")
    Placement({"model": "disk", "lm_head": "cpu"}, tmp_path).spread(model)
    for _ in range(2):
        held = [name for name, weight in model.named_parameters() if not weight.is_meta]
        assert held == ["lm_head.weight"]
        # what a forward pass reads is dropped after it
        say(model)
    written = {path.stem: path.stat().st_size for path in tmp_path.glob("*.dat")}
    whole = tiny_model("mixtral").model.named_parameters(prefix="model")
    assert written == {name: weight.nbytes for name, weight in whole}


def test_nothing_is_written_outside_the_offload_folder(tmp_path, monkeypatch):
    for name in ("home", "work", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path / "work")
    model = tiny_model("mistral")
    Placement(dict(zip(PARTS, SPLITS["end_on_disk"], strict=True)), tmp_path / "offload").spread(
        model
    )
    say(model)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent for path in files} == {tmp_path / "offload"}


def test_model_that_fits_is_left_whole_and_nothing_is_written(tmp_path):
    model = tiny_model("mistral")
    device_map = plan_placement(model, torch.float32, max_memory={"cpu": 2**30})
    assert device_map == {"": "cpu"}
    Placement(device_map, tmp_path / "offload").spread(model)
    assert not any(weight.is_meta for weight in model.parameters())
    assert list(tmp_path.iterdir()) == []
    assert_says_the_same(model, tiny_model("mistral"))


def test_weights_of_an_earlier_model_in_the_folder_are_not_taken(tmp_path):
    device_map = dict(zip(PARTS, SPLITS["all_on_disk"], strict=True))
    earlier = tiny_model("mistral", initializer_range=0.1)
    Placement(device_map, tmp_path).spread(earlier)
    model = tiny_model("mistral")
    Placement(device_map, tmp_path).spread(model)
    assert_says_the_same(model, tiny_model("mistral"))


def test_spreading_says_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        Placement({"model": "cpu", "lm_head": "disk"}, tmp_path).spread(tiny_model("mistral"))
    assert caplog.records == []


@pytest.fixture
def pretended_gpus(monkeypatch):
    """Let "cpu:0" and "cpu:1" stand for GPUs, with accelerate's hooks and torch's values.

    Only accelerate's own mover is replaced: what is sent to "cpu:0" says that it is on "cpu", by
    which the mover finds that it has not arrived. That all operands of a sum are on one device
    is not seen here.
    """

    def move(module, name, device, value=None, **_options):
        path, _, leaf = name.rpartition(".")
        part = module.get_submodule(path)
        held = part._parameters if leaf in part._parameters else part._buffers
        held[leaf] = (held[leaf] if value is None else value).to(device)

    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", move)


@pytest.mark.usefixtures("pretended_gpus")
@pytest.mark.parametrize(
    "devices",
    [
        ["cpu:0"] * 3 + ["cpu"] * 4,
        ["cpu"] * 3 + ["cpu:0"] * 4,
        ["cpu:0"] * 3 + ["cpu:1"] * 4,
        ["cpu:1", "cpu:1", "cpu:0", "cpu:0", "cpu", "cpu:1", "disk"],
    ],
    ids=["gpu_then_memory", "memory_then_gpu", "two_gpus", "all_kinds"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_model_split_over_pretended_gpus_says_what_the_whole_one_says(family, devices, tmp_path):
    model = tiny_model(family)
    device_map = dict(zip(PARTS, devices, strict=True))
    Placement(device_map, tmp_path).spread(model)
    assert (
        torch.device(model._hf_hook.execution_device) == Placement(device_map, tmp_path).main_device
    )
    offloaded = [part for part, device in device_map.items() if device in ("cpu", "disk")]
    for name, weight in model.named_parameters():
        assert weight.is_meta == any(f"{name}.".startswith(f"{part}.") for part in offloaded)
    assert_says_the_same(model, tiny_model(family))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("family", FAMILIES)
def test_model_split_over_a_gpu_memory_and_disk_says_what_the_whole_one_says(family, tmp_path):
    model, whole = tiny_model(family), tiny_model(family)
    device_map = dict(zip(PARTS, [0, 0, "cpu", "disk", 0, 0, "cpu"], strict=True))
    Placement(device_map, tmp_path).spread(model)
    main = Placement(device_map, tmp_path).main_device
    found, expected = say(model, [ids.to(main) for ids in PROMPTS]), say(whole)
    assert [row.ids for row in found] == [row.ids for row in expected]
    assert found[0].first_logits.device == main


def empty_model(family, **changes):
    with init_empty_weights():
        return tiny_model(family, **changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_gpus_share_evenly_and_no_layer_is_split(family):
    model = empty_model(family, num_hidden_layers=16)
    size = sum(weight.nbytes for weight in model.parameters())
    device_map = plan_placement(model, torch.float32, max_memory={0: 2 * size, 1: 2 * size})
    sizes = sizes_of(model, device_map)
    assert list(sizes) == [0, 1]
    assert is_whole(device_map, 16)
    layer = sum(weight.nbytes for weight in model.model.layers[0].parameters())
    assert abs(sizes[0] - sizes[1]) < 4 * layer
    assert Placement(device_map, Path()).main_device == torch.device("cuda:0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_no_device_takes_more_than_its_limit(dtype):
    model = empty_model("mistral", num_hidden_layers=16)
    size = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
    limits = {0: size // 4, 1: size // 4, "cpu": size // 3}
    device_map = plan_placement(model, dtype, max_memory=limits)
    sizes = sizes_of(model, device_map, dtype)
    assert list(sizes) == [0, 1, "cpu", "disk"]
    assert is_whole(device_map, 16)
    assert all(sizes[device] <= limit for device, limit in limits.items())


def test_reserved_bytes_stay_free_on_the_first_device_alone():
    model = empty_model("mistral", num_hidden_layers=16)
    size = sum(weight.nbytes for weight in model.parameters())
    limits = {0: size, 1: size}
    reserved = size * 3 // 4
    plans = [
        plan_placement(model, torch.float32, max_memory=limits, reserved=kept)
        for kept in (0, reserved)
    ]
    plain, kept = (sizes_of(model, plan) for plan in plans)
    assert plain[0] > size - reserved >= kept[0] > 0
    assert kept[1] == size - kept[0]


def test_headroom_stays_free_on_every_device_that_computes():
    model = empty_model("mistral", num_hidden_layers=16)
    size = sum(weight.nbytes for weight in model.parameters())
    limits = {0: size, 1: size, "cpu": size}
    device_map = plan_placement(model, torch.float32, max_memory=limits, headroom=size * 3 // 4)
    sizes = sizes_of(model, device_map)
    assert max(sizes[0], sizes[1]) <= size // 4
    assert sizes["cpu"] > size // 4


def test_device_without_room_for_the_reserve_takes_nothing():
    model = empty_model("mistral")
    device_map = plan_placement(
        model, torch.float32, max_memory={0: 1000, "cpu": 2**30}, reserved=2**20
    )
    assert device_map == {"": "cpu"}


def test_device_that_is_not_named_takes_nothing():
    model = empty_model("mistral")
    assert plan_placement(model, torch.float32, max_memory={"cpu": 0}) == {"": "disk"}


def test_limits_that_are_given_are_not_changed():
    limits = {"cpu": 2**20}
    plan_placement(empty_model("mistral"), torch.float32, max_memory=limits, reserved=1000)
    assert limits == {"cpu": 2**20}


@pytest.mark.skipif(torch.cuda.is_available(), reason="its GPU is found")
def test_machine_without_gpu_takes_a_small_model_into_memory():
    assert plan_placement(empty_model("qwen2"), torch.float32, max_memory=None) == {"": "cpu"}


@pytest.mark.parametrize(
    ("device_map", "expected"),
    [
        ({"": "cpu"}, "cpu"),
        ({"": "disk"}, "cpu"),
        ({"": 1}, "cuda:1"),
        ({"model": "disk", "lm_head": "cpu"}, "cpu"),
        ({"model": "cpu", "lm_head": 0}, "cuda:0"),
        ({"model.embed_tokens": 0, "model.layers.0": 1, "lm_head": "cpu"}, "cuda:0"),
        ({"lm_head": 0, "model.embed_tokens": 1}, "cuda:1"),
        ({"lm_head": 0, "model": 1}, "cuda:1"),
        ({"model.embed_tokens": "disk", "model.layers.0": 1, "model.layers.1": 0}, "cuda:1"),
    ],
    ids=str,
)
def test_main_device_holds_the_embedding_or_else_is_the_first_gpu(device_map, expected):
    assert Placement(device_map, Path()).main_device == torch.device(expected)
