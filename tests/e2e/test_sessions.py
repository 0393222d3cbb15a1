"""The sessions that the command line promises, on real processes."""

import json
import os
import re
import shlex
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.conftest import EXAMPLES, together
from tests.tiny import generate
from vla2_models.builtin_design import TOWER_FOLDER
from vla2_models.hub import BUILTIN, has_builtin
from vla2_models.miniature import MODEL_ID
from vla2cli import Engine
from vla2cli.config import GenerationChoice
from vla2cli.media.frames import read_frames
from vla2cli.preprocess import fit_frame, normalise
from vla2cli.prompt import build_prompt
from vla2cli.record import FIELDS
from vla2cli.tensors import PROMPT, VISUAL

COMMANDS = ("caption", "ask", "plan", "features", "models", "export", "world", "verify", "merge")
# file name -> how a record spells it
NAMES = {
    name: name for name in ("two words.mp4", "new\nline.mp4", "ünï漢字.mp4", 'it\'s "$HOME".mp4')
} | {os.fsdecode(b"caf\xe9.mp4"): "caf%E9.mp4"}
BUILTIN_LINES = (
    "vla2: no --model given: using the built-in demonstration model; it knows only its own drawn "
    "world.",
    "For real videos: vla2 caption … --model DAMO-NLP-SG/VideoLLaMA2.1-7B-16F",
)
MOVES = ("01.mp4", "What moves?")
SIDES = ["to the left", "to the right"]
MANIFEST = (
    {"path": "examples/01.mp4", "question": "What moves?", "answer": "a car", "kind": "object"},
    {"path": "examples/09.png", "question": "What is it?", "id": "picture"},
    {"path": "examples/01.mp4", "question": "Which way?", "choices": SIDES},
)
TABLE = """\
path,question,start_s,end_s
examples/01.mp4,What moves?,,0:02
examples/01.mp4,,2,
"""
SETTINGS = """\
# the model and its hub folder come from here too
model: {model}
hub-dir: {hub_dir}
max-new-tokens: 3
frames: 4
temperature: 0.5
seed: 3
modality: image
"""


