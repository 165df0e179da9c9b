"""Losses are there after a kill, batch by batch, and a damaged file is named."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from training.data.examples import Example
from training.discovery.combinations import all_combinations
from training.discovery.loss_cache import LossKey, LossKeys, open_loss_cache
from training.discovery.row_loss import RowLoss
from training.errors import DiscoveryInvalid

BATCH_ROWS = 50
BASE = ("tiny@1+2", "nf4-dense", "torch.float32")
DIGESTS = {"chat": ("c1",), "math": ("m1", "m2"), "code": ("k1",)}


def key(number: int) -> LossKey:
    return number.to_bytes(32)


def fill(path: Path, count: int) -> None:
    with open_loss_cache(path) as cache:
        cache.put({key(number): RowLoss(number / 3, number + 1) for number in range(count)})


def test_what_was_put_is_there_when_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "losses.sqlite"
    fill(path, 1200)
    with open_loss_cache(path) as cache:
        found = cache.get([key(number) for number in range(0, 2400, 2)])
        assert found == {key(number): RowLoss(number / 3, number + 1) for number in range(0, 1200, 2)}
        assert cache.get([]) == {}


def test_a_key_has_the_loss_that_was_put_last(tmp_path: Path) -> None:
    with open_loss_cache(tmp_path / "losses.sqlite") as cache:
        cache.put({key(1): RowLoss(1.0, 2)})
        cache.put({key(1): RowLoss(3.0, 2), key(2): RowLoss(4.0, 2)})
        assert cache.get([key(1), key(2)]) == {key(1): RowLoss(3.0, 2), key(2): RowLoss(4.0, 2)}


def keys_of(digests: Mapping[str, Sequence[str]], base: Sequence[str] = BASE) -> dict[frozenset[str], LossKey]:
    """The key of every combination for one example."""
    keys = LossKeys(base, digests)
    return {tried: keys.key(Example((1, 2, 3), 1), tried) for tried in all_combinations(tuple(DIGESTS))}


def test_a_changed_stack_changes_the_keys_of_the_combinations_that_contain_it_and_no_others() -> None:
    before, after = keys_of(DIGESTS), keys_of(DIGESTS | {"math": ("m1", "m3")})
    assert {tried for tried in before if before[tried] != after[tried]} == {
        tried for tried in before if "math" in tried
    }
    assert len(set(before.values())) == 8


def test_a_key_knows_base_tokens_prompt_length_and_rounds_order_but_no_names() -> None:
    before = keys_of(DIGESTS)
    assert set(before.values()).isdisjoint(keys_of(DIGESTS, (*BASE[:2], "torch.bfloat16")).values())
    swapped = keys_of({"chat": ("k1",), "math": ("m1", "m2"), "code": ("c1",)})
    assert swapped[frozenset({"chat"})] == before[frozenset({"code"})]
    assert swapped[frozenset({"chat", "code"})] == before[frozenset({"chat", "code"})]
    assert keys_of(DIGESTS | {"math": ("m2", "m1")})[frozenset({"math"})] != before[frozenset({"math"})]
    keys, alone = LossKeys(BASE, DIGESTS), frozenset({"chat"})
    three = {keys.key(Example(ids, length), alone) for ids, length in [((1, 2, 3), 1), ((1, 2, 3), 2), ((1, 2, 4), 1)]}
    assert len(three) == 3


def test_after_a_kill_every_batch_is_there_or_none_of_it(tmp_path: Path) -> None:
    path = tmp_path / "losses.sqlite"
    program = (
        "import sys; from pathlib import Path; from itertools import count\n"
        "from training.discovery.loss_cache import open_loss_cache\n"
        "from training.discovery.row_loss import RowLoss\n"
        "with open_loss_cache(Path(sys.argv[1])) as cache:\n"
        "    for batch in count():\n"
        f"        rows = range({BATCH_ROWS} * batch, {BATCH_ROWS} * (batch + 1))\n"
        "        cache.put({number.to_bytes(32): RowLoss(0.5, 1) for number in rows})\n"
        "        print(batch, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        done = next(int(line) for line in process.stdout if int(line) == 3)
        os.kill(process.pid, signal.SIGKILL)
    with open_loss_cache(path) as cache:
        found = cache.get([key(number) for number in range(BATCH_ROWS * 500)])
    batches = len(found) // BATCH_ROWS
    assert len(found) == batches * BATCH_ROWS
    assert batches > done


@pytest.mark.parametrize("damage", ["foreign", "cut off", "overwritten"])
def test_a_damaged_file_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "losses.sqlite"
    fill(path, 2000)
    content = path.read_bytes()
    middle = len(content) // 2
    damaged = {
        "foreign": b"no database" * 100,
        "cut off": content[:middle],
        "overwritten": content[:middle] + b"\xff" * 4096 + content[middle + 4096 :],
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(DiscoveryInvalid, match=str(path)), open_loss_cache(path):
        pass


def test_a_file_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "losses.sqlite"
    fill(path, 1)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(DiscoveryInvalid, match=rf"{path}: version 7 .* knows 1"), open_loss_cache(path):
        pass


def test_a_folder_in_the_files_place_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DiscoveryInvalid, match=str(tmp_path)), open_loss_cache(tmp_path):
        pass
