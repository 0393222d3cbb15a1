"""Front-ends in ONNX Runtime against PyTorch and the reference, and how they share memory."""

import shutil

import pytest
import torch

from tests.exports import (
    CPU,
    golden_av_onnx,
    golden_onnx,
    tiny_export,
    tiny_onnx,
)
from tests.goldens import (
    AV_RUNS,
    RUNS,
    about_av,
    assert_stages_match,
    golden_av_engine,
    golden_engine,
    pixels_of,
    runs_of,
    tensors_of,
    tensors_of_av,
)
from tests.tiny import tiny_av_engine
from vla2cli.config import GenerationChoice
from vla2cli.engine import Ask, MediaTokens
from vla2cli.errors import FrontendError
from vla2cli.frontend import onnx, session
from vla2cli.frontend.onnx import OnnxFrontend
from vla2cli.frontend.session import Session, num_threads
from vla2cli.prompt import Turn

SEEN_RUNS = [(case, run) for case, run in RUNS if runs_of(case)[run]["modal"] != "text"]
# of any value; sums in another order differ by some 1e-5 where values are about 2
ATOL = 1e-4


def random_frames(*num_frames, size=56):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, size, size, generator=generator) for n in num_frames]


def random_fbank(num_rows):
    noise = torch.randn(1, num_rows, 128, generator=torch.Generator().manual_seed(0))
    return (15.4 + 6.6 * noise).bfloat16()


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize(("case", "run"), SEEN_RUNS, ids=["-".join(run) for run in SEEN_RUNS])
def test_golden_run_is_the_references_and_eagers(case, run):
    engine, frontend, about = golden_engine(case), golden_onnx(case), runs_of(case)[run]
    seen = "cap" if run == "mt" else run
    pixel_values = [pixels_of(case, seen)]
    (features,), (eager,) = (f.vision_features(pixel_values) for f in (frontend, engine.frontend))
    assert_close(features, eager)
    if about["modal"] == "image":
        features = engine.model.repeat_image(features)
    (tokens,), (eager_tokens,) = (f.visual_tokens([features]) for f in (frontend, engine.frontend))
    assert_close(tokens, eager_tokens)
    found = {"vision_features": features, "projector_tokens": tokens[None]}
    expected = tensors_of(case, run) | tensors_of(case, seen)
    assert_stages_match(f"{case} {run}", found, expected)

    question, history = about["instruct"], ()
    if not isinstance(question, str):
        first, answer, question = (message["content"] for message in question)
        history = (Turn(first, answer),)
    ask = Ask(question, about["modal"], MediaTokens(tokens), history)
    settings = engine.settings(GenerationChoice(max_new_tokens=about["max_new_tokens"]))
    (said,) = engine.answer([ask], settings)
    assert list(said.generation.ids) == tensors_of(case, run)["generated_ids"].tolist()


@pytest.mark.parametrize("run", AV_RUNS)
def test_golden_run_with_ears_is_the_references_and_eagers(run):
    engine, frontend, stored = golden_av_engine(), golden_av_onnx(), tensors_of_av(run)
    found, media, expected = {}, MediaTokens(), {}
    if "pixel_values" in stored:
        pixel_values = [stored["pixel_values"].float()]
        features = frontend.vision_features(pixel_values)
        (tokens,) = frontend.visual_tokens(features)
        assert_close(features, engine.frontend.vision_features(pixel_values))
        assert_close(tokens, engine.frontend.visual_tokens(features)[0])
        found |= {"vision_features": features[0], "projector_tokens": tokens}
        expected |= {"vision_features": stored.get("vision_features", features[0])}
        expected |= {"projector_tokens": stored.get("video_tokens", tokens[None])[0]}
    if "fbank_bf16" in stored:
        heard, audio_tokens = frontend.listen(stored["fbank_bf16"])
        assert_close((heard, audio_tokens), engine.frontend.listen(stored["fbank_bf16"]))
        found |= {"beats_features": heard, "audio_tokens": audio_tokens}
        expected |= {name: stored[name] for name in ("beats_features", "audio_tokens")}
        media = MediaTokens(audio=audio_tokens[0])
    media = MediaTokens(found.get("projector_tokens"), media.audio)
    assert_stages_match(run, found, expected)

    ask = Ask(about_av(run)["question"], about_av(run)["modal"], media)
    (said,) = engine.answer([ask], engine.settings(GenerationChoice(max_new_tokens=20)))
    assert list(said.generation.ids) == about_av(run)["output_ids"]