@pytest.fixture(scope="module")
def place(hub_dir, tmp_path_factory):
    """A folder to stand in: examples/, .demo/hub as `make demo` leaves it, and odd names."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "examples").symlink_to(EXAMPLES)
    (folder / ".demo").mkdir()
    (folder / ".demo/hub").symlink_to(hub_dir)
    for name in ("notes", "sounds", "videos", "odd"):
        (folder / name).mkdir()
    (folder / "notes/a.txt").write_text("hello")
    (folder / "notes/b").write_text("hello")
    (folder / "notes.jsonl").write_text("one\ntwo\n")
    (folder / "sounds/a.wav").write_bytes(b"RIFF")
    (folder / "parts.CSV").write_bytes(b"\xef\xbb\xbf" + TABLE.encode())
    (folder / "wrong.yaml").write_text("max-new-token: 3\n")
    (folder / "settings.yaml").write_text(SETTINGS.format(model=MODEL_ID, hub_dir=hub_dir))
    shutil.copy(EXAMPLES / "01.mp4", folder / "b.mp4")
    for name in NAMES:
        shutil.copy(EXAMPLES / "01.mp4", folder / "odd" / name)
    mixed = shutil.copytree(hub_dir / MODEL_ID, folder / "mixed")
    tensors = load_file(mixed / "model.safetensors")
    name = next(name for name in tensors if "mm_projector.s1" in name and tensors[name].ndim == 4)
    tensors[name] = torch.zeros(64, 7, 1, 1)
    save_file(tensors, mixed / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def ran(vla2, place):
    """The results of sessions that need nothing from each other, run two at a time."""
    run = partial(vla2, cwd=place)
    listed = b"".join(os.fsencode(f"odd/{name}\0") for name in NAMES)
    manifest = "".join(f"{json.dumps(line)}\n" for line in MANIFEST).encode()
    sessions = {
        "manifest": partial(run, "ask", "--manifest", "-", "--batch", "2", stdin=manifest),
        "table": partial(run, "caption", "--manifest", "parts.CSV"),
        "one clip": partial(run, "caption", "examples/01.mp4"),
        "at a terminal": partial(
            run, "ask", "examples/01.mp4", "What moves?", terminals=("stdout", "stderr")
        ),
        "bar": partial(
            run,
            "caption",
            "examples/",
            "-o",
            "bar.jsonl",
            terminals=("stderr",),
            env={"NO_COLOR": "1", "TERM": "xterm-256color"},
        ),
        "questions": partial(
            run,
            "ask",
            "examples/01.mp4",
            "examples/09.png",
            "--question",
            "What moves?",
            "--question",
            "Which way?",
        ),
        "questions on stdin": partial(
            run, "ask", "examples/01.mp4", "--questions", "-", stdin=b"What moves?\r\n\r\nWhy?\r\n"
        ),
        "then": partial(run, "ask", "examples/01.mp4", "What moves?", "--then", "Which way?"),
        "settings": partial(
            run,
            "caption",
            "examples",
            "--config",
            "settings.yaml",
            "--max-new-tokens",
            "5",
            env={
                "VLA2_MODEL": None,
                "VLA2_HUB_DIR": None,
                "VLA2_MAX_NEW_TOKENS": "4",
                "VLA2_SEED": "4",
            },
        ),
        "list": partial(run, "caption", "-", stdin=listed),
        "glob": partial(
            run, "caption", "examples/0[1-3].*", "--start", "0:01", "--end", "2", "--frames", "4"
        ),
        "every": partial(
            run, "caption", "examples/01.mp4", "examples/09.png", "--every", "0:02", "--end", "4.6"
        ),
        "every, first": partial(run, "caption", "b.mp4", "--every", "2", "--dry-run"),
        "sound": partial(run, "caption", "examples/01.mp4", "--modality", "av"),
        "cuda": partial(
            run, "caption", "b.mp4", "--device", "cuda", env={"CUDA_VISIBLE_DEVICES": ""}
        ),
        "mixed": partial(run, "caption", "b.mp4", "--model", "mixed"),
        "quantised": partial(run, "ask", "b.mp4", "What moves?", "--load-in", "4bit"),
        "spread": partial(run, "ask", "b.mp4", "What moves?", "--device-map", "auto"),
        "plain": partial(run, "ask", "b.mp4", "What moves?"),
    }
    return dict(zip(sessions, together(*sessions.values()), strict=True))


def test_record_says_how_the_language_model_was_held(ran):
    (plain,), (spread,), (quantised,) = (
        ran[name].records for name in ("plain", "spread", "quantised")
    )
    assert (plain["quant"], plain["dtype"]) == (spread["quant"], spread["dtype"])
    assert (plain["quant"], plain["dtype"]) == (None, "float32")
    assert plain["text"] == spread["text"]
    assert (quantised["quant"], quantised["dtype"]) == ("4bit", "bfloat16")
    # the libraries that do it say nothing
    assert ran["quantised"].stderr == ran["spread"].stderr == ran["plain"].stderr


# one file, a few files


def test_one_clip_in_a_pipe_gives_one_json_line(ran):
    done = ran["one clip"]
    assert done.code == 0
    (record,) = done.records
    assert [name for name in FIELDS if name in record] == list(record)
    assert (record["id"], record["path"]) == ("01.mp4", "examples/01.mp4")
    assert record["question"] == "Please describe the video in detail."
    assert record["text"]
    assert record["flags"] == ["builtin-model"]
    assert record["tokens"]["new"] == 12
    assert "what it says of real videos means nothing" in done.stderr
    assert "caption, 0 errors" not in done.stderr  # one clip needs no summary


def test_manifest_asks_each_file_its_own_questions(ran):
    done = ran["manifest"]
    assert done.code == 0
    records = {(record["id"], record["question"]): record for record in done.records}
    assert records.keys() == {
        ("examples/01.mp4", "What moves?"),
        ("picture", "What is it?"),
        ("examples/01.mp4", "Which way?"),
    }
    way = records["examples/01.mp4", "Which way?"]
    assert way["text"] == way["choice"]["text"] in SIDES
    (alone,) = [r for r in ran["questions"].records if (r["id"], r["question"]) == MOVES]
    assert records["examples/01.mp4", "What moves?"]["text"] == alone["text"]


def test_table_captions_parts_of_a_file(ran):
    done = ran["table"]
    assert done.code == 0
    parts = {(r["question"], *r["segment"].values()): r["frames"] for r in done.records}
    first, second = ("What moves?", None, 2), ("Please describe the video in detail.", 2, None)
    assert parts.keys() == {first, second}
    assert max(parts[first]["timestamps_s"]) < 2 <= min(parts[second]["timestamps_s"]) + 0.1
    assert "2 items: 2 captions, 0 errors" in done.stderr


def test_question_at_a_terminal_is_answered_by_the_text_alone(ran):
    done = ran["at a terminal"]
    assert done.code == 0
    assert done.stdout == ran["then"].records[0]["text"] + "\n"
    assert "\x1b" not in done.stdout + done.stderr


def test_several_questions_are_asked_each_by_itself(ran):
    done = ran["questions"]
    assert done.code == 0
    asked = {(r["id"], r["modality"], r["question"]) for r in done.records}
    files = (("01.mp4", "video"), ("09.png", "image"))
    assert asked == {(*file, q) for file in files for q in ("What moves?", "Which way?")}
    assert len(done.records) == 4
    assert not any("history" in record for record in done.records)
    assert "4 items: 4 answers, 0 errors" in done.stderr


def test_questions_of_a_text_are_asked_as_those_of_the_flags(ran):
    done = ran["questions on stdin"]
    assert (done.code, [r["question"] for r in done.records]) == (0, ["What moves?", "Why?"])
    (alone,) = [r for r in ran["questions"].records if (r["id"], r["question"]) == MOVES]
    assert done.records[0]["text"] == alone["text"]


def test_then_goes_on_with_the_answer_in_mind(ran):
    first, second = ran["then"].records
    assert "history" not in first
    assert second["question"] == "Which way?"
    assert second["history"] == [{"question": "What moves?", "text": first["text"]}]
    alone = next(
        r for r in ran["questions"].records if (r["id"], r["question"]) == ("01.mp4", "Which way?")
    )
    assert second["tokens"]["prompt"] > first["tokens"]["prompt"]
    assert second["logprob_mean"] != alone["logprob_mean"]


def test_names_with_spaces_newlines_and_quotes_survive(ran):
    done = ran["list"]
    assert done.code == 0
    written = {f"odd/{name}" for name in NAMES.values()}
    assert {record["id"] for record in done.records} == written
    assert {record["path"] for record in done.records} == written
    assert {record["text"] for record in done.records} == {ran["one clip"].records[0]["text"]}


def test_glob_range_and_frames_reach_the_record(ran):
    done = ran["glob"]
    assert done.code == 0
    assert sorted(record["id"] for record in done.records) == ["01.mp4", "02.mp4", "03.mp4"]
    for record in done.records:
        assert record["segment"] == {"start_s": 1, "end_s": 2}
        assert record["generation"]["num_frames"] == 4
        times = record["frames"]["timestamps_s"]
        assert len(times) == 4
        assert 1 <= times[0] < times[-1] <= 2


def test_long_files_are_cut_and_each_segment_is_a_record(ran):
    done = ran["every"]
    assert done.code == 0
    found = {(r["id"], str(r["segment"])): r["frames"]["timestamps_s"] for r in done.records}
    spans = [(0.0, 2.0), (2.0, 4.0), (4.0, 4.6)]
    expected = {("01.mp4", str(dict(zip(("start_s", "end_s"), span)))): span for span in spans}
    assert found.keys() == {*expected, ("09.png", "None")}
    for key, (start_s, end_s) in expected.items():
        assert start_s - 0.1 <= found[key][0] < found[key][-1] < end_s
    assert "measuring 2 files …" in done.stderr
    assert "4 items: 4 captions, 0 errors" in done.stderr
    segments = [line["segment"] for line in ran["every, first"].records]
    assert segments == [{"start_s": a, "end_s": b} for a, b in [*spans[:2], (4.0, 5.0)]]
    assert "3 to do, 0 done, 0 unreadable; nothing was run" in ran["every, first"].stderr


def test_flag_beats_variable_beats_file_beats_default(ran):
    done = ran["settings"]
    assert done.code == 0
    (record,) = done.records
    assert (record["id"], record["modality"]) == ("09.png", "image")  # file
    assert record["question"] == "Please describe the image in detail."
    assert "8 skipped (--modality image)" in done.stderr
    generation = record["generation"]
    assert generation["max_new_tokens"] == 5  # flag
    assert record["seed"] == 4  # variable
    assert generation["temperature"] == 0.5  # file
    assert generation["top_p"] == 0.9  # default
    # a picture stands for the checkpoint's frames and has no decoder to choose
    assert (generation["num_frames"], generation["decoder"]) == (8, None)
    assert record["model"]["id"] == MODEL_ID


def test_bar_is_drawn_at_a_terminal_without_colour_and_data_stays_in_the_ledger(ran, place):
    done = ran["bar"]
    assert done.code == 0
    assert done.stdout == ""
    assert "9/9" in done.stderr
    assert re.search(r"\d/s", done.stderr)
    assert "language" in done.stderr
    assert not re.search(r"\x1b\[[0-9;]*[34][0-9]", done.stderr)  # a colour
    assert "9 items: 9 captions, 0 errors" in done.stderr
    assert len((place / "bar.jsonl").read_text().splitlines()) == 9


# a folder and its ledger


def test_folder_is_done_once_and_again_only_what_is_new(vla2, tmp_path, make_clips, read_ledger):
    folder, ledger = make_clips(3), tmp_path / "captions.jsonl"
    (folder / "broken.mp4").write_text("no video")
    (folder / "talk.wav").write_bytes(b"RIFF")
    caption = partial(vla2, "caption", folder, "-o", ledger)

    first = caption()
    assert first.code == 3
    assert first.stdout == ""
    assert "4 videos, 1 audio file skipped (this model has no audio branch" in first.stderr
    assert f"{folder}/broken.mp4: " in first.stderr
    assert "(recorded, going on)" in first.stderr
    assert "4 items: 3 captions, 1 error, " in first.stderr
    assert f"See them: vla2 verify {ledger}" in first.stderr
    assert len(read_ledger(ledger)) == 4
    before = ledger.read_bytes()

    again, dry = together(caption, partial(caption, "--dry-run", "--retry-errors"))
    assert (again.code, again.stdout) == (3, "")
    assert "nothing to do: 3 done, 1 error (retry with --retry-errors)" in again.stderr
    assert dry.code == 0
    actions = {line["id"]: line["action"] for line in dry.records}
    skipped = {f"{i:03}.mp4": "skip" for i in range(3)}
    assert actions == {**skipped, "broken.mp4": "unreadable"}
    assert "0 to do, 3 done, 1 unreadable; nothing was run" in dry.stderr
    assert ledger.read_bytes() == before

    shutil.copy(EXAMPLES / "02.mp4", folder / "broken.mp4")
    shutil.copy(EXAMPLES / "05.mp4", folder / "new.mp4")
    (folder / "000.mp4").touch()  # the same content: not done again
    mended = caption("--retry-errors")
    assert mended.code == 0
    assert "3 of 5 done before; 2 to do" in mended.stderr
    assert ledger.read_bytes().startswith(before)
    records = read_ledger(ledger)
    assert len(records) == 5
    assert all("error" not in record for record in records.values())
    assert len(ledger.read_bytes().splitlines()) == 6  # broken.mp4 has two

    anew, quiet = together(
        partial(caption, "--force", "--batch", "3"),
        partial(vla2, "caption", folder / "new.mp4", "-q", "-o", tmp_path / "quiet.jsonl"),
    )
    assert anew.code == 0
    assert "5 items: 5 captions" in anew.stderr
    assert len(ledger.read_bytes().splitlines()) == 5
    assert (tmp_path / "captions.jsonl.bak-1").read_bytes().startswith(before)
    texts = {key: record["text"] for key, record in read_ledger(ledger).items()}
    assert texts == {key: record["text"] for key, record in records.items()}
    assert quiet == type(quiet)(0, "", "")
    assert len(read_ledger(tmp_path / "quiet.jsonl")) == 1


def test_verify_shows_what_the_summary_points_to(vla2, tmp_path):
    path = tmp_path / "ledger.jsonl"
    error = {"kind": "decode", "stage": "decode", "message": "moov atom not found"}
    lines = [
        {"id": "a.mp4", "task": "caption", "question": "?", "text": "A car.", "flags": []},
        {"id": "b.mp4", "task": "caption", "question": "?", "error": error},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    piped = vla2("verify", path)
    assert piped.code == 3
    (finding,) = piped.records
    assert (finding["kind"], finding["id"], finding["line"]) == ("error", "b.mp4", 2)
    assert f"{path}: 2 records, 1 done, 1 error; 1 finding" in piped.stderr
    shown = vla2("verify", path, "-q", terminals=("stdout",))
    assert shown == type(shown)(3, "error: b.mp4: decode: moov atom not found\n", "")
    path.write_text(json.dumps(lines[0]) + "\n")
    assert vla2("verify", path).code == 0


# features


def test_features_are_what_the_engine_gives(vla2, hub_dir, place, tmp_path):
    folder = tmp_path / "features"
    features = partial(vla2, "features", "examples/01.mp4", "examples/09.png", "-o", folder)
    question = "What moves?"
    done = features("--tensors", "all", "--question", question, cwd=place)
    assert done.code == 0
    assert done.stdout == ""
    records = [json.loads(line) for line in (folder / "features.jsonl").read_text().splitlines()]
    files = {record["id"]: folder / record["file"] for record in records}
    assert {re.sub("~[0-9a-f]{8}", "", file.name) for file in files.values()} == {
        "01.mp4.safetensors",
        "09.png.safetensors",
    }
    assert all(record["task"] == "features" for record in records)

    engine = Engine.load(MODEL_ID, hub_dir=hub_dir, device="cpu")
    choice = engine.settings(GenerationChoice(max_new_tokens=12))
    for record in records:
        tensors = load_file(folder / record["file"])
        assert set(tensors) == {*VISUAL, *PROMPT}
        assert {name: list(tensor.shape) for name, tensor in tensors.items()} == record["tensors"]
        expected = _expected_tensors(engine, EXAMPLES / record["id"], question, choice)
        for name, tensor in expected.items():
            # plain networks here, packed ones there: as far as both may be from the reference
            torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=1e-4, msg=name)

    files["09.png"].unlink()
    again = features("--tensors", "all", "--question", question, cwd=place)
    assert again.code == 0
    assert "1 of 2 done before; 1 to do" in again.stderr
    assert files["09.png"].exists()


def _expected_tensors(engine, path, question, settings):
    """The tensors from the networks themselves, by another way than the command's."""
    kind = "image" if path.suffix == ".png" else "video"
    frames = read_frames(str(path), kind, num_frames=8)
    fitted = [fit_frame(image, engine.geometry) for image in frames.images]
    pixel_values = torch.from_numpy(normalise(np.stack(fitted), engine.geometry))
    num_copies = 8 if kind == "image" else 1
    with torch.inference_mode():
        copies = pixel_values.repeat(num_copies, 1, 1, 1)
        vision = engine.model.encode_frames(copies)
        tokens = engine.model.project(vision[None])
        prompt = build_prompt(
            engine.tokenizer, "videollama2_mistral", question, medium=kind, history=()
        )
        embeds = engine.model.splice(prompt.input_ids, [tokens[0]])
        (generation,) = generate(engine.model.language_model, [embeds], settings, [0])
    return {
        "frame_indices": torch.tensor(frames.indices),
        "timestamps_s": torch.tensor(frames.timestamps_s, dtype=torch.float64),
        "pixel_values": pixel_values,
        "vision_features": vision,
        "projector_tokens": tokens,
        "input_ids": torch.tensor(prompt.input_ids),
        "attention_mask_spliced": torch.ones(len(embeds), dtype=torch.long),
        "inputs_embeds": embeds,
        "first_logits": generation.first_logits,
        "generated_ids": torch.tensor(generation.ids),
    }


