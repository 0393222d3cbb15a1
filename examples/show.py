"""Print a ledger's captions beside the true ones: `python examples/show.py LEDGER`."""

import json
import sys
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def main(ledger: Path, truths: dict[str, str]) -> None:
    """Print two lines for each clip, the truth and the caption, and how many are the same."""
    captions = read_captions(ledger)
    num_true = 0
    for name, truth in truths.items():
        record = captions.get(name, {})
        said = record["error"]["message"] if "error" in record else record.get("text", "(none)")
        seconds = sum((record.get("timings_s") or {}).values())
        is_true = said == truth
        num_true += is_true
        print(f"{name}    truth    {truth}")  # noqa: T201
        print(f"{seconds:5.2f} s  {'=' if is_true else 'x'} caption  {said}")  # noqa: T201
    print(f"{num_true} of {len(truths)} captions are exactly true")  # noqa: T201


def read_captions(ledger: Path) -> dict[str, Record]:
    """Read a ledger; the last record of a file counts."""
    lines = ledger.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return {record["id"]: record for record in records if record["task"] == "caption"}


if __name__ == "__main__":
    facts = Path(__file__).parent / "captions.json"
    main(Path(sys.argv[1]), json.loads(facts.read_text(encoding="utf-8")))
