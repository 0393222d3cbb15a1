"""What a run says of its records while they come, in whatever order they do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from vla2cli.console import print_text
from vla2cli.inputs import encode_name
from vla2cli.ledger import Record
from vla2cli.plan import Work

Turn = tuple[str, ...]  # a question and those before it, from the first on


class Plain:
    """Prints the texts about one file, in the order of its questions."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._left: list[Turn] = [
            talk[: turn + 1]
            for work in works
            for talk in work.conversations
            for turn in range(len(talk))
        ]
        self._held: dict[Turn, Record] = {}

    def __call__(self, record: Record) -> None:
        """Take the next record; print what is no longer waited for."""
        before = (turn["question"] for turn in record.get("history") or ())
        self._held[*before, record["question"]] = record
        while self._left and self._left[0] in self._held:
            self._print(self._left.pop(0))

    def rest(self) -> None:
        """Print what waits for others that do not come."""
        for turn in self._left:
            if turn in self._held:
                self._print(turn)

    def _print(self, turn: Turn) -> None:
        record = self._held.pop(turn)
        if record.get("error") is None:
            print_text(record["text"])


class Failures:
    """What went wrong with each file, to be said once, when no record of it is to come."""

    def __init__(self, works: Sequence[Work]) -> None:
        self.left: Counter[str] = Counter()  # path as in records -> records to come
        for work in works:
            self.left[encode_name(work.item.path)] += work.num_records
        self.found: dict[str, Counter[str]] = {}  # path -> message -> records

    def take(self, record: Record) -> Iterator[tuple[str, int]]:
        """Take the next record; yield what is to be said, and of how many records."""
        path = record["path"]
        self.left[path] -= 1
        if record.get("error") is not None:
            self.found.setdefault(path, Counter())[record["error"]["message"]] += 1
        if not self.left[path]:
            del self.left[path]
            yield from self._say(path)

    def rest(self) -> Iterator[tuple[str, int]]:
        """Yield what is still to be said."""
        for path in list(self.found):
            yield from self._say(path)

    def _say(self, path: str) -> Iterator[tuple[str, int]]:
        for message, number in self.found.pop(path, Counter()).items():
            yield f"{path}: {message}", number
