import pytest

from vla2cli.errors import UsageError
from vla2cli.train.config import Lora, make_config, read_config

GIVEN = {"model": "m", "stage": "video-finetune", "output": "out"}


def test_what_is_not_given_is_the_stage_s():
    config = make_config(GIVEN)
    # upstream VideoLLaMA2@c0bb03a, scripts/vllava/finetune.sh
    assert (config.learning_rate, config.batch, config.per_device_batch) == (2e-5, 128, 4)
    assert (config.warmup_ratio, config.weight_decay, config.max_length) == (0.03, 0, 2048)
    assert (config.form, config.image_aspect_ratio, config.epochs) == ("chat", "pad", 1)


def test_rates_may_be_written_as_yaml_does_not_read_them():
    assert make_config({**GIVEN, "learning_rate": "1e-4"}).learning_rate == 1e-4


def test_an_adapter_has_the_scripts_numbers():
    assert make_config({**GIVEN, "lora": True}).lora == Lora(128, 256, 0.05)
    assert make_config({**GIVEN, "lora": {"r": 8}}).lora == Lora(8, 256, 0.05)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"batches": 4}, "'batches' is no setting; did you mean 'batch'?"),
        ({"stage": "video_finetune"}, "did you mean 'video-finetune'?"),
        ({"output": None}, "no output is given"),
        ({"learning_rate": "fast"}, 'learning_rate is "fast", expected a number above 0'),
        ({"learning_rate": True}, "learning_rate is true, expected a number above 0"),
        ({"batch": 0}, "batch is 0, expected a whole number from 1"),
        ({"batch": 6, "per_device_batch": 4}, "batch is 6, no multiple of per_device_batch 4"),
        ({"train": ["connector"]}, 'train is ["connector"], expected a list of vision_tower'),
        ({"precision": "float16"}, "expected one of auto, float32, bfloat16"),
        ({"lora": {"rank": 8}}, "'rank' is no setting of lora"),
        ({"lora": {"dropout": 1}}, "dropout of lora is 1, expected a number from 0 to below 1"),
        ({"data": "a.json"}, 'data is "a.json", expected a list of {file, folder, weight}'),
        ({"data": [{"file": "a", "wight": 2}]}, "did you mean 'weight'?"),
        ({"data": [{"folder": "a"}]}, "data has an entry without a file"),
        ({"quantize": "4bit"}, "weights of 4 bits cannot be trained; add lora"),
        ({"stage": "video-pretrain", "lora": True}, "which stage video-pretrain keeps frozen"),
        ({"save": "projector"}, "the language model is trained; leave save out"),
        ({"lora": True, "quantize": "4bit", "save": "full"}, "leave save out"),
        ({"fsdp": {}, "deepspeed": {}}, "deepspeed and fsdp exclude each other"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_setting_is_refused_with_the_way_out(changes, line):
    with pytest.raises(UsageError) as refused:
        make_config({**GIVEN, **changes})
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


def test_settings_go_before_the_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model: m\nstage: joint\noutput: out\nbatch: 64\nlora: {r: 8}\n")
    config = read_config(path, ["batch=32", "lora.alpha=16", "connector=spatial_pool"])
    assert (config.batch, config.connector) == (32, "spatial_pool")
    assert config.lora == Lora(8, 16, 0.05)


@pytest.mark.parametrize(
    ("text", "line"),
    [("a: [", "is not YAML"), ("- a", "holds no settings"), (None, "cannot be read: no such file")],
    ids=["broken", "list", "absent"],
)
def test_a_file_without_settings_is_refused(text, line, tmp_path):
    path = tmp_path / "a.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=line):
        read_config(path)
