"""The bench on the miniature model: what its rows say, and what the command refuses."""

import json
import tempfile
from pathlib import Path

import av
import pytest
import torch

from tests.tiny import tiny_av_engine, tiny_engine, tiny_hub
from vla2_models.loading import load_model
from vla2_models.miniature import MODEL_ID
from vla2cli.bench.clip import make_video
from vla2cli.bench.frontends import FRONTENDS, Variant, pick_variants
from vla2cli.bench.networks import Networks, cut_layers
from vla2cli.bench.rows import NAMES
from vla2cli.bench.run import Bench
from vla2cli.bench.stages import STAGES
from vla2cli.cli import main
from vla2cli.errors import ModelError, UsageError

WANTED = (
    "stage",
    "dtype",
    "frontend",
    "ms",
    "gflop",
    "share_of_limit",
    "ratio_to_eager_fp32",
    "peak_mb",
)
CPU = torch.device("cpu")
VIDEO = str(Path(__file__).parents[3] / "examples/02.mp4")


def small_bench(engine, **changes):
    """A bench of a second: a small product, a small copy, a clip of the repository."""
    config = engine.checkpoint.config
    settings = {
        "model": "miniature",
        "networks": Networks(config, CPU, load_model(engine.checkpoint).state_dict()),
        "num_layers": config.language.num_hidden_layers,
        "stages": STAGES,
        "variants": tuple(pick_variants(["eager"], ["float32", "bfloat16"])),
        "dtypes": ("float32", "bfloat16"),
        "num_frames": 4,
        "num_rounds": 2,
        "video": VIDEO,
        "product_edge": 512,
        "copy_bytes": 2**22,
    }
    return Bench(**(settings | changes))


@pytest.fixture(scope="module")
def rows():
    return list(small_bench(tiny_av_engine()).run())


