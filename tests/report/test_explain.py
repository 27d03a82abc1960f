"""Explanations: what they say, and that they survive writing and reading."""

from __future__ import annotations

import dataclasses
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from jaxinfer.report.explain import (
    Candidate,
    Choice,
    Explanation,
    Program,
    RuleCount,
    Speedup,
    Verification,
    Weights,
)

IDLE = tuple(RuleCount(f"idle-rule-{n:02}", "bitwise") for n in range(60))
FULL = Explanation(
    function="predict",
    signature="params: 314 arrays, x: f32[1,224,224,3]",
    verdict="optimized",
    reason="4.9 times faster",
    backend="cpu",
    numerics="reassociate",
    tune="auto",
    rules=(
        *IDLE,
        RuleCount("fold-batch-norm", "reassociate", fired=52),
        RuleCount("depthwise-shifted", "reassociate", offered=17, chosen=15),
        RuleCount("winograd", "reassociate", declined_reason="stride 2 [/bold] at <both> sites"),
    ),
    choices=(
        Choice(
            "conv 1x56x56x144 * 3x3x1x144",
            (
                Candidate("convolution", 5.2, 3.1),
                Candidate("shifted multiply-adds", 0.31),
                Candidate("im2col", None, 8.5),
            ),
            "shifted multiply-adds",
            "measured",
            sites=3,
        ),
    ),
    before=Program(1532, 601e6, 120e6, 56.2, 4 << 20, 1.4),
    after=Program(812, 599e6, 80e6, 11.4, 3 << 20, 2.2),
    speedup=Speedup(4.92, 4.7, 5.12),
    verification=Verification(True, "now", None, 2.1e-6, 3.3e-5),
    weights=Weights(157, 13 << 20, 14 << 20, 12 << 20),
    notes=("The budget was not used up.", "[red]not markup[/red] & <b>not HTML</b>"),
)
BARE = Explanation("f", "f32[3]", "original", "it has effects and never runs twice")


@pytest.mark.parametrize("explanation", [FULL, BARE], ids=["full", "bare"])
@pytest.mark.parametrize("width", [60, 100, 140])
def test_text_is_bounded_and_plain(explanation, width):
    text = explanation.to_text(width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text and "None" not in text and "nan" not in text


def test_text_says_what_was_done(monkeypatch):
    # Colours asked for in the environment belong to terminals, not to a string.
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    text = FULL.to_text(width=140)
    for words in (
        "predict(params: 314 arrays, x: f32[1,224,224,3])",
        "the optimized form runs: 4.9 times faster",
        "yes, in this call",
        "2.10e-06 absolute, 3.30e-05 relative",
        "speedup 4.920, 95 % bounds 4.700 to 5.120",
        "conv 1x56x56x144 * 3x3x1x144 (3 sites)",
        "→ shifted multiply-adds",
        "56.2 ms",
        "−47 %",
        "157, 13 MiB",
        "26 MiB",
        "stride 2 [/bold] at <both> sites",
        "[red]not markup[/red] & <b>not HTML</b>",
        "Rules that never fired: 60 of 63",
    ):
        assert words in text, words
    assert "\x1b" not in text


def test_fired_rules_come_first_and_idle_ones_are_compact():
    lines = str(FULL).splitlines()
    where = {name: next(i for i, line in enumerate(lines) if name in line) for name in ("fold-batch-norm",)}
    for name in ("depthwise-shifted", "winograd", "idle-rule-00"):
        where[name] = next(i for i, line in enumerate(lines) if name in line)
    assert list(where.values()) == sorted(where.values())
    idle_lines = [line for line in lines if "idle-rule" in line]
    assert len(idle_lines) < 15
    assert all(any(rule.name in line for line in idle_lines) for rule in IDLE)


def test_the_form_taken_is_shown_first_then_the_fastest():
    lines = str(FULL).splitlines()
    first = next(i for i, line in enumerate(lines) if "→" in line)
    assert "shifted" in lines[first] and "measured" in lines[first]
    assert "convolution" in lines[first + 1] and "im2col" in lines[first + 2]


@pytest.mark.parametrize(
    ("verification", "words"),
    [
        (Verification(), "verified   no"),
        (Verification(reason="inside another trace"), "no: inside another trace"),
        (Verification(True, "earlier"), "yes, in an earlier call"),
        (Verification(False, "now", "rule winograd is guilty", 0.5), "failed, in this call: rule winograd"),
    ],
)
def test_verification_is_told(verification, words):
    text = str(dataclasses.replace(BARE, verification=verification))
    assert words in " ".join(text.split()) or words in text


@pytest.mark.parametrize("explanation", [FULL, BARE], ids=["full", "bare"])
def test_json_round_trip(explanation, tmp_path):
    text = explanation.to_json(tmp_path / "e.json")
    assert (tmp_path / "e.json").read_text(encoding="utf-8") == text
    assert Explanation.from_json(text) == explanation
    assert json.loads(text)["verdict"] == explanation.verdict


def test_json_is_strict_about_numbers():
    odd = Verification(False, "now", None, math.inf, math.nan)
    text = dataclasses.replace(BARE, verification=odd).to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = Explanation.from_json(text).verification
    assert again.max_absolute_error == math.inf and math.isnan(again.max_relative_error)
    measured = dataclasses.replace(BARE, speedup=Speedup(np.float32(1.5), np.float64(1.25), None))
    assert Explanation.from_json(measured.to_json()).speedup == Speedup(1.5, 1.25, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "maybe"}, "verdict is 'maybe'; expected one of 'optimized', 'original'"),
        ({"rules": [{"name": "r", "tier": "bitwise", "fired": "x"}]}, r"rules\[0\].fired is 'x'; expected int"),
        ({"colour": 1}, "no field colour"),
        ({"before": 3}, "before is 3; expected dict"),
        ({"rules": [{"name": "r"}]}, r"rules\[0\] is incomplete"),
    ],
)
def test_other_json_is_refused(change, message):
    data = json.loads(BARE.to_json()) | change
    with pytest.raises(ValueError, match=message):
        Explanation.from_json(json.dumps(data))


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="verdict is 'faster'"):
        dataclasses.replace(BARE, verdict="faster")
    with pytest.raises(ValueError, match="is no candidate"):
        Choice("dot", (Candidate("a"),), "b", "cached")
    with pytest.raises(ValueError, match="source is 'guessed'"):
        Choice("dot", (Candidate("a"),), "a", "guessed")
    with pytest.raises(ValueError, match="cannot have the result"):
        Verification(True, "never")


class Elements(HTMLParser):
    """Collects text and tags, and checks that elements nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text = [], set(), ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_html(tmp_path):
    FULL.to_html(tmp_path / "e.html")
    text = (tmp_path / "e.html").read_text(encoding="utf-8")
    page = Elements(text)
    assert "http" not in text and not page.tags & {"script", "b-not", "img", "link"}
    for words in (FULL.notes[1], "stride 2 [/bold] at <both> sites", "idle-rule-59", "4.92×"):
        assert words in page.text
    assert "<b>not HTML" not in text
    assert Elements(FULL._repr_html_()).text.count("predict(") == 1
    with pytest.raises(FileNotFoundError, match=r"cannot write the explanation to .*nowhere"):
        FULL.to_html(tmp_path / "nowhere" / "e.html")


def test_rich_shows_colours_on_a_terminal():
    console = Console(force_terminal=True, color_system="truecolor", width=100, record=True, quiet=False)
    with console.capture() as capture:
        console.print(FULL)
    assert "\x1b[" in capture.get()
