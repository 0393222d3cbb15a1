"""Graphs against the networks they were made of, and what an export leaves behind."""

import hashlib
import json
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from tests.exports import CPU, tiny_export, tiny_onnx
from tests.goldens import ATOL, golden, golden_engine
from tests.tiny import tiny_av_engine
from vla2_models.beats import position_bias
from vla2_models.connectors import PROJECTOR_TYPES, TABLE_1, build_connector
from vla2_models.loading import load_front, load_model
from vla2cli.errors import FrontendError
from vla2cli.frontend.export import (
    WORST_FP32,
    WORST_RELATIVE,
    export_checkpoint,
    export_frontend,
    export_graph,
)
from vla2cli.frontend.graphs import Graph, SoundGraph, frame_bytes, list_graphs
from vla2cli.frontend.manifest import Manifest, Origin, versions
from vla2cli.frontend.session import Session

REPOSITORY = Path(__file__).parents[3]
# how far the tiny checkpoints' graphs are from PyTorch in float32, relative; about twice what was
# seen. int8 has few values for weights, and for activations one scale for a whole tensor
RELATIVE = {
    "fp16": {"tower": 2e-3, "connector": 4e-3, "sound": 3e-3},
    "int8": {"tower": 0.05, "connector": 0.05, "sound": 0.08},
}


def silence(line):
    pass


def origin(precision="fp32"):
    return Origin("owner/name", None, "a" * 64, precision, "b" * 64)


