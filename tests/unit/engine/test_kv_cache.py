"""Blocks are held exactly as often as they are counted, found by what they hold, and never lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.block_table import BLOCK_TOKENS, BlockTable, Piece, num_blocks_for
from engine.kv_cache import KvCache, block_key, root_key

ROOT = root_key(())
KEYS = [bytes([number]) for number in range(6)]

Histories = st.lists(st.tuples(st.sampled_from(["take", "grow", "release"]), st.integers(0, 9)), max_size=60)


@given(Histories)
def test_any_history_holds_what_is_counted_and_gives_everything_back(history: list[tuple[str, int]]) -> None:
    cache, held = KvCache(8), list[list[int]]()
    for action, number in history:
        if action == "take":
            known = cache.find(KEYS[: number % 4])
            blocks = cache.take(known, number % 5, spare=number % 2)
            if blocks:
                assert blocks[: len(known)] == known
                held.append(blocks)
                for block, key in zip(blocks, KEYS, strict=False):
                    cache.name(block, key)
        elif held and action == "grow":
            of_one = held[number % len(held)]
            before = cache.num_free
            grown = cache.take_behind(of_one[-1])
            assert (grown is None) == (before == 0)
            of_one += [] if grown is None else [grown]
        elif held:
            cache.release(held.pop(number % len(held)))
        cache.check_integrity(held)
        assert cache.num_free == 8 - len({block for blocks in held for block in blocks})
    for blocks in held:
        cache.release(blocks)
    assert cache.num_free == 8
    assert cache.take([], 8) is not None


def test_a_block_is_shared_and_free_when_the_last_holder_lets_go() -> None:
    cache = KvCache(4)
    first = cache.take([], 2)
    assert first == [0, 1]
    cache.name(0, KEYS[0])
    second = cache.take(cache.find(KEYS), 1)
    assert second == [0, 2]
    assert cache.num_free == 1
    cache.release(first)
    assert cache.num_free == 2
    cache.release(second)
    assert cache.num_free == 4
    assert cache.find(KEYS) == [0]  # nobody holds it, and it is still there


def test_what_is_known_is_given_up_last_and_its_end_before_its_beginning() -> None:
    cache = KvCache(4)
    for keys in (KEYS[:1], KEYS[1:3]):
        blocks = cache.take([], len(keys))
        assert blocks is not None
        for block, key in zip(blocks, keys, strict=True):
            cache.name(block, key)
        cache.release(blocks)
    taken = cache.take([], 1)
    assert taken is not None
    assert all(cache.find([key]) for key in KEYS[:3])  # one block was known for nothing
    assert cache.take_behind(taken[-1]) is not None
    assert [bool(cache.find([key])) for key in KEYS[:3]] == [False, True, True]  # the least recently used
    assert cache.take_behind(taken[-1]) is not None
    assert [bool(cache.find([key])) for key in KEYS[1:3]] == [True, False]


def test_what_lay_in_one_piece_does_so_again() -> None:
    cache = KvCache(8)
    first, second = cache.take([], 4), cache.take([], 4)
    assert first is not None
    assert second is not None
    for blocks in (second, first):
        for block in blocks:
            cache.name(block, bytes([block]))
        cache.release(blocks)
    taken = cache.take([], 3)
    assert taken == second[1:]  # its beginning is still known
    assert cache.find([bytes([second[0]])]) == [second[0]]


def test_known_blocks_that_are_wanted_do_not_count_as_room() -> None:
    cache = KvCache(3)
    blocks = cache.take([], 2)
    assert blocks is not None
    cache.name(blocks[0], KEYS[0])
    cache.release(blocks)
    known = cache.find(KEYS)
    assert cache.take(known, 3) is None
    assert cache.take(known, 2, spare=1) is None
    assert cache.num_free == 3
    assert cache.take(known, 2) is not None


def test_the_first_block_of_a_key_stays_the_one_that_is_found() -> None:
    cache = KvCache(3)
    blocks = cache.take([], 2)
    assert blocks is not None
    for block in blocks:
        cache.name(block, KEYS[0])
    cache.check_integrity([blocks])
    assert cache.find(KEYS) == [blocks[0]]


def test_a_block_that_nobody_holds_is_not_released() -> None:
    cache = KvCache(2)
    blocks = cache.take([], 1)
    assert blocks is not None
    cache.release(blocks)
    with pytest.raises(AssertionError):
        cache.release(blocks)


def test_an_empty_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="0"):
        KvCache(0)


def test_keys_tell_tokens_and_mixes_apart() -> None:
    mixes = [
        (),
        (("math", "v1", 1.0),),
        (("math", "v1", 0.9),),
        (("math", "v2", 1.0),),
        (("chat", "v1", 0.2), ("math", "v1", 1.0)),
    ]
    roots = [root_key(mix) for mix in mixes]
    tokens = list(range(BLOCK_TOKENS))
    keys = [block_key(root, tokens) for root in roots]
    keys += [block_key(roots[0], [1, *tokens[1:]]), block_key(keys[0], tokens)]
    assert len(set(keys)) == len(keys)
    assert block_key(root_key(()), tokens) == keys[0]


def test_blocks_behind_each_other_are_one_piece() -> None:
    table = BlockTable.of([3, 4, 1])
    table.extend([2, 7])
    assert table.pieces == [
        Piece(3 * BLOCK_TOKENS, 2 * BLOCK_TOKENS),
        Piece(BLOCK_TOKENS, 2 * BLOCK_TOKENS),
        Piece(7 * BLOCK_TOKENS, BLOCK_TOKENS),
    ]
    assert table.num_positions == 5 * BLOCK_TOKENS
    flat = [piece.start + offset for piece in table.pieces for offset in range(piece.length)]
    assert [table.place(position) for position in range(table.num_positions)] == flat


@pytest.mark.parametrize(("positions", "blocks"), [(0, 0), (1, 1), (BLOCK_TOKENS, 1), (BLOCK_TOKENS + 1, 2)])
def test_blocks_for_positions(positions: int, blocks: int) -> None:
    assert num_blocks_for(positions) == blocks
