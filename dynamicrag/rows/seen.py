"""The ids that a reader has seen, in little memory: a stage reads each id once and must notice a second one."""

import hashlib
from array import array

FEWEST = 1024


class Seen:
    """Texts, each with a number, in 12 bytes per slot: 18 to 36 bytes per text, whatever its length.

    A text is known by 64 bits of its BLAKE2b digest. Two of a million different texts have the same with a probability
    of 3e-8.
    """

    def __init__(self):
        self._digests, self._numbers = array("Q", bytes(8 * FEWEST)), array("I", bytes(4 * FEWEST))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, text: str, number: int = 0) -> int | None:
        """Add a text with a number below 2**32 and return None; if it was added before, return its number."""
        key = _key(text)
        place = self._place(key)
        if self._digests[place]:
            return self._numbers[place]
        self._digests[place], self._numbers[place] = key, number
        self._count += 1
        if 3 * self._count > 2 * len(self._digests):
            self._grow()
        return None

    def find(self, text: str) -> int | None:
        """Return the number of a text; None if it was not added."""
        place = self._place(_key(text))
        return self._numbers[place] if self._digests[place] else None

    def _place(self, digest: int) -> int:
        """Return the slot of a digest: its own, or the empty one where it belongs."""
        last = len(self._digests) - 1
        place = digest & last
        while self._digests[place] not in (0, digest):
            place = (place + 1) & last
        return place

    def _grow(self) -> None:
        before = self._digests, self._numbers
        self._digests, self._numbers = (array(kept.typecode, bytes(2 * kept.itemsize * len(kept))) for kept in before)
        for digest, number in zip(*before, strict=True):
            if digest:
                place = self._place(digest)
                self._digests[place], self._numbers[place] = digest, number


def _key(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") or 1  # 0 is an empty slot
