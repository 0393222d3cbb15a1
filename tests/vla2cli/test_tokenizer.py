import json
import random
import shutil
import unicodedata
from itertools import pairwise

import pytest
import regex
import tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from tests.goldens import SHARED, golden, runs_of, tensors_of
from tests.tiny import change_json, tiny_engine, write_json
from vla2_models.errors import CheckpointError
from vla2_models.hub import BUILTIN_FOLDER
from vla2cli.errors import ModelError
from vla2cli.prompt import build_prompt, tokenize
from vla2cli.tokenizer import LlamaPieces, Qwen2Pieces, load_tokenizer

CASES = ["mistral_clip_stc_8f", "mixtral_clip_stc_8f"]
QWEN2_RUNS = [("qwen2_siglip_stcv35_16f", run) for run in ("cap", "qa", "img", "txt")]
QWEN2_RUNS += [("qwen2_siglip_stcv35_16f_384", "cap")]
QWEN2_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
AV_RUNS = ["audio", "video", "av", "av_long", "av_short", "av_silent"]

# as published in transformers 4.40.0, models/qwen2/tokenization_qwen2.py
QWEN2_PATTERN = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"""
    r"""\s*[\r\n]+|\s+(?!\S)|\s+"""
)
CORPUS = [
    "Describe the video in detail. What is the man doing? He's walking; they've stopped.",
    "a red car, größer, 12 cars and 3,456 more\n\nThe    dog isn't there.\n    indented\n",
    "中文视频里的人 日本語 🚗🚗 éèà e\u0301 <|im_start|>",
]
TEXTS = [
    "",
    " ",
    "What is the man doing?",
    "  two  spaces   three    ",
    "\n",
    "a\n\nb \n c\r\n\td\x0b\x1c\x85e\u2028",
    "It's, they've, I'M, we'LL, 'tis, ''s, can't've \u2019s",
    "0 12 345 6,789.01 ٣ ² Ⅷ",
    "中文视频里的人 日本語 한국어",
    "🚗 👩\u200d🚀 a🚗b",
    "e\u0301 größer A\u030angstro\u0308m \u1112\u1161\u11ab",
    "<|im_start|>user\n<image>\nhi<|im_end|>\n<|im_start|><|im_end|>",
    "<|im_end|>\u0338 <|im_end|",
    "<|endoftext|> x<|im_end|>  y",
    '<<SYS>> [INST] </s> <|x|> ~!@#$%^&*()_+{}|:"<>?',
]


@pytest.fixture(scope="module")
def slow():
    return json.loads(golden("data/slow_tokenizer.json").read_text(encoding="utf-8"))


def tokenizer_of(case):
    return load_tokenizer(golden(f"checkpoints/{case}/tokenizer.model").parent)


def qwen2_golden(case):
    return golden(f"checkpoints/{case}/vocab.json").parent


def audio_golden(name):
    path = SHARED / "golden/audio" / name
    if not path.exists():
        pytest.skip(f"no '{path}'")
    return path


@pytest.fixture
def folder(tmp_path):
    """A tokenizer of one's own, to be damaged."""
    source = golden("checkpoints/mistral_clip_stc_8f")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(source / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def qwen2_folder(tmp_path):
    """Byte pairs learnt from a few sentences, in all the files that a Qwen2 checkpoint has."""
    learner = tokenizers.Tokenizer(BPE())
    learner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=420, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    learner.train_from_iterator(CORPUS, trainer)
    model = json.loads(learner.to_str())["model"]
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    added = {len(model["vocab"]) + i: {"content": n, "special": True} for i, n in enumerate(names)}
    write_json(tmp_path / "vocab.json", model["vocab"])
    lines = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    cut = {"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}}
    fast = {
        "added_tokens": [{"id": i, **token} for i, token in added.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, {"type": "ByteLevel"}]},
        "model": model,
    }
    write_json(tmp_path / "tokenizer.json", fast)
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}",
    }
    write_json(tmp_path / "tokenizer_config.json", settings)
    return tmp_path


