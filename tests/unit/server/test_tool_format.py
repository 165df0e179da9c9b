"""An answer's text is divided into what is said and what is called, however it is cut into pieces."""

import itertools

import pytest

from server.tool_format import ArgumentsCame, CallBegun, CallReader, Piece, Said, write_call

FIRST = write_call("find", {"what": 'a "quoted" }\n', "n": {"m": [1]}})
SECOND = write_call("stop", {})

CASES: list[tuple[str, list[Piece]]] = [
    ("", []),
    ("Hello there. ", [Said("Hello there. ")]),
    ("\n\nHello", [Said("Hello")]),
    ("2 < 3 <tool 4 <", [Said("2 < 3 <tool 4 <")]),
    (FIRST, [CallBegun("find"), ArgumentsCame('{"what": "a \\"quoted\\" }\\n", "n": {"m": [1]}}')]),
    (f"Let me see.\n{SECOND}", [Said("Let me see."), CallBegun("stop"), ArgumentsCame("{}")]),
    (
        f"{SECOND}\n{FIRST}",
        [
            *(CallBegun("stop"), ArgumentsCame("{}"), CallBegun("find")),
            ArgumentsCame('{"what": "a \\"quoted\\" }\\n", "n": {"m": [1]}}'),
        ],
    ),
    # Cut by the token limit: arguments so far are told, half a frame is not.
    (FIRST[:60], [CallBegun("find"), ArgumentsCame('{"what": "a \\"quot')]),
    (SECOND[: -len("\n</tool_call>")], [CallBegun("stop"), ArgumentsCame("{}")]),
    (SECOND[:-1], [CallBegun("stop"), ArgumentsCame("{}")]),
    ("Well. " + FIRST[:25], [Said("Well.")]),
    (FIRST[:15], []),
    ("Well.\n<tool_call>", [Said("Well.")]),
    # JSON is an answer of its own: what looks like a mark within it belongs to it.
    ('{"a": "<tool_call>', [Said('{"a": "<tool_call>')]),
    ('["so <tool_call>', [Said('["so <tool_call>')]),
    ('"<tool_call>', [Said('"<tool_call>')]),
]


def joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one kind as one piece."""
    whole: list[Piece] = []
    for kind, group in itertools.groupby(pieces, type):
        if kind is CallBegun:
            whole += group
        else:
            whole.append(kind("".join(piece.text for piece in group if not isinstance(piece, CallBegun))))
    return whole


@pytest.mark.parametrize(("text", "pieces"), CASES)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 1000])
def test_pieces_do_not_depend_on_how_the_text_comes(text: str, pieces: list[Piece], length: int) -> None:
    reader = CallReader()
    found = [piece for start in range(0, len(text), length) for piece in reader.push(text[start : start + length])]
    found += reader.finish()
    assert all(isinstance(piece, CallBegun) or piece.text for piece in found)
    assert joined(found) == pieces


def test_nothing_is_held_back_longer_than_it_must_be() -> None:
    reader = CallReader()
    assert reader.push("Hello") == [Said("Hello")]
    assert reader.push(" <tool") == []
    assert reader.push("box>") == [Said(" <toolbox>")]
    assert reader.push(FIRST[: FIRST.index("find") + 4]) == []
    assert reader.push('", "arguments": {"what"') == [CallBegun("find"), ArgumentsCame('{"what"')]
    assert reader.push(": {}") == [ArgumentsCame(": {")]
    assert reader.push("}") == [ArgumentsCame("}")]
    assert reader.push("\n</tool_") == []
    assert reader.push("call>") == []
