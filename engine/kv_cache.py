"""Decides which blocks of the KV cache hold whose keys and values. Knows blocks, not tensors; the runner owns memory.

A sequence holds a block for every BLOCK_TOKENS of its positions. Full blocks can be shared: keys and values depend on
the tokens up to them and on the mix alone, so a block is known by a digest of all of that, and a sequence that begins
as another did holds the same blocks. Blocks that nobody holds keep what they are known for until they are needed, the
least recently used first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

BlockKey = bytes
MixKey = tuple[tuple[str, str, float], ...]  # name, version and weight of each domain, sorted


def root_key(mix: MixKey) -> BlockKey:
    """What the key of a sequence's first block is made from."""
    return hashlib.sha256(repr(mix).encode()).digest()


def block_key(before: BlockKey, token_ids: Sequence[int]) -> BlockKey:
    """The key of a full block behind the one with the key `before`."""
    return hashlib.sha256(before + np.array(token_ids, np.int64).tobytes()).digest()


class KvCache:
    """Counts who holds each block, and finds blocks by what they hold."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be positive, got {num_blocks}")
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks
        self._keys: list[BlockKey | None] = [None] * num_blocks
        self._by_key: dict[BlockKey, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # the next to be used first

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, whatever they are known for."""
        return len(self._free)

    def find(self, keys: Iterable[BlockKey]) -> list[int]:
        """The blocks known by these keys, up to the first key that is not known."""
        found: list[int] = []
        for key in keys:
            if (block := self._by_key.get(key)) is None:
                break
            found.append(block)
        return found

    def take(self, known: Sequence[int], num_new: int, *, spare: int = 0) -> list[int] | None:
        """Holds blocks that were found and new ones behind them: all blocks, in order.

        None, and nothing is held, unless `spare` blocks would be left free.
        """
        if num_new + spare > self.num_free - sum(block in self._free for block in known):
            return None
        for block in known:
            self._free.pop(block, None)
            self._holders[block] += 1
        # What lies in one piece is read faster, and is given back from its end: in order, it is one piece again.
        return [*known, *sorted(self._take_next() for _ in range(num_new))]

    def take_behind(self, block: int) -> int | None:
        """Holds one more block for a sequence that ends with `block`, or None. The next one, if it knows nothing."""
        if not self._free:
            return None
        behind = block + 1
        if behind in self._free and self._keys[behind] is None:
            self._free.move_to_end(behind, last=False)
        return self._take_next()

    def name(self, block: int, key: BlockKey) -> None:
        """From now on a held block can be found, unless another is known by the same key."""
        assert self._holders[block], block
        if key not in self._by_key:
            self._keys[block] = key
            self._by_key[key] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Lets go of a sequence's blocks. To release a block that is not held is an error of ours."""
        for block in reversed(blocks):  # a sequence's end is worth less than its beginning, which others may share
            assert self._holders[block], block
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None
                if self._keys[block] is None:
                    self._free.move_to_end(block, last=False)

    def _take_next(self) -> int:
        """Holds the free block that is to be used next; what it was known for is forgotten."""
        block, _ = self._free.popitem(last=False)
        if (key := self._keys[block]) is not None:
            self._keys[block] = None
            del self._by_key[key]
        self._holders[block] = 1
        return block

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Asserts that exactly these sequences' blocks are held, and that what is known is known once."""
        holders = [0] * self.num_blocks
        for blocks in held:
            for block in blocks:
                holders[block] += 1
        assert holders == self._holders, "blocks are held by nobody, or by more than are counted"
        assert set(self._free) == {block for block, count in enumerate(holders) if not count}
        assert self._by_key == {key: block for block, key in enumerate(self._keys) if key is not None}