def noise(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def connector_graph(module, num_patches, width, fewest=1):
    return Graph(
        name="connector",
        module=module,
        plain=module,
        input="features",
        outputs=("tokens",),
        axes={0: "num_clips", 1: "num_frames"},
        example=(3, fewest + 3, num_patches, width),
        checks=((1, fewest, num_patches, width), (2, fewest + 1, num_patches, width)),
        sample=noise,
    )


def open_graph(graph, path, precision="fp32"):
    export_graph(graph, path, origin(precision))
    return Session(path, CPU)


def read_graph(folder, name):
    return onnx.load(folder / f"{name}.onnx", load_external_data=False)


@pytest.mark.parametrize("name", PROJECTOR_TYPES)
def test_graph_of_every_projector_type_matches_the_reference(name, tmp_path):
    tensors = load_file(golden("data/projectors.safetensors"))
    prefix = f"{name}/weights/"
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    features, expected = tensors[f"{name}/input"], tensors[f"{name}/output"]
    design = PROJECTOR_TYPES[name]
    module = build_connector(design, features.shape[-1], expected.shape[-1])
    module.load_state_dict(weights)
    module.requires_grad_(False).eval()
    graph = connector_graph(module, *features.shape[2:], fewest=design.min_frames)
    session = open_graph(graph, tmp_path / "connector.onnx")
    (tokens,) = session(features)
    torch.testing.assert_close(tokens, expected, atol=ATOL["projector_tokens"], rtol=0)
    for num_clips, num_frames in ((1, 2), (1, 7), (3, 8), (2, 17)):
        x = noise((num_clips, num_frames, *features.shape[2:]))
        (found,) = session(x)
        assert found.shape[1] == design.count_tokens(num_frames, features.shape[2])
        torch.testing.assert_close(found, module(x), atol=1e-4, rtol=0)


def test_graph_of_the_ablation_over_all_eight_frames_matches(tmp_path):
    # the one block size of Table 1 that no public type has
    (design,) = (row.design for row in TABLE_1 if row.label == "3D Pool (8, 1, 1)")
    module = build_connector(design, 12, 16).requires_grad_(False).eval()
    session = open_graph(connector_graph(module, 16, 12, fewest=8), tmp_path / "connector.onnx")
    for num_frames in (8, 15, 16):
        x = noise((1, num_frames, 16, 12))
        torch.testing.assert_close(session(x)[0], module(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_tokens", [1, 8, 801, 1496])
def test_biases_looked_up_beforehand_are_those_of_beats(num_tokens):
    tower = tiny_av_engine().model.audio_tower
    graph = SoundGraph(tower, nn.Identity())
    seen = {}

    class Encoder(nn.Module):
        bias_table = tower.encoder.bias_table

        def forward(self, x, bias):
            seen["bias"] = bias
            return x

    class Tower(nn.Module):
        encoder = Encoder()

        def embed(self, fbank):
            return fbank

    graph.tower = Tower()
    graph(torch.zeros(1, num_tokens, 32))
    assert seen["bias"].equal(position_bias(tower.encoder.bias_table, num_tokens))


def test_sound_graph_has_no_logarithm():
    # another's logarithm could put a pair of tokens into the next bucket
    assert "Log" not in {node.op_type for node in read_graph(tiny_export(), "sound").graph.node}


def test_graphs_say_what_they_are_of():
    origin = Manifest.read(tiny_export()).origin
    assert (origin.id, origin.precision) == (tiny_av_engine().checkpoint.located.id, "fp32")
    assert origin.sha256 == tiny_av_engine().identity["sha256"]
    for name in ("tower", "connector"):
        about = {prop.key: prop.value for prop in read_graph(tiny_export(), name).metadata_props}
        assert about["vla2.graph"] == name
        assert about["vla2.sha256"] == origin.sha256
        assert about["vla2.key"] == origin.key
        assert about["vla2.precision"] == "fp32"
        assert about["vla2.torch"] == torch.__version__.partition("+")[0]
        assert about["vla2.onnxruntime"] == onnxruntime.__version__
        assert about.keys() >= {"vla2.onnx", "vla2.transformers", "vla2.timm", "vla2.vla2"}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_files_name_no_folder_of_this_machine(precision):
    for path in tiny_export(precision).glob("*"):
        content = path.read_bytes()
        for place in (REPOSITORY, Path(sys.prefix), Path(torch.__file__).parent, Path.home()):
            assert str(place).encode() not in content, path.name


def test_axes_that_vary_have_names_and_the_others_sizes():
    def shapes(name):
        graph = read_graph(tiny_export(), name).graph
        (x,) = graph.input
        dims = x.type.tensor_type.shape.dim
        return [out.name for out in graph.output], [d.dim_param or d.dim_value for d in dims]

    assert shapes("tower") == (["features"], ["num_frames", 3, 56, 56])
    assert shapes("connector") == (["tokens"], ["num_clips", "num_frames", 16, 48])
    assert shapes("sound") == (["features", "tokens"], ["num_sounds", "16*num_slots", 128])


def test_tensors_lie_beside_the_graph():
    # a graph with the tensors of a full-size connector inside could not be written
    inside = read_graph(tiny_export(), "connector").graph.initializer
    assert max(len(tensor.raw_data) for tensor in inside) <= 256
    parameters = sum(p.numel() for p in tiny_av_engine().model.mm_projector.parameters())
    assert (tiny_export() / "connector.onnx.data").stat().st_size > 0.9 * 4 * parameters


def test_manifest_has_size_and_hash_of_every_file():
    folder = tiny_export()
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    files = sorted(path for path in folder.iterdir() if path.name != "manifest.json")
    assert [path.name for path in files] == [
        f"{name}.onnx{end}" for name in ("connector", "sound", "tower") for end in ("", ".data")
    ]
    for path in files:
        content = path.read_bytes()
        assert manifest["files"][path.name] == [len(content), hashlib.sha256(content).hexdigest()]
    assert manifest["versions"] == versions()
    assert manifest["patch_rows"] == 16


def test_difference_of_fp32_is_stated_and_within_1e_4():
    graphs = Manifest.read(tiny_export()).graphs
    assert graphs.keys() == {"tower", "connector", "sound"}
    assert all(0 < difference.max_abs <= WORST_FP32 for difference in graphs.values())


@pytest.mark.parametrize("precision", RELATIVE)
def test_difference_of_each_stage_is_stated_and_small(precision):
    graphs = Manifest.read(tiny_export(precision)).graphs
    for name, most in RELATIVE[precision].items():
        print(f"\n{precision} {name:10} {graphs[name].relative:.1e}", end="")  # noqa: T201
        assert 1e-5 < graphs[name].relative < most < WORST_RELATIVE[precision]


def test_int8_has_weights_of_8_bits_for_every_product_with_weights():
    whole, small = (read_graph(tiny_export(p), "tower").graph for p in ("fp32", "int8"))
    weights = {tensor.name: tensor for tensor in whole.initializer}
    products = [n for n in whole.node if n.op_type == "MatMul" and n.input[1] in weights]
    integers = [node for node in small.node if node.op_type == "MatMulInteger"]
    assert len(products) == len(integers) > 0
    held = onnx.load(tiny_export("int8") / "tower.onnx").graph.initializer
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in held}
    for node in integers:
        assert tensors[node.input[1]].dtype == "int8"
        # a zero point for each output channel
        assert tensors[node.input[3]].shape == tensors[node.input[1]].shape[1:]


def test_fp16_takes_half_the_place():
    whole, half = (Manifest.read(tiny_export(p)) for p in ("fp32", "fp16"))
    sizes = [m.files["connector.onnx.data"][0] for m in (whole, half)]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.02)
    assert half.frame_bytes == whole.frame_bytes / 2
    assert tiny_onnx("fp16").sessions["tower"].dtype == torch.float16


def test_memory_of_a_frame_is_that_of_attention_and_of_wide_layers():
    # 17 tokens of width 48, 4 heads, 96 inside: two 4 x 17 x 17, two 17 x 96, six 17 x 48 floats
    expected = 4 * (2 * 4 * 17 * 17 + 2 * 17 * 96 + 6 * 17 * 48)
    assert frame_bytes(tiny_av_engine().checkpoint.config, 4) == expected


def test_front_is_loaded_in_float32_without_the_language_model():
    checkpoint = golden_engine("mistral_clip_stc_8f").checkpoint  # whose weights are bfloat16
    whole, front = load_model(checkpoint), load_front(checkpoint)
    assert {p.device.type for p in front.language_model.parameters()} == {"meta"}
    assert not any(p.requires_grad for p in front.parameters())
    for part, same in zip(whole.front, front.front, strict=True):
        for name, tensor in part.state_dict().items():
            found = same.state_dict()[name]
            assert found.dtype == torch.float32
            assert found.equal(tensor)


class Noisy(nn.Module):
    """A network that no graph can be held against."""

    def forward(self, features):
        return features.flatten(1, 2) + torch.rand_like(features.flatten(1, 2))


class Unknown(nn.Module):
    """A network with an operator that ONNX lacks."""

    def forward(self, features):
        return torch.linalg.eigvals(features[..., :16, :16]).real.flatten(1)


@pytest.mark.parametrize(
    ("connector", "line"),
    [
        (Noisy(), r"^the exported graph is wrong in fp32, connector: at most .*--frontend torch$"),
        (Unknown(), r"^the connector cannot be exported: [^\n]+$"),
    ],
    ids=["wrong", "not-exportable"],
)
def test_failure_is_one_line_and_leaves_nothing(connector, line, tmp_path):
    model = load_front(tiny_av_engine().checkpoint)
    model.mm_projector = connector
    with pytest.raises(FrontendError, match=line):
        export_frontend(model, tmp_path / "new/folder", origin(), silence)
    assert list(tmp_path.iterdir()) == []


class Offset(nn.Module):
    """Features of a root mean square of 50, the first of them 0 but for a random part of a size."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, features):
        flat = features.flatten(1, 2)
        fifties = torch.full_like(flat, 50.0)
        first = torch.arange(flat.shape[-1]) == 0
        return torch.where(first, self.size * (1 + torch.rand_like(flat)), fifties)


@pytest.mark.parametrize(("size", "is_refused"), [(1e-3, False), (0.1, True)])
def test_a_small_value_among_large_ones_may_be_off_by_as_much_as_they(size, is_refused, tmp_path):
    model = load_front(tiny_av_engine().checkpoint)
    model.mm_projector = Offset(size)
    if is_refused:
        with pytest.raises(FrontendError, match="the exported graph is wrong in fp32, connector"):
            export_frontend(model, tmp_path / "new", origin(), silence)
    else:
        manifest = export_frontend(model, tmp_path / "new", origin(), silence)
        assert manifest.graphs["connector"].max_abs > 1e-4


def test_nan_is_no_agreement(tmp_path):
    module = nn.Linear(4, 4).requires_grad_(False)
    module.weight.fill_(float("nan"))
    graph = connector_graph(module, 4, 4)
    for precision in ("fp32", "fp16"):
        with pytest.raises(FrontendError, match=f"wrong in {precision}"):
            export_graph(graph, tmp_path / "connector.onnx", origin(precision))


def test_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FrontendError, match=r"file/out' cannot be written: not a directory$"):
        export_checkpoint(tiny_av_engine().checkpoint, tmp_path / "file/out", "fp32", silence)


def test_exporter_and_quantiser_say_nothing_of_their_own(tmp_path, capfd):
    tower, *_ = list_graphs(load_front(tiny_av_engine().checkpoint))
    export_graph(tower, tmp_path / "tower.onnx", origin("int8"))
    assert capfd.readouterr() == ("", "")


def test_tower_graph_selects_the_layer_that_the_config_names():
    frames = noise((2, 3, 56, 56))
    (features,) = tiny_onnx().vision_features([frames])
    tower = tiny_av_engine().model.vision_tower
    with torch.inference_mode():
        states = tower(frames, output_hidden_states=True).hidden_states
    assert functional.l1_loss(features, states[-2][:, 1:]) < 1e-5
    assert functional.l1_loss(features, states[-1][:, 1:]) > 1e-2
