"""Print what a ledger says, one file after the other: `python examples/show.py LEDGER`."""

import json
import sys
from pathlib import Path

for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
    record = json.loads(line)
    said = record["error"]["message"] if "error" in record else record["text"]
    seconds = sum((record["timings_s"] or {}).values())
    print(f"{record['id']:8} {seconds:5.2f} s  {said}")  # noqa: T201