@pytest.fixture
def said(capsys, tmp_path, monkeypatch):
    """Run the command in an empty folder; give exit code, stdout and stderr."""
    for name in ("VLA2_HUB_DIR", "VLA2_DEVICE", "VLA2_FRAMES", "VLA2_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["bench", *map(str, arguments)])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


def test_there_is_one_row_for_each_stage_dtype_and_frontend(rows):
    both = ("float32", "bfloat16")
    assert [row.key for row in rows] == [
        ("read", None, None),
        ("preprocess", None, None),
        *((stage, dtype, "eager") for stage in ("tower", "connector", "beats") for dtype in both),
        *((stage, dtype, None) for stage in ("prefill", "generate") for dtype in both),
    ]


def test_rows_have_the_keys_that_scripts_read(rows):
    for row in rows:
        found = json.loads(json.dumps(row.to_dict()))
        assert tuple(found)[:8] == WANTED
        assert set(NAMES) <= set(found)
        assert found["model"] == "miniature"
        assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
        assert found["threads"] == torch.get_num_threads()


def test_figures_make_sense(rows):
    for row in rows:
        assert 0 < row.ms_min <= row.ms <= row.ms_max
        has_limit = row.stage not in ("read", "preprocess")
        assert (row.share_of_limit is not None) == has_limit
        if row.share_of_limit is not None:
            assert 0 < row.share_of_limit < 1.5
        assert row.peak_mb is None or 0 <= row.peak_mb < 2000


def test_bytes_bound_generate_and_products_the_other_stages(rows):
    limits = {row.stage: row.limit for row in rows}
    assert limits == {
        "read": None,
        "preprocess": None,
        **dict.fromkeys(("tower", "connector", "beats", "prefill"), "product"),
        "generate": "copy",
    }
    for row in rows:
        assert (row.gb is not None) == (row.stage == "generate")
        assert (row.gflop is not None) == (row.limit == "product")


def test_eager_float32_is_once_as_fast_as_itself(rows):
    ratios = {row.key: row.ratio_to_eager_fp32 for row in rows}
    assert all(ratio == 1 for (_, dtype, _), ratio in ratios.items() if dtype == "float32")
    assert all(ratio > 0 for (_, dtype, _), ratio in ratios.items() if dtype == "bfloat16")
    assert ratios["read", None, None] is None


def test_ratio_is_the_baselines_time_over_the_rows_own(rows):
    ms = {row.key: row.ms for row in rows}
    for row in rows:
        if row.dtype == "bfloat16":
            baseline = ms[row.stage, "float32", row.frontend]
            assert row.ratio_to_eager_fp32 == pytest.approx(baseline / row.ms, rel=1e-2)


def test_share_is_the_work_over_time_and_rate(rows):
    for row in rows:
        if row.limit == "product":
            rate = row.gflop / row.ms * 1e3
            assert row.share_of_limit == pytest.approx(rate / row.limit_per_s, rel=2e-2, abs=1e-4)


def test_baseline_is_measured_where_only_another_dtype_is_asked_for():
    variants = tuple(pick_variants(["eager"], ["bfloat16"]))
    bench = small_bench(
        tiny_engine(), stages=("tower", "prefill"), variants=variants, dtypes=("bfloat16",)
    )
    found = {row.key: row.ratio_to_eager_fp32 for row in bench.run()}
    assert found["tower", "float32", "eager"] == 1
    assert found["tower", "bfloat16", "eager"] is not None
    # a language model of full size in float32 may not fit
    assert found["prefill", "bfloat16", None] is None


def test_random_weights_of_a_config_run_every_stage_and_leave_nothing_behind():
    config = cut_layers(tiny_av_engine().checkpoint.config, 1)
    networks = Networks(config, CPU)
    before = set(Path(tempfile.gettempdir()).glob("vla2-bench-*"))
    found = list(small_bench(tiny_av_engine(), networks=networks).run())
    assert {row.stage for row in found} == set(STAGES)
    assert {row.facts["layers"] for row in found} == {1}
    assert {row.facts["random_weights"] for row in found} == {True}
    assert set(Path(tempfile.gettempdir()).glob("vla2-bench-*")) <= before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_random_weights_carry_a_signal_through_every_network(dtype):
    model = Networks(tiny_av_engine().checkpoint.config, CPU).front(getattr(torch, dtype))
    frontend = FRONTENDS["eager"].make(model, dtype)
    [features] = frontend.vision_features([torch.randn(4, 3, 56, 56)])
    [tokens] = frontend.visual_tokens([features])
    heard = frontend.listen(torch.randn(1, 398, 128).to(torch.bfloat16) * 6 + 15)
    smallest = torch.finfo(model.dtype).smallest_normal
    for made in (features, tokens, *heard):
        assert made.isfinite().all()
        assert made.abs().max() > 0.1
        assert (made.abs() < smallest).float().mean() < 0.01


def test_clip_that_is_made_has_moving_pictures_and_sound(tmp_path):
    path = make_video(tmp_path / "clip.mp4", duration_s=1)
    bench = small_bench(tiny_av_engine(), stages=("read",), video=path)
    [row] = bench.run()
    assert row.stage == "read"
    with av.open(path) as container:
        first, *_, last = container.decode(video=0)
        assert (first.width, first.height) == (1280, 720)
        assert abs(first.to_ndarray().astype(int) - last.to_ndarray()).mean() > 1
        assert [stream.rate for stream in container.streams.audio] == [48000]


def test_numbers_that_are_not_finite_end_the_bench_in_one_line():
    engine = tiny_engine()
    state = dict(load_model(engine.checkpoint).state_dict())
    state["language_model.lm_head.weight"] = state["language_model.lm_head.weight"] * torch.inf
    networks = Networks(engine.checkpoint.config, CPU, state)
    bench = small_bench(engine, networks=networks, stages=("generate",), dtypes=("float32",))
    with pytest.raises(ModelError, match="no finite numbers in float32"):
        list(bench.run())


def test_frontend_in_a_table_of_one_line_is_measured(monkeypatch):
    monkeypatch.setattr(
        "vla2cli.bench.frontends.FRONTENDS", FRONTENDS | {"again": FRONTENDS["eager"]}
    )
    monkeypatch.setattr("vla2cli.bench.stages.FRONTENDS", FRONTENDS | {"again": FRONTENDS["eager"]})
    variants = tuple(pick_variants(["again"], ["float32"]))
    bench = small_bench(tiny_engine(), stages=("tower",), variants=variants)
    found = {row.key for row in bench.run()}
    assert found == {("tower", "float32", "eager"), ("tower", "float32", "again")}


def test_command_writes_json_lines(said):
    code, out, err = said(MODEL_ID, "--hub-dir", tiny_hub(), "--stages", "generate", "--repeat", 1)
    assert code == 0
    [row] = map(json.loads, out.splitlines())
    assert (row["stage"], row["dtype"], row["frontend"]) == ("generate", "float32", None)
    assert row["model"] == MODEL_ID
    assert "measuring generate" in err


def test_command_writes_a_table_beside_a_file_and_a_plot(said, tmp_path):
    code, out, _ = said(
        *(
            MODEL_ID,
            "--hub-dir",
            tiny_hub(),
            "--stages",
            "read,generate",
            "--layers",
            1,
            "--video",
            VIDEO,
        ),
        *("--repeat", 1, "-o", "rows.jsonl", "--plot", "rows.png"),
    )
    assert code == 0
    found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in found] == ["read", "generate"]
    assert found[0]["layers"] == 1
    assert out.splitlines()[0].split()[:4] == ["stage", "front-end", "dtype", "ms"]
    assert len(out.splitlines()) == 3
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_spec_needs_no_file_and_says_that_layers_are_missing(said, tmp_path):
    stages = ("--stages", "preprocess", "--video", VIDEO)
    code, out, err = said("--spec", "VideoLLaMA2-7B", *stages, "--repeat", 1)
    assert code == 0
    [row] = map(json.loads, out.splitlines())
    assert (row["layers"], row["layers_whole"], row["prompt_tokens"]) == (1, 32, 845 + 40)
    assert "cut to 1 of 32 layers" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "expected a MODEL, or --spec"),
        (["x", "--spec", "VideoLLaMA2-7B"], "expected a MODEL, or --spec"),
        (["--spec", "VideoLLaMA-2-7B"], "did you mean VideoLLaMA2-7B?"),
        (["--spec", "bert"], "'--spec bert' is no public checkpoint; vla2 models lists them"),
        (["--spec", "VideoLLaMA2-7B", "--stages", "towr"], "'--stages towr': expected read, "),
        (["--spec", "VideoLLaMA2-7B", "--stages", "beats"], "needs a model with ears"),
        (["--spec", "VideoLLaMA2-7B", "--dtype", "fp8"], "'--dtype fp8': expected auto, float32"),
        (["--spec", "VideoLLaMA2-7B", "--frontend", "jax"], "'--frontend jax': expected eager"),
        (["--spec", "VideoLLaMA2-7B", "--layers", "33"], "'--layers 33': the language model has"),
        (["--spec", "VideoLLaMA2-7B", "--layers", "0"], "'--layers': Input should be greater"),
        (["--spec", "VideoLLaMA2-7B", "--repeat", "0"], "'--repeat': Input should be greater"),
        (["--spec", "VideoLLaMA2-7B", "--frames", "33"], "the model takes at most 32"),
        (["--spec", "VideoLLaMA2.1-7B-16F", "--frames", "1"], "needs at least 2"),
        (["--spec", "VideoLLaMA2-7B", "--video", "no.mp4"], "there is no such file"),
        (["--spec", "VideoLLaMA2-7B", "--plot", "a.pdf"], "ends in .png or .html"),
        (["--spec", "VideoLLaMA2-7B", "--plot", "no/a.png"], "there is no such folder"),
        (["--spec", "VideoLLaMA2-7B", "--device", "tpu"], "'--device tpu': expected auto, cpu"),
        (["--compare", "a", "b", "--spec", "VideoLLaMA2-7B"], "--compare reads two files and"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_and_exit_2(said, arguments, line):
    code, out, err = said(*arguments)
    assert (code, out) == (2, "")
    assert line in err
    assert err.startswith("vla2: ")
    assert err.count("\n") == 1


def test_file_that_is_there_is_not_overwritten(said, tmp_path):
    (tmp_path / "old.jsonl").write_text("precious")
    code, _, err = said("--spec", "VideoLLaMA2-7B", "-o", "old.jsonl")
    assert code == 2
    assert "'--output old.jsonl' exists already" in err
    assert (tmp_path / "old.jsonl").read_text() == "precious"


def test_video_that_is_none_is_wrong_usage(said, tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    code, out, err = said("--spec", "VideoLLaMA2-7B", "--stages", "read", "--video", "a.mp4")
    assert (code, out) == (2, "")
    assert "'--video a.mp4': " in err.splitlines()[-1]


def test_dtype_that_no_frontend_computes_is_refused():
    with pytest.raises(UsageError, match="'--frontend eager' runs in float32, bfloat16, float16"):
        pick_variants(["eager"], ["int8"])


def test_baseline_comes_first_and_once():
    found = pick_variants(["eager"], ["bfloat16", "float32"])
    assert found == [Variant("eager", "float32"), Variant("eager", "bfloat16")]


def test_graphs_are_traced_from_float32_whatever_they_run_in():
    variants = tuple(pick_variants(["onnx"], ["float32", "float16", "int8"]))
    bench = small_bench(
        tiny_engine(), stages=("tower", "connector"), variants=variants, num_rounds=1
    )
    rows = {row.key: row for row in bench.run()}
    for stage in ("tower", "connector"):
        assert rows[stage, "int8", "onnx"].share_of_limit is None
        assert rows[stage, "float32", "onnx"].share_of_limit > 0
        assert rows[stage, "float16", "onnx"].ratio_to_eager_fp32 > 0
