import pytest

from vla2cli.errors import UsageError
from vla2cli.train.config import Lora, WorldData, complete_record, make_config, read_config

GIVEN = {"model": "m", "stage": "video-finetune", "output": "out"}
CLIPS = {"clips": 8}
FILES = [{"file": "a.json"}]


def test_what_is_not_given_is_the_stage_s():
    config = make_config(GIVEN)
    # upstream VideoLLaMA2@c0bb03a, scripts/vllava/finetune.sh
    assert (config.learning_rate, config.batch, config.per_device_batch) == (2e-5, 128, 4)
    assert (config.warmup_ratio, config.weight_decay, config.max_length) == (0.03, 0, 2048)
    assert (config.form, config.image_aspect_ratio, config.epochs) == ("chat", "pad", 1)


@pytest.mark.parametrize(
    "key",
    [
        *("learning_rate", "projector_learning_rate", "muon_learning_rate"),
        *("epochs", "warmup_ratio", "weight_decay"),
    ],
)
def test_numbers_may_be_written_as_yaml_does_not_read_them(key):
    assert getattr(make_config({**GIVEN, key: "1e-2"}), key) == 1e-2
    with pytest.raises(UsageError, match=f"{key} is "):
        make_config({**GIVEN, key: "-1e-2"})


def test_numbers_below_a_key_may_be_written_so_too():
    shares = {"word_share": "2e-1", "apart": "1e0", "spelled": "3e-1"}
    world = {**CLIPS, "word_weight": "1e-2", **shares}
    config = make_config({**GIVEN, "stage": "joint", "world": world})
    assert (config.world.word_weight, config.world.word_share) == (0.01, 0.2)
    assert (config.world.apart, config.world.spelled) == (1, 0.3)
    assert make_config({**GIVEN, "lora": {"dropout": "1e-2"}}).lora.dropout == 0.01
    assert make_config({**GIVEN, "data": [{"file": "a", "weight": "5e-1"}]}).data[0].weight == 0.5


def test_a_world_takes_nothing_of_how_a_stage_sees_and_hears_files():
    for stage in ("video-finetune", "joint"):
        config = make_config({**GIVEN, "stage": stage, "world": CLIPS, "image_aspect_ratio": None})
        assert (config.image_aspect_ratio, config.va) == (None, False)


def test_a_record_of_before_a_setting_came_is_complete_with_its_default():
    world = {**CLIPS, "exam_steps": 5}
    now = make_config(
        {**GIVEN, "world": world, "lora": {"r": 8}, "train": ["language_model"]}
    ).as_dict()
    before = {key: value for key, value in now.items() if key != "muon_learning_rate"}
    before["world"] = {"clips": 8, "exam_steps": 5, "painted": 0.0}
    before["lora"] = {"r": 8}
    assert complete_record(before) == now
    # of no effect on clips of the world
    assert complete_record({**now, "image_aspect_ratio": "pad", "va": True}) == now
    files = make_config({**GIVEN, "data": FILES}).as_dict()
    assert complete_record({**files, "data": FILES}) == files


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"world": {**CLIPS, "painted": 0.5}}, "painted 0.5, which this version does not know"),
        ({"speed": 2}, "speed 2, which this version does not know"),
        ({"world": 5}, "5, which is no table of settings"),
    ],
    ids=["below", "above", "other"],
)
def test_a_record_that_is_not_understood_is_refused(changes, line):
    with pytest.raises(UsageError) as refused:
        complete_record({**make_config(GIVEN).as_dict(), **changes})
    assert str(refused.value) == line


def test_an_adapter_has_the_scripts_numbers():
    assert make_config({**GIVEN, "lora": True}).lora == Lora(128, 256, 0.05)
    assert make_config({**GIVEN, "lora": {"r": 8}}).lora == Lora(8, 256, 0.05)


def test_of_a_world_only_its_size_has_to_be_given():
    config = make_config({**GIVEN, "world": {"clips": 8, "medium": None, "exam_steps": None}})
    assert config.world == WorldData(8, seed=0, questions=6, word_weight=1.0, word_share=0.5)
    assert make_config({**GIVEN, "world": {"clips": 8, "medium": "av"}}).world.medium == "av"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"muon_learning_rate": 0.01, "lora": True}, "not for the matrices of lora; give one"),
        (
            {"muon_learning_rate": 0.01, "projector_learning_rate": 1e-4},
            "projector_learning_rate is of AdamW, and the projectors' matrices are",
        ),
        ({"world": CLIPS, "image_aspect_ratio": "pad"}, "image_aspect_ratio is for files; clips"),
        ({"world": CLIPS, "va": False}, "va is for files; clips of world have their own"),
        ({"batches": 4}, "'batches' is no setting; did you mean 'batch'?"),
        ({"stage": "video_finetune"}, "did you mean 'video-finetune'?"),
        ({"output": None}, "no output is given"),
        ({"learning_rate": "fast"}, 'learning_rate is "fast", expected a number above 0'),
        ({"learning_rate": True}, "learning_rate is true, expected a number above 0"),
        ({"batch": 0}, "batch is 0, expected a whole number from 1"),
        ({"seed": 2**32}, "seed is 4294967296, expected a whole number from 0 to below 2^32"),
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
        ({"world": {**CLIPS, "apart": 1.5}}, "apart of world is 1.5, expected a number from 0"),
        ({"world": {**CLIPS, "spelled": 2}}, "spelled of world is 2, expected a number from 0"),
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
        (
            {"stage": "towers", "world": {**CLIPS, "spelled": 0.2}},
            "world.apart and world.spelled are for stages with text; leave them out of towers",
        ),
        (
            {"stage": "towers", "world": CLIPS, "train": ["mm_projector"]},
            "stage towers trains both towers and nothing else; leave train out",
        ),
        (
            {"world": {**CLIPS, "exam_steps": 5}, "fsdp": {}},
            "one process asks a whole network, which fsdp and deepspeed cut",
        ),
        (
            {"world": {**CLIPS, "exam_steps": 5, "seed": 2**20}},
            "seed of world is 1048576, that of the exams' clips; give another",
        ),
        ({"stage": ["joint"]}, 'stage is ["joint"], expected a text'),
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
