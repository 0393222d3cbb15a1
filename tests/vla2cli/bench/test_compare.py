"""Two runs beside each other, and files that are none."""

import json
from pathlib import Path

import pytest

from vla2cli.bench.compare import compare, differences
from vla2cli.bench.rows import Row, read_rows
from vla2cli.cli import main
from vla2cli.errors import UsageError

FACTS = {"model": "m", "cpu": "fast", "threads": 2, "versions": {"torch": "1", "vla2": "2"}}


def row(stage, dtype, frontend, ms, **facts):
    return Row(
        stage=stage,
        dtype=dtype,
        frontend=frontend,
        ms=ms,
        gflop=1.0,
        share_of_limit=0.5,
        share_of_packed=0.4,
        ratio_to_eager_fp32=1.0,
        peak_mb=1.0,
        ms_min=ms,
        ms_max=ms,
        gb=None,
        limit="product",
        limit_per_s=10.0,
        facts=FACTS | facts,
    )


def write(path, rows, *, as_array=False):
    objects = [each.to_dict() for each in rows]
    text = json.dumps(objects) if as_array else "\n".join(map(json.dumps, objects))
    path.write_text(text)
    return path


@pytest.fixture
def said(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["bench", *map(str, arguments)])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


A = [row("read", None, None, 10.0), row("tower", "float32", "eager", 300.0)]
B = [row("tower", "float32", "eager", 200.0), row("tower", "bfloat16", "torch", 100.0)]


@pytest.mark.parametrize("as_array", [False, True], ids=["lines", "array"])
def test_rows_are_read_as_they_were_written(tmp_path, as_array):
    assert read_rows(write(tmp_path / "a.json", A, as_array=as_array)) == A


def test_last_of_two_rows_with_one_key_counts(tmp_path):
    path = write(tmp_path / "a.json", [*A, row("read", None, None, 12.0)])
    assert [each.ms for each in read_rows(path)] == [12.0, 300.0]


def test_pairs_have_both_times_and_what_only_one_has_is_marked():
    assert compare(A, B) == [
        pair("read", None, None, 10.0, None, None, "A"),
        pair("tower", "float32", "eager", 300.0, 200.0, 1.5, None),
        pair("tower", "bfloat16", "torch", None, 100.0, None, "B"),
    ]


def pair(stage, dtype, frontend, a_ms, b_ms, ratio, only_in):
    return {
        "stage": stage,
        "dtype": dtype,
        "frontend": frontend,
        "a_ms": a_ms,
        "b_ms": b_ms,
        "ratio": ratio,
        "only_in": only_in,
    }


def test_command_prints_pairs_as_data_and_a_difference_for_people(said, tmp_path):
    other = [row("tower", "float32", "eager", 200.0, cpu="slow")]
    a, b = write(tmp_path / "a.json", A), write(tmp_path / "b.json", other)
    code, out, err = said("--compare", a, b)
    assert code == 0
    assert [json.loads(line)["ratio"] for line in out.splitlines()] == [None, 1.5]
    assert err == f"vla2: cpu differs: fast in '{a}', slow in '{b}'\n"


def test_difference_of_versions_names_only_those_that_differ():
    other = [row("tower", "float32", "eager", 1.0, versions={"torch": "9", "vla2": "2"})]
    [line] = differences(A, other, (Path("a"), Path("b")))
    assert line == "versions differs: torch 1 in 'a', torch 9 in 'b'"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"[]", "it is empty"),
        (b"stage,ms\n", "Expecting value"),
        (b'{"id": "a.mp4", "text": "A dog."}\n', "object 1 has no 'stage'"),
        (b"[1, 2]", "object 1 has no 'stage'"),
        (b"7\n", "object 1 has no 'stage'"),
        (b"\x89PNG\xff", "it is no text"),
    ],
    ids=["empty", "no rows", "csv", "ledger", "numbers", "number", "picture"],
)
def test_file_of_another_kind_is_one_line_and_exit_2(said, tmp_path, content, reason):
    (tmp_path / "b.json").write_bytes(content)
    a = write(tmp_path / "a.json", A)
    code, out, err = said("--compare", a, tmp_path / "b.json")
    assert (code, out) == (2, "")
    assert "is not what vla2 bench --json writes" in err
    assert reason in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("ms", [0, -1.0, None, "1", True, float("nan")])
def test_time_that_is_none_is_refused(tmp_path, ms):
    with pytest.raises(UsageError, match="for a time"):
        read_rows(write(tmp_path / "a.json", [row("read", None, None, ms)]))


def test_absent_file_is_one_line_and_exit_2(said, tmp_path):
    code, _, err = said("--compare", write(tmp_path / "a.json", A), tmp_path / "no.json")
    assert code == 2
    assert "no.json': no such file or directory" in err
