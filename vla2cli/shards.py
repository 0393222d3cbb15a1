"""One part of the items for each of several processes, which need not know of each other.

`--shard 2/4` does the second of four parts. In which part an item is, follows from its id and the
number of parts alone: not from what else is found, nor from order or machine.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from vla2cli.errors import UsageError
from vla2cli.inputs import Item


def shard_of(id_: str, num_shards: int) -> int:
    """Return the part that an item is in, from 1 to `num_shards`.

    The first 8 bytes of the SHA-256 of the id's UTF-8, read as a number with the highest byte
    first, modulo `num_shards`, plus 1.
    """
    digest = hashlib.sha256(id_.encode()).digest()
    return int.from_bytes(digest[:8], "big") % num_shards + 1


@dataclass(frozen=True)
class Shard:
    """One of several parts."""

    number: int  # from 1
    num_shards: int

    def __str__(self) -> str:
        return f"{self.number}/{self.num_shards}"

    def select(self, items: Iterable[Item]) -> list[Item]:
        """Keep the items that are in this part."""
        return [item for item in items if shard_of(item.id, self.num_shards) == self.number]


def parse_shard(text: str) -> Shard:
    """Read `2/4`: the second of four parts.

    Raises:
        UsageError: it is no such part.
    """
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    shard = Shard(*map(int, found.groups())) if found else None
    if shard is None or not 1 <= shard.number <= shard.num_shards:
        raise UsageError(f"'--shard {text}': expected I/N with I from 1 to N, like 2/4")
    return shard
