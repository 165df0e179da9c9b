"""Where the keys and values of one sequence lie in the cache."""

from collections.abc import Iterable
from dataclasses import dataclass, field

BLOCK_TOKENS = 16


@dataclass(slots=True)
class Piece:
    """Positions of the cache that lie behind each other, for as many positions of a sequence."""

    start: int
    length: int


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence, in order, and the pieces of the cache that they are."""

    blocks: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)

    @classmethod
    def of(cls, blocks: Iterable[int]) -> "BlockTable":
        """The table of a sequence that lies in these blocks."""
        table = cls()
        table.extend(blocks)
        return table

    def extend(self, blocks: Iterable[int]) -> None:
        """The sequence goes on in these blocks."""
        for block in blocks:
            start = block * BLOCK_TOKENS
            if self.pieces and self.pieces[-1].start + self.pieces[-1].length == start:
                self.pieces[-1].length += BLOCK_TOKENS
            else:
                self.pieces.append(Piece(start, BLOCK_TOKENS))
            self.blocks.append(block)

    @property
    def num_positions(self) -> int:
        """Positions of the sequence that there is room for."""
        return len(self.blocks) * BLOCK_TOKENS

    def place(self, position: int) -> int:
        """Where in the cache a position of the sequence lies."""
        return self.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS


def num_blocks_for(num_positions: int) -> int:
    """How many blocks hold so many positions."""
    return -(-num_positions // BLOCK_TOKENS)
