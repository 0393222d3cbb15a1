"""A ledger and a manifest -> how many answers of each kind are exactly right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla2cli.errors import LedgerError, UsageError, why
from vla2cli.ledger import Record, Segment, key_of, read_records
from vla2cli.manifest import read_lines
from vla2cli.world.write import CHOICE

_TASKS = ("ask", "caption")  # whose records hold an answer
_Asked = tuple[str, str, Segment | None]  # id, question and part of the file


@dataclass(frozen=True)
class Expected:
    """One line of a manifest."""

    id: str
    question: str
    answer: str
    kind: str
    segment: Segment | None = None

    @property
    def asked(self) -> _Asked:
        """What its record in the ledger is found by."""
        return self.id, self.question, self.segment


@dataclass
class Row:
    """What became of the questions of one kind."""

    kind: str
    num: int = 0  # lines of the manifest
    right: int = 0
    missing: list[Expected] = field(default_factory=list)
    errors: list[Expected] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Return how many are right, where what is missing or failed is not."""
        return self.right / self.num

    def as_record(self) -> dict[str, Any]:
        """Return it as it is printed."""
        return {
            "kind": self.kind,
            "num": self.num,
            "right": self.right,
            "share": round(self.share, 4),
            "missing": len(self.missing),
            "errors": len(self.errors),
        }


def score(ledger: Path, manifest: Path) -> list[Row]:
    """Compare the answers in a ledger with a manifest; right is what is equal, but for its ends.

    Args:
        ledger: JSON Lines of `vla2 ask` or `vla2 caption`; the last record of a question counts.
        manifest: see `vla2cli.manifest`; each line with `question`, `answer` and `kind`.

    Returns:
        A row for each kind, in the order of the manifest.

    Raises:
        UsageError: the manifest cannot be read, holds nothing, or has a line that is not one.
        LedgerError: the ledger cannot be read, or has no record in its lines.
    """
    wanted = list(read_manifest(manifest))
    if not wanted:
        raise UsageError(f"'{manifest}' is empty; expected a question with its answer in each line")
    answers = _read_answers(ledger)
    rows: dict[str, Row] = {}
    for expected in wanted:
        row = rows.setdefault(expected.kind, Row(expected.kind))
        row.num += 1
        record = answers.get(expected.asked)
        if record is None:
            row.missing.append(expected)
        elif record.get("error") is not None:
            row.errors.append(expected)
        else:
            row.right += _said(record, expected.kind) == expected.answer.strip()
    return list(rows.values())


def read_manifest(path: Path) -> Iterator[Expected]:
    """Read what is asked and the right answers.

    Raises:
        UsageError: the file cannot be read, or a line is not one of a manifest.
    """
    try:
        with path.open("rb") as file:
            for line in read_lines(file, str(path)):
                question, answer, kind = map(line.text, ("question", "answer", "kind"))
                segment = None if line.range_s == (None, None) else line.range_s
                yield Expected(line.id, question, answer, kind, segment)
    except OSError as error:
        raise UsageError(f"cannot read '{path}': {why(error)}") from error


def format_table(rows: Sequence[Row]) -> str:
    """Lay rows out for people."""
    width = max(len("kind"), *(len(row.kind) for row in rows))
    head = f"{'kind':{width}}  {'num':>6}  {'right':>6}  {'share':>7}  missing  errors"
    lines = [
        f"{row.kind:{width}}  {row.num:6}  {row.right:6}  {row.share:7.1%}"
        f"  {len(row.missing):7}  {len(row.errors):6}"
        for row in rows
    ]
    return "\n".join([head, *lines])


def _read_answers(ledger: Path) -> dict[_Asked, Record]:
    answers: dict[_Asked, Record] = {}
    lines = [record for _, record, _ in read_records(ledger)]
    records = [record for record in lines if record is not None]
    if lines and not records:
        raise LedgerError(f"'{ledger}' has no record in its lines; expected a ledger of vla2 ask")
    for record in records:
        name, task, question, segment, history = key_of(record)
        # a question that came after others is not what the manifest asks
        if task in _TASKS and not history:
            answers[name, question, segment] = record
    return answers


def _said(record: Record, kind: str) -> str | None:
    source = record.get("choice") if kind == CHOICE else record
    said = source.get("text") if isinstance(source, Mapping) else None
    return said.strip() if isinstance(said, str) else None