def slow_qwen2_ids(folder, text):
    """The slow algorithm, written out: compose, cut, and join the pair of the lowest rank."""
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = {entry["content"]: int(i) for i, entry in settings["added_tokens_decoder"].items()}
    ids = []
    text = unicodedata.normalize("NFC", text)
    for part in regex.split("(" + "|".join(map(regex.escape, added)) + ")", text):
        if part in added:
            ids.append(added[part])
            continue
        for word in regex.findall(QWEN2_PATTERN, part):
            ids += [vocab[piece] for piece in join_pairs(spell(word), ranks)]
    return ids


def spell(word):
    """Write each byte of a word as GPT-2's visible character: shifted by 256 if it has none."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(b if b in visible else 256 + hidden.index(b)) for b in word.encode()]


def join_pairs(pieces, ranks):
    while known := [pair for pair in pairwise(pieces) if pair in ranks]:
        best, joined = min(known, key=ranks.__getitem__), []
        for piece in pieces:
            if joined and joined[-1] is not None and (joined[-1], piece) == best:
                # a joined piece is no left half in the same round
                joined[-1:] = [joined[-1] + piece, None]
            else:
                joined.append(piece)
        pieces = [piece for piece in joined if piece is not None]
    return pieces


def random_texts(count):
    rng = random.Random(3)
    parts = [
        *"abdelmrstvESTLM '\u2019.,!?-<|>0129٣ \n\r\t\x0b\x1c\x85\xa0é中文人🚗\u017fK",
        "e\u0301",
        "\u0338",
    ]
    parts += ["<|im_start|>", "<|im_end|>", "<|endoftext|>", " the", " man", "n't", "'ve", "    "]
    return ["".join(rng.choices(parts, k=rng.randrange(30))) for _ in range(count)]


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_the_slow_tokenizer(slow, case):
    tokenizer = tokenizer_of(case)
    assert len(slow[case]) == 215
    for row in slow[case]:
        assert tokenizer.encode(row["text"]) == row["ids"], row["text"]


@pytest.mark.parametrize("case", CASES)
def test_decoded_text_is_that_of_the_slow_tokenizer(slow, case):
    tokenizer = tokenizer_of(case)
    for row in slow[case]:
        assert tokenizer.decode(row["ids"]) == row["decoded"], row["text"]


@pytest.mark.parametrize("case", CASES)
def test_ids_around_a_placeholder_are_those_of_the_slow_tokenizer(slow, case):
    about = slow[f"{case}.multi_turn"]
    assert tokenize(tokenizer_of(case), about["prompt"], "<video>") == about["input_ids"]


def test_golden_strings_tell_the_prefix_rules_apart(slow):
    # the fast tokenizer of transformers 5 puts no space in front of a text that begins with one
    tokenizer = tokenizer_of(CASES[0])
    begins_with_space = [row for row in slow[CASES[0]] if row["text"].startswith(" ")]
    assert len(begins_with_space) > 5
    for row in begins_with_space:
        assert tokenizer.encode(row["text"][1:]) != row["ids"]


def test_a_text_of_nothing_has_no_ids():
    tokenizer = tokenizer_of(CASES[0])
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


def test_special_tokens_are_not_spoken():
    tokenizer = tokenizer_of(CASES[0])
    words = tokenizer.encode("two words")
    assert tokenizer.decode([1, *words, 0, tokenizer.eos_token_id]) == "two words"


def test_ids_without_a_piece_are_not_spoken():
    # a vocabulary may be padded with rows that no piece belongs to
    tokenizer = tokenizer_of(CASES[0])
    words = tokenizer.encode("two words")
    num_ids = tokenizer.pieces.num_ids
    assert tokenizer.decode([*words, num_ids, num_ids + 9]) == "two words"


def test_bytes_that_are_no_utf8_become_replacement_marks():
    tokenizer = tokenizer_of(CASES[0])
    first_byte = tokenizer.pieces.model.piece_to_id("<0xE2>")
    assert tokenizer.decode([*tokenizer.encode("a"), first_byte]) == "a�"


def test_added_token_is_one_id_and_the_longest_wins(folder):
    added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    added |= {"700": {"content": "<a>"}, "701": {"content": "<a><b>"}}
    change_json(folder / "tokenizer_config.json", added_tokens_decoder=added)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<a><b><a>") == [701, 700]
    assert tokenizer.decode([701, 700]) == ""


def test_tokens_written_as_objects_are_read(folder):
    change_json(folder / "tokenizer_config.json", bos_token={"content": "<s>"}, eos_token=None)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == ("<s>", "</s>", 2)


def test_special_tokens_need_not_be_listed(folder):
    change_json(folder / "tokenizer_config.json", added_tokens_decoder=None)
    assert load_tokenizer(folder).encode("<s>hi</s>") == tokenizer_of(CASES[0]).encode("<s>hi</s>")


def test_default_of_several_templates_is_taken(folder):
    templates = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    change_json(folder / "tokenizer_config.json", chat_template=templates)
    assert load_tokenizer(folder).chat_template == "yes"


def test_template_in_a_file_of_its_own_is_read(folder):
    change_json(folder / "tokenizer_config.json", chat_template=None)
    (folder / "chat_template.jinja").write_text("from the file", encoding="utf-8")
    assert load_tokenizer(folder).chat_template == "from the file"


def refusal(folder):
    with pytest.raises((CheckpointError, ModelError)) as caught:
        load_tokenizer(folder)
    line = str(caught.value)
    assert "\n" not in line
    assert str(folder) in line
    return line


def test_missing_template_is_refused(folder):
    change_json(folder / "tokenizer_config.json", chat_template=None)
    assert "has no chat template" in refusal(folder)


@pytest.mark.parametrize("templates", [["text"], [{"name": "default"}], [{"template": "x"}], 7])
def test_damaged_templates_are_refused(folder, templates):
    change_json(folder / "tokenizer_config.json", chat_template=templates)
    assert "has no chat template" in refusal(folder)


def test_unreadable_template_file_is_refused(folder):
    change_json(folder / "tokenizer_config.json", chat_template=None)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    assert "chat_template.jinja' cannot be read" in refusal(folder)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_config.json"])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert f"has no {name}" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"no pieces"], ids=["empty", "text"])
def test_broken_pieces_are_refused(folder, content):
    (folder / "tokenizer.model").write_bytes(content)
    assert "is not a sentencepiece model" in refusal(folder)


def test_settings_that_are_no_json_are_refused(folder):
    (folder / "tokenizer_config.json").write_text("{")
    assert "cannot be read" in refusal(folder)


def test_settings_that_are_no_object_are_refused(folder):
    write_json(folder / "tokenizer_config.json", [])
    assert "holds a list, expected an object" in refusal(folder)


def test_tiny_tokenizer_goes_there_and_back():
    tokenizer = tiny_engine().tokenizer
    text = "a red car, größer 🚗"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(("case", "run"), QWEN2_RUNS, ids=["-".join(run) for run in QWEN2_RUNS])
def test_qwen2_answer_matches_reference(case, run):
    generated = tensors_of(case, run)["generated_ids"].tolist()
    text = load_tokenizer(qwen2_golden(case)).decode(generated)
    assert text.strip() == runs_of(case)[run]["text"]


@pytest.mark.parametrize("run", AV_RUNS)
def test_audio_visual_ids_and_answer_match_reference(run):
    # their answers hold bytes that are no UTF-8
    about = json.loads(audio_golden("e2e/meta.json").read_text(encoding="utf-8"))[run]
    tokenizer = load_tokenizer(audio_golden("VideoLLaMA2.1-tiny-AV"))
    place = next(i for i in about["input_ids"] if i < 0)
    before, _, after = about["prompt"].partition({-201: "<video>", -202: "<audio>"}[place])
    ids = [*tokenizer.encode(before), place, *tokenizer.encode(after)]
    assert ids == about["input_ids"]
    assert tokenizer.decode(about["output_ids"]).strip() == about["text"]


@pytest.mark.parametrize("case", ["qwen2_siglip_stcv35_16f", "qwen2_siglip_stcv35_16f_384"])
def test_qwen2_ids_of_a_golden_vocabulary_are_those_of_the_slow_algorithm(case):
    folder = qwen2_golden(case)
    tokenizer = load_tokenizer(folder)
    for text in [*TEXTS, *random_texts(500)]:
        assert tokenizer.encode(text) == slow_qwen2_ids(folder, text), text


def test_qwen2_ids_are_those_of_the_slow_algorithm(qwen2_folder):
    tokenizer = load_tokenizer(qwen2_folder)
    for text in [*TEXTS, *random_texts(500)]:
        assert tokenizer.encode(text) == slow_qwen2_ids(qwen2_folder, text), text


@pytest.mark.parametrize(
    "names",
    [("tokenizer.json",), ("vocab.json",), ("merges.txt",), ("vocab.json", "merges.txt")],
    ids=" ".join,
)
def test_qwen2_ids_are_the_same_from_either_kind_of_file(qwen2_folder, names):
    expected = [load_tokenizer(qwen2_folder).encode(text) for text in TEXTS]
    for name in names:
        (qwen2_folder / name).unlink()
    tokenizer = load_tokenizer(qwen2_folder)
    assert [tokenizer.encode(text) for text in TEXTS] == expected


@pytest.mark.parametrize("case", ["qwen2_siglip_stcv35_16f", "qwen2_siglip_stcv35_16f_384"])
@pytest.mark.parametrize("names", [QWEN2_FILES[:2], QWEN2_FILES[2:3]], ids=" ".join)
def test_qwen2_golden_ids_are_the_same_without(tmp_path, case, names):
    source = qwen2_golden(case)
    for name in {*QWEN2_FILES} - {*names}:
        shutil.copyfile(source / name, tmp_path / name)
    whole, part = load_tokenizer(source), load_tokenizer(tmp_path)
    for text in TEXTS:
        assert part.encode(text) == whole.encode(text)


def test_qwen2_files_of_the_slow_tokenizer_come_first(qwen2_folder):
    (qwen2_folder / "tokenizer.json").write_text("{")
    assert load_tokenizer(qwen2_folder).encode("the man")


def test_qwen2_merges_may_be_lines_in_the_fast_file(qwen2_folder):
    # tokenizers 0.20 began to write pairs
    expected = load_tokenizer(qwen2_folder).encode("the man is walking")
    fast = json.loads((qwen2_folder / "tokenizer.json").read_text())
    fast["model"]["merges"] = [" ".join(pair) for pair in fast["model"]["merges"]]
    write_json(qwen2_folder / "tokenizer.json", fast)
    (qwen2_folder / "vocab.json").unlink()
    assert load_tokenizer(qwen2_folder).encode("the man is walking") == expected


def test_qwen2_added_tokens_may_stand_in_the_fast_file_only(qwen2_folder):
    # as transformers 5 saves a tokenizer
    expected = load_tokenizer(qwen2_folder)
    change_json(qwen2_folder / "tokenizer_config.json", added_tokens_decoder=None)
    for name in ("vocab.json", "merges.txt"):
        (qwen2_folder / name).unlink()
    tokenizer = load_tokenizer(qwen2_folder)
    assert tokenizer.added_ids == expected.added_ids
    assert tokenizer.eos_token_id == expected.eos_token_id


def test_qwen2_text_goes_there_and_back_composed(qwen2_folder):
    tokenizer = load_tokenizer(qwen2_folder)
    for text in [*TEXTS, *random_texts(200)]:
        plain = text.replace("<|", "")  # special tokens are not spoken
        assert tokenizer.decode(tokenizer.encode(plain)) == unicodedata.normalize("NFC", plain)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_what_a_piece_of_letters_splits_into_joins_to_it(kind, qwen2_folder):
    folder = qwen2_folder if kind == "qwen2" else BUILTIN_FOLDER
    tokenizer = load_tokenizer(folder)
    num_cut = 0
    for piece in range(tokenizer.num_tokens):
        splits = tokenizer.splits(piece)
        num_cut += bool(splits)
        assert not splits or tokenizer.decode([piece]).strip().isalpha()
        for pair in splits:
            spelling = "".join(map(tokenizer.pieces.spelling, pair))
            assert spelling == tokenizer.pieces.spelling(piece)
    assert num_cut > 50
    for text in (".", tokenizer.eos_token, "\n", "7"):
        assert all(tokenizer.splits(piece) == [] for piece in tokenizer.encode(text)), text
    assert tokenizer.splits(-201) == tokenizer.splits(10**6) == []


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_whole_word_is_one_piece_at_each_place_where_it_is_encoded_as_one(kind, qwen2_folder):
    folder = qwen2_folder if kind == "qwen2" else BUILTIN_FOLDER
    tokenizer = load_tokenizer(folder)
    words = ("the", "green", "circles", "in", "xylophone")
    found = {word: set(tokenizer.whole_word(word)) for word in words}
    assert found["in"]
    assert not found["xylophone"]
    for word, pieces in found.items():
        assert {tokenizer.decode([piece]).strip() for piece in pieces} <= {word}
        for text in (word, f"a {word}"):
            *_, last = ids = tokenizer.encode(text)
            is_one = len(ids) == len(tokenizer.encode(text.removesuffix(word).rstrip())) + 1
            assert (last in pieces) == is_one, text


def test_qwen2_composes_before_it_cuts(qwen2_folder):
    # the fast tokenizer finds the special token first
    tokenizer = load_tokenizer(qwen2_folder)
    assert tokenizer.eos_token_id not in tokenizer.encode("<|im_end|>\u0338")
    assert tokenizer.encode("<|im_end|>\u0301")[0] == tokenizer.eos_token_id


def test_qwen2_speaks_neither_special_tokens_nor_ids_without_a_piece(qwen2_folder):
    tokenizer = load_tokenizer(qwen2_folder)
    words = tokenizer.encode("two words")
    unspoken = [*tokenizer.added_ids.values(), tokenizer.num_tokens, tokenizer.num_tokens + 999]
    assert tokenizer.decode([*unspoken, *words, *unspoken]) == "two words"


def test_qwen2_speaks_an_added_token_that_is_not_special(qwen2_folder):
    added = json.loads((qwen2_folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    added["700"] = {"content": "<box>", "special": False}
    change_json(qwen2_folder / "tokenizer_config.json", added_tokens_decoder=added)
    tokenizer = load_tokenizer(qwen2_folder)
    assert tokenizer.num_tokens == 701
    assert 700 in tokenizer.encode("a <box> there")
    assert tokenizer.decode(tokenizer.encode("a <box> there")) == "a <box> there"


@pytest.mark.parametrize("shift", [0, 50], ids=["added tokens last", "pieces last"])
def test_number_of_tokens_is_one_more_than_the_largest_id(qwen2_folder, shift):
    vocab = json.loads((qwen2_folder / "vocab.json").read_text(encoding="utf-8"))
    last = max(vocab, key=vocab.__getitem__)
    added = max(load_tokenizer(qwen2_folder).added_ids.values())
    change_json(qwen2_folder / "vocab.json", **{last: vocab[last] + shift})
    assert load_tokenizer(qwen2_folder).num_tokens == max(vocab[last] + shift, added) + 1


def test_qwen2_bytes_that_are_no_utf8_become_replacement_marks(qwen2_folder):
    tokenizer = load_tokenizer(qwen2_folder)
    vocab = json.loads((qwen2_folder / "vocab.json").read_text(encoding="utf-8"))
    first_byte = vocab[spell("é")[0]]
    assert tokenizer.decode([*tokenizer.encode("a"), first_byte, *tokenizer.encode("b")]) == "a�b"


def test_qwen2_has_no_bos_token(qwen2_folder):
    tokenizer = load_tokenizer(qwen2_folder)
    assert tokenizer.bos_token == ""
    assert build_prompt(tokenizer, "", "Why?", medium="text").text == "\nWhy?<|im_end|>"


@pytest.mark.parametrize("name", ["<|im_end|>", "the"])
def test_qwen2_end_token_may_be_a_piece(qwen2_folder, name):
    vocab = json.loads((qwen2_folder / "vocab.json").read_text(encoding="utf-8"))
    vocab.setdefault(name, len(vocab))
    write_json(qwen2_folder / "vocab.json", vocab)
    change_json(qwen2_folder / "tokenizer_config.json", added_tokens_decoder={}, eos_token=name)
    fast = json.loads((qwen2_folder / "tokenizer.json").read_text(encoding="utf-8"))
    write_json(qwen2_folder / "tokenizer.json", fast | {"added_tokens": []})
    tokenizer = load_tokenizer(qwen2_folder)
    assert tokenizer.eos_token_id == vocab[name]
    assert tokenizer.decode(tokenizer.encode(f"a{name}b")) == "ab"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (True, "so, it isn't. x'y"),
        (False, "so , it is n't . x ' y"),
        (None, "so , it is n't . x ' y"),
    ],
    ids=str,
)
def test_spaces_are_cleaned_up_only_where_the_checkpoint_says_so(qwen2_folder, setting, expected):
    change_json(qwen2_folder / "tokenizer_config.json", clean_up_tokenization_spaces=setting)
    tokenizer = load_tokenizer(qwen2_folder)
    assert tokenizer.decode(tokenizer.encode("so , it is n't . x ' y")) == expected


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "Qwen2TokenizerFast", None], ids=str)
def test_kind_of_byte_pairs_is_known_by_class_or_files(qwen2_folder, name):
    change_json(qwen2_folder / "tokenizer_config.json", tokenizer_class=name)
    assert isinstance(load_tokenizer(qwen2_folder).pieces, Qwen2Pieces)


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", None], ids=str)
def test_kind_of_sentencepiece_is_known_by_class_or_files(folder, name):
    change_json(folder / "tokenizer_config.json", tokenizer_class=name)
    write_json(folder / "tokenizer.json", {"added_tokens": []})
    assert isinstance(load_tokenizer(folder).pieces, LlamaPieces)


@pytest.mark.parametrize(
    ("name", "kind"), [("LlamaTokenizer", LlamaPieces), ("Qwen2Tokenizer", Qwen2Pieces)]
)
def test_class_decides_where_both_kinds_of_files_are(qwen2_folder, name, kind):
    model = golden("checkpoints/mistral_clip_stc_8f/tokenizer.model")
    shutil.copyfile(model, qwen2_folder / "tokenizer.model")
    change_json(qwen2_folder / "tokenizer_config.json", tokenizer_class=name)
    assert isinstance(load_tokenizer(qwen2_folder).pieces, kind)


def test_sentencepiece_class_without_its_file_is_refused(qwen2_folder):
    change_json(qwen2_folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    assert "has no tokenizer.model" in refusal(qwen2_folder)


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Fast", "two\nlines", ["Qwen2Tokenizer"], 7])
def test_unknown_class_is_named(qwen2_folder, name):
    change_json(qwen2_folder / "tokenizer_config.json", tokenizer_class=name)
    assert f"tokenizer_class {name!r} of tokenizer_config.json is not known" in refusal(
        qwen2_folder
    )


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_qwen2_without_its_files_is_refused(qwen2_folder, name):
    (qwen2_folder / "tokenizer.json").unlink()
    (qwen2_folder / name).unlink()
    assert "no tokenizer.json, and not both of vocab.json and" in refusal(qwen2_folder)


def test_qwen2_end_token_without_an_id_is_refused(qwen2_folder):
    change_json(qwen2_folder / "tokenizer_config.json", eos_token="<|end|>")
    assert "the eos_token '<|end|>' has no id" in refusal(qwen2_folder)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("vocab.json", "", "cannot be read"),
        ("vocab.json", '{"a": 0, "b', "cannot be read"),
        ("vocab.json", "[]", "holds a list"),
        ("vocab.json", "{}", "has pieces for 0 of the 256 bytes"),
        ("vocab.json", '{"a": "0"}', "the piece 'a' has the id '0'"),
        ("vocab.json", '{"a": -1}', "the piece 'a' has the id -1"),
        ("vocab.json", '{"a": 1e3}', "the piece 'a' has the id 1000.0"),
        ("vocab.json", '{"a": 4294967296}', "the piece 'a' has the id 4294967296"),
        ("vocab.json", '{"a": true}', "the piece 'a' has the id True"),
        ("merges.txt", "", "has no merges"),
        ("merges.txt", "#version: 0.2\n", "has no merges"),
        ("merges.txt", "#version: 0.2\nt", "the merge 't' is no pair"),
        ("merges.txt", "a b c", "the merge 'a b c' is no pair"),
        ("merges.txt", "#version: 0.2\nQ QQ", "the merge 'Q QQ' needs 'QQ', which is no piece"),
        ("merges.txt", "Q X", "the merge 'Q X' needs 'QX', which is no piece"),
        ("merges.txt", b"\xff\xfe", "cannot be read"),
    ],
)
def test_damaged_qwen2_file_is_refused(qwen2_folder, name, content, complaint):
    content = content if isinstance(content, bytes) else content.encode()
    (qwen2_folder / name).write_bytes(content)
    line = refusal(qwen2_folder)
    assert complaint in line
    assert str(qwen2_folder / name) in line


def test_piece_that_spells_no_bytes_is_refused(qwen2_folder):
    change_json(qwen2_folder / "vocab.json", **{"a b": 420})
    assert "' ' in a piece stands for no byte" in refusal(qwen2_folder)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model": None}, "is not the tokenizer.json of a Qwen2Tokenizer"),
        ({"model": []}, "is not the tokenizer.json of a Qwen2Tokenizer"),
        ({"model": {"vocab": {}}}, "is not the tokenizer.json of a Qwen2Tokenizer"),
        ({"model": {"vocab": [], "merges": []}}, "holds no vocabulary"),
        ({"pre_tokenizer": None}, "is not the tokenizer.json of a Qwen2Tokenizer"),
        ({"pre_tokenizer": {"pretokenizers": []}}, "is not the tokenizer.json of"),
        (
            {"pre_tokenizer": {"pretokenizers": [{"pattern": {"Regex": "\\d"}}]}},
            "cuts a text otherwise than Qwen2; its pattern is '\\\\d'",
        ),
    ],
)
def test_damaged_fast_file_is_refused(qwen2_folder, changes, complaint):
    (qwen2_folder / "merges.txt").unlink()
    change_json(qwen2_folder / "tokenizer.json", **changes)
    assert complaint in refusal(qwen2_folder)


@pytest.mark.parametrize("merges", [None, "a b", [], [["t"]], [["t", 1]], [7], [["Q", "X"]]])
def test_damaged_merges_of_the_fast_file_are_refused(qwen2_folder, merges):
    (qwen2_folder / "merges.txt").unlink()
    fast = json.loads((qwen2_folder / "tokenizer.json").read_text(encoding="utf-8"))
    fast["model"]["merges"] = merges
    write_json(qwen2_folder / "tokenizer.json", fast)
    assert "merge" in refusal(qwen2_folder)


@pytest.mark.parametrize(
    "added",
    [
        {"x": {"content": "<a>"}},
        {"700": {}},
        {"700": {"content": ""}},
        {"700": {"content": 1}},
        {"-200": {"content": "<a>"}},
        {"700": "<a>"},
        ["<a>"],
    ],
    ids=str,
)
def test_damaged_added_tokens_are_refused(qwen2_folder, added):
    settings = qwen2_folder / "tokenizer_config.json"
    change_json(settings, added_tokens_decoder=added)
    assert "added_tokens_decoder of tokenizer_config.json is not understood" in refusal(
        qwen2_folder
    )


@pytest.mark.parametrize("added", [None, 7, {"a": 1}, ["<a>"], [{"id": "700", "content": "<a>"}]])
def test_damaged_added_tokens_of_the_fast_file_are_refused(qwen2_folder, added):
    change_json(qwen2_folder / "tokenizer_config.json", added_tokens_decoder=None)
    change_json(qwen2_folder / "tokenizer.json", added_tokens=added)
    assert "added_tokens of tokenizer.json is not understood" in refusal(qwen2_folder)