# help


@pytest.fixture(scope="module")
def helps(vla2):
    return dict(zip(COMMANDS, together(*(partial(vla2, name, "-h") for name in COMMANDS))))


def _examples(text):
    return [
        line.strip() for line in text[text.index("Examples") :].splitlines()[1:] if line.strip()
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_two_examples(helps, command):
    done = helps[command]
    assert (done.code, done.stderr) == (0, "")
    examples = _examples(done.stdout)
    assert len(examples) == 2
    assert all(example.startswith(f"vla2 {command} ") for example in examples)


def test_examples_in_help_work_as_typed(vla2, helps, place):
    env = {"VLA2_MODEL": None, "VLA2_HUB_DIR": None, "VLA2_MAX_NEW_TOKENS": "6"}
    commands = [line for name in COMMANDS for line in _examples(helps[name].stdout)]
    # these look at what caption wrote
    readers = ("vla2 verify", "vla2 merge")
    for later in (False, True):
        lines = [line for line in commands if line.startswith(readers) is later]
        calls = [partial(vla2, *shlex.split(line)[1:], env=env, cwd=place) for line in lines]
        for line, done in zip(lines, together(*calls), strict=True):
            assert done.code == 0, f"{line}: {done.stderr}"
            assert (done.stdout == "") is (" -o " in line or later), line
            if line.startswith("vla2 models"):
                facts = {found["id"]: found for found in done.records}
                assert facts[BUILTIN]["usable"] is True
                assert facts[BUILTIN]["tower"] == f"./{TOWER_FOLDER}"


def test_version_says_more_with_verbose(vla2):
    short, long = together(partial(vla2, "--version"), partial(vla2, "--version", "--verbose"))
    assert (short.code, short.stderr) == (0, "")
    assert re.fullmatch(r"vla2 \d+\.\d+\.\d+\n", short.stdout)
    assert long.stdout.startswith(short.stdout)
    for word in ("torch", "CUDA", "model cache"):
        assert word in long.stdout


def test_bare_command_shows_its_help(vla2):
    done = vla2()
    assert done.stdout == vla2("--help").stdout
    assert done.stderr == ""


# bad input: one line, the value, the way out

BAD = {
    "typo": ("caption vidoes/", 2, "'vidoes/' does not exist; did you mean 'videos/'?"),
    "nothing": (
        "caption notes/",
        4,
        "'notes/' holds no video, image or audio file (looked at 2 files)",
    ),
    "no video": ("caption sounds/ --modality video", 4, "'sounds/' holds no video"),
    "no match": ("caption *.avi", 4, "'*.avi' matches no file or folder"),
    "empty list": ("caption -", 4, "the list on standard input is empty"),
    "no frame": ("caption b.mp4 --frames 0", 2, "'--frames 0': at least 1 frame is needed"),
    "many frames": ("caption b.mp4 --frames 33", 2, "'--frames 33': the model takes at most 32"),
    "no number": ("caption b.mp4 --frames many", 2, "'many'"),
    "batch": ("caption b.mp4 --batch 0", 2, "'--batch 0': at least 1 is needed"),
    "large batch": ("caption b.mp4 --batch 9999", 2, "'--batch 9999': at most 1,024"),
    "output is input": ("caption b.mp4 -o b.mp4 --force", 2, "'b.mp4' is an input"),
    "tokens": ("caption b.mp4 --max-new-tokens 0", 2, "'--max-new-tokens 0': at least 1"),
    "temperature": ("caption b.mp4 --temperature -1", 2, "'--temperature -1.0'"),
    "top-p": ("caption b.mp4 --top-p 0.5", 2, "need '--temperature' above 0"),
    "time": ("caption b.mp4 --start soon", 2, "'soon' is no time; expected seconds like 12.5"),
    "range": ("caption b.mp4 --start 2 --end 1", 2, "'--end 1': the range ends before it begins"),
    "every": ("caption b.mp4 --every 0", 2, "'--every 0': at least 0.1 s are needed"),
    "every so often": ("caption b.mp4 --every nan", 2, "'nan' is no time; expected seconds like"),
    "timeout": ("caption b.mp4 --decode-timeout 0", 2, "'--decode-timeout 0"),
    "modality": ("caption b.mp4 --modality smell", 2, "'smell'"),
    "prompt": ("caption b.mp4 --prompt ' '", 2, "--prompt is empty"),
    "flag": ("caption b.mp4 --promt x", 2, "--promt"),
    "no path": ("caption", 2, "PATH"),
    "force": ("caption b.mp4 --force", 2, "they need -o FILE"),
    "config": ("caption b.mp4 --config wrong.yaml", 2, "did you mean 'max-new-tokens'?"),
    "no config": ("caption b.mp4 --config gone.yaml", 2, "'gone.yaml' cannot be read"),
    "question is a file": (
        "ask examples/01.mp4 b.mp4",
        2,
        "'b.mp4' is the question and also a file; write the question last, or use --question",
    ),
    "no question": ("ask b.mp4", 2, "only 'b.mp4' was given; expected PATH... QUESTION"),
    "manifest": ("ask --manifest notes.jsonl", 2, "notes.jsonl: line 1: 'one' is no JSON"),
    "shard": ("caption b.mp4 --shard 5/4", 2, "'--shard 5/4': expected I/N with I from 1 to N"),
    "no question in the table": ("ask --manifest parts.CSV", 2, "line 3: has no 'question'"),
    "choices": ("ask b.mp4 Which? --choices left", 2, "'--choices left': expected two options"),
    "then": ("ask b.mp4 --question a --question b --then c", 2, "several were given"),
    "no folder": ("features b.mp4", 2, "they need a folder: -o FOLDER"),
    "tensors": ("features b.mp4 -o f --tensors pixels", 2, "'--tensors pixels': expected all, or"),
    "no ledger": ("verify gone.jsonl", 1, "cannot read 'gone.jsonl': no such file"),
    "not a ledger": ("verify notes.jsonl", 1, "'notes.jsonl' is not a vla2 ledger"),
    "nowhere to merge": ("merge notes.jsonl", 2, "merge writes a new ledger: give -o FILE"),
    "nothing to merge": ("merge notes.jsonl -o c.jsonl", 1, "'notes.jsonl' is not a vla2 ledger"),
    "command": ("capton b.mp4", 2, "capton"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(vla2, place, name):
    line, code, message = BAD[name]
    _check_refusal(vla2(*shlex.split(line), cwd=place), code, message)


def test_no_model_is_the_built_in_one_or_refused_with_an_example(vla2, place):
    done = vla2("caption", "b.mp4", cwd=place, env={"VLA2_MODEL": None})
    if not has_builtin():
        line = "no model: give --model FOLDER, or a hub id like --model DAMO-NLP-SG/"
        _check_refusal(done, 2, line)
        return
    assert done.code == 0
    assert done.stderr.splitlines() == list(BUILTIN_LINES)
    assert done.records[0]["model"]["id"] == "builtin"


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("sound", 2, f"--modality av needs a model with an audio branch; {MODEL_ID} has none (try"),
        ("cuda", 2, "no CUDA device; --device auto would run on the CPU"),
        ("mixed", 1, "mm_projector.s1"),
    ],
)
def test_model_that_cannot_do_it_is_refused_in_one_line(ran, name, code, message):
    done = ran[name]
    *before, last = done.stderr.splitlines(keepends=True)
    assert not any("Traceback" in line for line in before)
    _check_refusal(type(done)(done.code, done.stdout, last), code, message)


def _check_refusal(done, code, message):
    assert done.code == code
    assert done.stdout == ""
    assert done.stderr.startswith("vla2: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_debug_shows_the_traceback(vla2, place):
    done = vla2("caption", "vidoes/", "--debug", cwd=place)
    assert done.code == 1
    assert "Traceback" in done.stderr
    assert "did you mean" in done.stderr
