"""Text of others does not steer the terminal."""

from __future__ import annotations

import sys
import unicodedata

from lm_envs.printable import printable


def test_controls_of_the_terminal_and_of_direction_are_escaped():
    assert printable("a\x1b[31mb\x9b31m\x07\r\x7f") == "a\\x1b[31mb\\x9b31m\\x07\\r\\x7f"
    assert printable("x\u202e\u2066y\u2029\ud800") == "x\\u202e\\u2066y\\u2029\\ud800"
    assert printable("tab\tand\nnewline, später, 你好, नमस्ते, 👩‍🔬") == "tab\tand\nnewline, später, 你好, नमस्ते, 👩‍🔬"


def test_no_control_character_is_left_of_all_there_are():
    bidirectional = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        if printable(char) == char and char not in "\t\n":
            assert unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp")
            assert unicodedata.bidirectional(char) not in bidirectional