def test_clips_of_any_length_and_images_run_together():
    engine, frontend = tiny_av_engine(), tiny_onnx()
    frames = random_frames(8, 1, 5, 1, 16)
    features = frontend.vision_features(frames)
    assert_close(features, engine.frontend.vision_features(frames))
    features[1] = engine.model.repeat_image(features[1])  # strides of 0
    assert_close(frontend.visual_tokens(features), engine.frontend.visual_tokens(features))


@pytest.mark.parametrize("num_rows", [16, 31, 398, 2998])
def test_sound_of_any_length_is_heard_as_eager_hears_it(num_rows):
    # 2998 rows are 1496 tokens, most of which are farther apart than any bucket tells
    fbank = random_fbank(num_rows)
    assert_close(tiny_onnx().listen(fbank), tiny_av_engine().frontend.listen(fbank))


def test_frames_at_once_are_bounded_by_bytes(monkeypatch):
    frontend, frames = tiny_onnx(), random_frames(3, 5, 2)
    expected = frontend.vision_features(frames)
    monkeypatch.setattr(onnx, "BYTES_AT_ONCE", 4 * frontend.manifest.frame_bytes)
    assert frontend.frames_at_once == 4
    at_once, tower = [], frontend.sessions["tower"]
    bind = tower.bind
    monkeypatch.setattr(tower, "bind", lambda x, into: at_once.append(len(x)) or bind(x, into))
    assert_close(frontend.vision_features(frames), expected)
    assert at_once == [4, 4, 2]
    monkeypatch.setattr(onnx, "BYTES_AT_ONCE", 1)
    assert frontend.frames_at_once == 1


def test_input_is_read_where_torch_has_it():
    session = tiny_onnx().sessions["tower"]
    (frames,) = random_frames(2)
    binding = session.bind(frames)
    frames += 1  # a copy would not see it
    (found,) = session.fetch(binding)
    assert_close([found], tiny_av_engine().frontend.vision_features([frames]))


def test_output_is_handed_over_without_a_copy():
    session = tiny_onnx().sessions["connector"]
    binding = session.bind(torch.randn(1, 8, 16, 48))
    (tokens,) = session.fetch(binding)
    (value,) = binding.get_outputs()
    assert tokens.data_ptr() == value.data_ptr()
    kept = tokens.clone()
    del binding, value
    session(torch.randn(1, 8, 16, 48))  # whose output lies elsewhere, for the first is still used
    assert tokens.equal(kept)


def test_output_is_written_where_torch_wants_it():
    session = tiny_onnx().sessions["tower"]
    (frames,) = random_frames(3)
    memory = session.empty(5).fill_(float("nan"))
    binding = session.bind(frames, memory[1:4])
    (found,) = session.fetch(binding, memory[1:4])
    assert found.data_ptr() == binding.get_outputs()[0].data_ptr() == memory[1].data_ptr()
    assert_close([found], tiny_av_engine().frontend.vision_features([frames]))
    assert memory[[0, 4]].isnan().all()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tokens_have_the_dtype_asked_for(precision):
    frontend = tiny_onnx(precision, dtype=torch.bfloat16)
    features = frontend.vision_features(random_frames(8))
    # not rounded on their way into the next graph
    assert features[0].dtype == {"fp32": torch.float32, "fp16": torch.float16}[precision]
    assert frontend.visual_tokens(features)[0].dtype == torch.bfloat16


def test_files_may_go_once_they_are_open(tmp_path):
    folder = shutil.copytree(tiny_export(), tmp_path / "export")
    frontend = OnnxFrontend(folder, CPU, torch.float32)
    shutil.rmtree(folder)
    frames, fbank = random_frames(8), random_fbank(64)
    features = frontend.vision_features(frames)
    assert_close(features, tiny_av_engine().frontend.vision_features(frames))
    assert frontend.visual_tokens(features)[0].isfinite().all()
    assert_close(frontend.listen(fbank), tiny_av_engine().frontend.listen(fbank))


