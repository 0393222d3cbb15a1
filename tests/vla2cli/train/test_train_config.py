import pytest

from vla2cli.errors import UsageError
from vla2cli.train.config import Lora, WorldData, make_config, read_config

GIVEN = {"model": "m", "stage": "video-finetune", "output": "out"}
CLIPS = {"clips": 8}
FILES = [{"file": "a.json"}]


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


def test_of_a_world_only_its_size_has_to_be_given():
    config = make_config({**GIVEN, "world": {"clips": 8, "medium": None, "exam_steps": None}})
    assert config.world == WorldData(8, seed=0, questions=6, word_weight=1.0, word_share=0.5)
    assert make_config({**GIVEN, "world": {"clips": 8, "medium": "av"}}).world.medium == "av"


def test_a_rate_of_muon_may_be_written_as_yaml_does_not_read_it():
    assert make_config({**GIVEN, "muon_learning_rate": "1e-2"}).muon_learning_rate == 1e-2
    assert make_config(GIVEN).muon_learning_rate is None


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
        ({"world": {"clips": 8, "exam": 5}}, "'exam' is no setting of world"),
        ({"world": {"clip": 8}}, "did you mean 'clips'?"),
        ({"world": {"seed": 1}}, "world has no clips; expected their number in an epoch"),
        ({"world": 8}, "world is 8, expected {clips, seed, questions, …}"),
        ({"world": {**CLIPS, "medium": "image"}}, 'medium of world is "image", expected one of av'),
        ({"world": {**CLIPS, "word_share": -1}}, "word_share of world is -1, expected a number"),
        ({"world": {**CLIPS, "exam_steps": 0}}, "exam_steps of world is 0, expected a whole"),
        ({"world": CLIPS, "data": FILES}, "world and data exclude each other; give one"),
        ({"world": CLIPS, "num_frames": 4}, "clips of world have the model's own; leave it out"),
        ({"world": CLIPS, "pack": 2}, "world.questions about a clip are packed; leave it out"),
        ({"stage": "towers"}, "stage towers learns from the drawn world alone; give world"),
        ({"stage": "towers", "data": FILES}, "learns from the drawn world alone; give world"),
        (
            {"stage": "towers", "world": {**CLIPS, "exam_steps": 5}},
            "stage towers answers no questions; leave it out",
        ),
        ({"muon_learning_rate": 0}, "muon_learning_rate is 0, expected a number above 0"),
        ({"muon_learning_rate": 0.01, "fsdp": {}}, "which fsdp and deepspeed cut; leave it out"),
        ({"save_dtype": "half"}, "expected one of auto, float32, float16, bfloat16"),
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
