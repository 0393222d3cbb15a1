import pytest
import torch

from tests.goldens import golden, golden_engine, golden_source, runs_of, tensors_of
from tests.tiny import SHORT_WINDOW, open_tiny, write_tiny
from vla2_models import loading
from vla2_models.checkpoint import open_checkpoint
from vla2_models.loading import load_model
from vla2cli.config import GenerationChoice
from vla2cli.engine import Ask, Engine, MediaTokens, pick_dtype
from vla2cli.errors import ModelError, UsageError
from vla2cli.layout import HEADROOM_BYTES, Layout

FAMILIES = ["mistral_clip_stc_8f", "mixtral_clip_stc_8f", "qwen2_siglip_stcv35_16f"]


def laid_out(case, layout, dtype="float32"):
    folder = golden(f"checkpoints/{case}/config.json").parent
    checkpoint = open_checkpoint(str(folder), golden_source())
    return Engine(checkpoint, device="auto", dtype=dtype, layout=layout)


def answer(engine, case):
    """Answer the reference's question about the reference's pixels."""
    about, expected = runs_of(case)["cap"], tensors_of(case, "cap")
    (features,) = engine.frontend.vision_features([expected["pixel_values"]])
    (tokens,) = engine.frontend.visual_tokens([features])
    settings = engine.settings(GenerationChoice(max_new_tokens=about["max_new_tokens"]))
    (answer,) = engine.answer([Ask(about["instruct"], "video", MediaTokens(tokens))], settings)
    return answer


def room_for(case, share):
    """Bytes for tower, connector and activations, and for a share of the language model."""
    model = load_model(golden_engine(case).checkpoint)
    sizes = {
        name: sum(p.numel() * p.element_size() for p in part.parameters())
        for name, part in model.named_children()
    }
    language = sizes.pop("language_model")
    return int(sum(sizes.values()) + HEADROOM_BYTES + share * language)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the map would take the GPUs")
@pytest.mark.parametrize("share", [None, 0.0, 0.75], ids=["all", "disk", "part"])
@pytest.mark.parametrize("case", FAMILIES)
def test_spread_model_says_the_references_ids(case, share):
    max_memory = None if share is None else {"cpu": room_for(case, share)}
    engine = laid_out(case, Layout(device_map="auto", max_memory=max_memory))
    said = answer(engine, case).generation.ids
    assert list(said) == tensors_of(case, "cap")["generated_ids"].tolist()
    on_disk = [p.device.type == "meta" for p in engine.model.language_model.parameters()]
    assert any(on_disk) == (share is not None)
    assert all(on_disk) == (share == 0)
    assert engine.model.device.type == "cpu"


@pytest.mark.parametrize("case", FAMILIES)
def test_quantised_model_answers_in_another_way_than_the_whole_one(case):
    pytest.importorskip("bitsandbytes")
    engine = laid_out(case, Layout(load_in="4bit"))
    found = answer(engine, case).generation.first_logits
    whole = answer(golden_engine(case), case).generation.first_logits
    assert found.isfinite().all()
    assert not torch.allclose(found, whole, atol=1e-3)
    assert engine.backends["quant"] == "4bit"


@pytest.fixture
def ears(tmp_path):
    """A checkpoint with ears whose decoder is wide enough to be quantised."""
    return open_tiny(write_tiny(tmp_path, has_ears=True, hidden_size=64, **SHORT_WINDOW))


def hear(model):
    rows = model.config.audio.window.num_frames
    fbank = torch.randn((1, rows, 128), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model.project_sound(model.encode_sound(fbank))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the map would take the GPUs")
def test_ears_of_a_spread_model_stay_on_the_main_device(ears):
    whole = Layout().load(ears, torch.float32, torch.device("cpu"))
    front_size = sum(p.numel() * 4 for part in whole.front for p in part.parameters())
    # room for the front alone: were the ears not counted, some layer would be on the CPU
    layout = Layout(device_map="auto", max_memory={"cpu": front_size + HEADROOM_BYTES})
    model = layout.load(ears, torch.float32, torch.device("cpu"))
    assert all(p.is_meta for p in model.language_model.parameters())
    assert not any(p.is_meta for part in model.front for p in part.parameters())
    assert torch.equal(hear(model), hear(whole))


def test_ears_of_a_quantised_model_are_not_quantised(ears):
    pytest.importorskip("bitsandbytes")
    cpu = torch.device("cpu")
    layout = Layout(load_in="4bit")
    whole, model = (lay.load(ears, torch.float32, cpu) for lay in (Layout(), layout))
    decoder = model.language_model.model.layers[0]
    assert type(decoder.mlp.up_proj).__name__ == "Linear4bit"
    assert {p.dtype for part in model.front for p in part.parameters()} == {torch.float32}
    assert torch.equal(hear(model), hear(whole))


def test_quantised_model_computes_in_bfloat16_unless_told_otherwise():
    cpu = torch.device("cpu")
    assert pick_dtype("auto", cpu, is_quantised=True) == torch.bfloat16
    assert pick_dtype("float32", cpu, is_quantised=True) == torch.float32
    assert pick_dtype("auto", cpu) == torch.float32


@pytest.mark.parametrize(
    ("layout", "device", "said"),
    [
        (Layout(load_in="2bit"), "cpu", "'--load-in 2bit': unknown quantization '2bit'"),
        (Layout(device_map="cuda:0,cuda:1"), "auto", "'--device-map cuda:0,cuda:1': expected auto"),
        (Layout(load_in="4bit", device_map="auto"), "auto", "give one"),
        (Layout(device_map="auto"), "cpu", "'--device cpu' is one device"),
    ],
    ids=["bits", "map", "both", "device"],
)
def test_layout_that_cannot_be_had_is_refused_before_a_weight_is_read(
    tmp_path, layout, device, said
):
    checkpoint = open_tiny(write_tiny(tmp_path))
    (checkpoint.folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=said):
        Engine(checkpoint, device=device, layout=layout)


def test_experts_in_8bit_are_refused_with_what_can_be_had():
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UsageError, match=r"'--load-in 8bit': .* mixtral model; take 4bit"):
        laid_out("mixtral_clip_stc_8f", Layout(load_in="8bit"))


def test_model_that_fits_nowhere_is_named_with_the_ways_out(tmp_path, monkeypatch):
    engine = Engine(open_tiny(write_tiny(tmp_path)), device="cpu")

    def fail(*_args, **_kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(loading, "load_model", fail)
    with pytest.raises(ModelError, match=r"does not fit .* try --dtype bfloat16, --load-in 4bit"):
        engine.load_weights()