def test_sound_is_refused_where_there_are_no_ears():
    frontend = golden_onnx("mistral_clip_stc_8f")
    with pytest.raises(ValueError, match="has no audio tower"):
        frontend.listen(random_fbank(64))


def test_sound_of_less_than_a_patch_is_refused():
    with pytest.raises(ValueError, match="fbank has 15 rows, expected at least 16"):
        tiny_onnx().listen(random_fbank(15))


ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.gpu
@ON_CUDA
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_cuda_computes_what_the_cpu_does(precision):
    device, atol = torch.device("cuda"), {"fp32": 1e-4, "fp16": 5e-2}[precision]
    frontend = OnnxFrontend(tiny_export(precision), device, torch.float32)
    frames, fbank = random_frames(8, 1, 5), random_fbank(398)
    eager = tiny_av_engine().frontend
    features = frontend.vision_features(frames)
    assert {tensor.device.type for tensor in features} == {"cuda"}
    tokens = frontend.visual_tokens(features)
    found = [*features, *tokens, *frontend.listen(fbank.to(device))]
    expected = eager.vision_features(frames)
    expected += [*eager.visual_tokens(expected), *eager.listen(fbank)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu().float(), other, atol=atol, rtol=0)


@pytest.mark.gpu
@ON_CUDA
def test_input_that_is_still_being_made_on_a_stream_is_waited_for():
    connector = Session(tiny_export() / "connector.onnx", torch.device("cuda", 0))
    features = torch.randn(1, 8, 16, 48)
    expected = tiny_av_engine().frontend.visual_tokens([features[0]])[0]
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            late = torch.zeros_like(features, device="cuda")
            torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
            late.copy_(features.pin_memory(), non_blocking=True)
            (tokens,) = connector(late)
            late.zero_()  # which the run must not see
            found = tokens.clone()
        stream.synchronize()
        torch.testing.assert_close(found[0].cpu(), expected, atol=1e-4, rtol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
@pytest.mark.parametrize("use_tensorrt", [False, True], ids=["cuda", "tensorrt"])
def test_cuda_that_is_not_there_is_one_clear_line(monkeypatch, capfd, use_tensorrt):
    # torch would refuse first, at its stream; here it is ONNX Runtime that has to notice
    stream = type("Stream", (), {"cuda_stream": 0})
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream())
    name = "TensorRT" if use_tensorrt else "CUDA"
    with pytest.raises(
        FrontendError, match=f"^ONNX Runtime cannot use {name} here: .*--device cpu"
    ):
        Session(tiny_export() / "tower.onnx", torch.device("cuda", 0), use_tensorrt=use_tensorrt)
    assert capfd.readouterr() == ("", "")


def test_onnx_runtime_built_for_the_cpu_alone_is_one_clear_line(monkeypatch):
    stream = type("Stream", (), {"cuda_stream": 0})
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream())
    only_cpu = ["CPUExecutionProvider"]
    monkeypatch.setattr(session.onnxruntime, "get_available_providers", lambda: only_cpu)
    with pytest.raises(FrontendError, match=r"cannot use CUDA here: .*onnxruntime-gpu is missing"):
        Session(tiny_export() / "tower.onnx", torch.device("cuda", 0))


def test_int8_on_a_gpu_is_refused_since_it_would_run_on_the_cpu():
    with pytest.raises(FrontendError, match=r"in int8, which only the CPU has; give --precision"):
        OnnxFrontend(tiny_export("int8"), torch.device("cuda"), torch.float32)


def test_folder_that_is_no_export_is_refused(tmp_path):
    with pytest.raises(FrontendError, match=r"manifest.json' is not the manifest of an export"):
        OnnxFrontend(tmp_path, CPU, torch.float32)


def test_graph_that_cannot_be_read_is_one_clear_line(tmp_path, capfd):
    (tmp_path / "tower.onnx").write_bytes(b"no graph")
    with pytest.raises(FrontendError, match=r"tower.onnx' cannot be opened"):
        Session(tmp_path / "tower.onnx", CPU)
    assert capfd.readouterr() == ("", "")


def test_threads_are_those_that_torch_may_use():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        session = Session(tiny_export() / "tower.onnx", CPU)
    finally:
        torch.set_num_threads(before)
    options = session.session.get_session_options()
    assert options.intra_op_num_threads == 3
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert num_threads() == before
