"""Whole lines, prefixes, the bound and the tail, as values in and values out."""

from __future__ import annotations

import itertools
import re
import time

import pytest

from rankwise.logs.lines import LONGEST_LINE, TAIL, Raw, Relay, Splitter, Tail, prefix


def lines_of(text: bytes) -> bytes:
    """What a Splitter promises, said in another way: line by line, by an expression."""
    out = b""
    for line, end in re.findall(rb"([^\r\n]*)(\r*\n|\r+|\Z)", text):
        lone_cr = b"\n" not in end
        if line or not lone_cr:
            out += line + b"\n"
    return out


@pytest.mark.parametrize("length", range(7))
def test_the_lines_do_not_depend_on_how_the_stream_is_cut(length: int) -> None:
    for letters in itertools.product((b"a", b"\r", b"\n"), repeat=length):
        text = b"".join(letters)
        for cuts in itertools.product((False, True), repeat=max(0, length - 1)):
            splitter, out, piece = Splitter(), b"", b""
            for i in range(length):
                piece += text[i : i + 1]
                if i == length - 1 or cuts[i]:
                    out += splitter.feed(piece)
                    piece = b""
            assert out + splitter.end() == lines_of(text), (text, cuts)


def test_a_partial_line_is_held_until_its_end() -> None:
    splitter = Splitter()
    assert splitter.feed(b"one\ntw") == b"one\n"
    assert splitter.feed(b"") == b""
    assert splitter.feed(b"o") == b""
    assert splitter.feed(b"\nthree") == b"two\n"
    assert splitter.end() == b"three\n"
    assert splitter.end() == b""


def test_each_step_of_a_progress_bar_is_a_line_as_soon_as_the_next_begins() -> None:
    splitter = Splitter()
    assert splitter.feed(b"\r 10%") == b""
    assert splitter.feed(b"\r 20%") == b" 10%\n"
    assert splitter.feed(b"\r 30%\n") == b" 20%\n 30%\n"
    assert splitter.feed(b" 40%\r") == b" 40%\n"


def test_a_line_of_10_mb_survives_whole_and_in_linear_time() -> None:
    splitter, relay = Splitter(), Relay("g")
    started = time.process_time()
    for _ in range(10 << 10):
        assert splitter.feed(b"x" * 1024) == b""
    line = splitter.feed(b"\n")
    assert line == b"x" * (10 << 20) + b"\n"
    assert relay.offer(line, b"p ") == [b"p " + line]
    assert time.process_time() - started < 1.0


def test_a_line_without_end_is_cut_and_memory_stays_bounded() -> None:
    splitter, relay, shown = Splitter(), Relay("g"), 0
    for _ in range(40):  # MB
        line = splitter.feed(b"x" * (1 << 20))
        assert len(line) <= LONGEST_LINE + (1 << 20) + 1
        for piece in relay.offer(line, prefix("g", 0, 1, False)):
            shown += piece.count(b"x")
            relay.acknowledged(len(piece))
    assert shown == 30 << 20


def test_the_prefix_names_group_rank_and_pid() -> None:
    assert prefix("g", 3, 41, False) == b"(g rank=3 pid=41) "
    colored = [prefix("g", rank, 41, True) for rank in range(8)]
    assert colored[3].endswith(b"(g rank=3 pid=41)\x1b[0m ")
    assert len({text[: text.index(b"(")] for text in colored}) == 8


def test_every_line_gets_its_prefix_and_pieces_are_whole_lines() -> None:
    lines = b"".join(b"%06d\n" % i for i in range(50_000)) + b"\n"
    pieces = Relay("g").offer(lines, b"> ")
    assert b"".join(pieces) == b"> " + lines.replace(b"\n", b"\n> ")[:-2]
    assert all(piece.endswith(b"\n") for piece in pieces)
    assert all(len(piece) <= 64 << 10 for piece in pieces)


def test_above_the_limit_whole_lines_are_dropped_counted_and_told() -> None:
    relay = Relay("g", limit=1000)
    line = b"x" * 99 + b"\n"
    sent = [piece for _ in range(25) for piece in relay.offer(line)]
    assert sent == [line] * 10
    assert relay.acknowledged(400) == b""
    assert relay.offer(line) == []
    told = relay.acknowledged(100)
    assert told == b"(g) 16 lines were dropped: the reader of this output is too slow\n"
    assert relay.offer(line) == [line]
    assert relay.acknowledged(500) == b""


def test_a_long_batch_is_sent_as_far_as_it_fits() -> None:
    relay = Relay("g", limit=100_000)
    lines = b"0123456\n" * 25_000
    sent = b"".join(relay.offer(lines))
    assert 0 < len(sent) <= 100_000
    assert lines.startswith(sent)
    assert sent.endswith(b"\n")
    dropped = 25_000 - sent.count(b"\n")
    assert relay.notice().startswith(b"(g) %d lines were dropped" % dropped)
    assert relay.notice() == b""


def test_one_dropped_line_is_told_in_the_singular() -> None:
    relay = Relay("g", limit=10)
    assert relay.offer(b"0123456789abc\n") == []
    assert relay.notice().startswith(b"(g) 1 line was dropped")


def test_inherit_passes_every_byte_by_whole_lines() -> None:
    raw = Raw()
    assert [raw.feed(part) for part in (b"ba", b"re", b"\nnext")] == [b"", b"", b"bare\n"]
    assert raw.feed(b" line\r\n") == b"next line\r\n"
    assert raw.end() == b""


def test_inherit_shows_a_progress_bar_at_each_carriage_return() -> None:
    raw = Raw()
    assert [raw.feed(b"\r 10%"), raw.feed(b"\r 20%")] == [b"\r", b" 10%\r"]
    assert raw.end() == b" 20%"
    assert Relay("g").offer(b" 20%") == [b" 20%"]


def test_inherit_cuts_a_line_that_does_not_end() -> None:
    raw = Raw()
    assert raw.feed(b"x" * LONGEST_LINE) == b""
    assert raw.feed(b"y") == b"x" * LONGEST_LINE + b"y"
    assert raw.end() == b""


def test_the_tail_is_the_last_64_kb_however_it_came() -> None:
    whole = bytes(range(97, 123)) * 20_000
    for size in (1, 100, 4096, TAIL, TAIL + 1, 1 << 20):
        tail = Tail()
        part = whole[: 300 * size]
        for start in range(0, len(part), size):
            tail.feed(part[start : start + size])
        assert tail.text() == part[-TAIL:].decode()


def test_a_tail_that_begins_inside_a_character_is_still_text() -> None:
    tail = Tail()
    tail.feed("é".encode() * TAIL + b"\xff\n")
    assert tail.text().endswith("é\ufffd\n")
