"""What a run says of its records while they come."""

from types import SimpleNamespace

from vla2cli.show import Failures


def test_failure_is_said_once_with_the_last_record_of_its_file_which_is_then_forgotten():
    works = [
        SimpleNamespace(item=SimpleNamespace(path=path), num_records=number)
        for path, number in (("a.mp4", 2), ("b.mp4", 1))
    ]
    failures = Failures(works)
    bad = {"path": "a.mp4", "error": {"message": "no frame"}}
    assert list(failures.take(bad)) == []
    assert list(failures.take({"path": "b.mp4"})) == []
    assert set(failures.left) == {"a.mp4"}
    assert list(failures.take(bad)) == [("a.mp4: no frame", 2)]
    assert not failures.left
    assert not failures.found
    assert list(failures.rest()) == []
