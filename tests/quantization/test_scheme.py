"""Schemes: what contradicts itself is refused, exceptions fit what they say."""

from __future__ import annotations

import re

import pytest

from jaxinfer import autoinfer
from jaxinfer.quantization.scheme import Format, Group, Override, Scheme, SchemeError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Format("int3"), "int3"),
        (lambda: Format("int8", "row"), "row"),
        (lambda: Format("fp8_e4m3", affine=True), "no zero point"),
        (lambda: Group(0), "one entry"),
        (lambda: Scheme(None), "does nothing"),
        (lambda: Scheme(Format("int8", "token")), "no tokens"),
        (lambda: Scheme(dynamic=True), "give their format"),
        (lambda: Scheme(activations=Format("int8", "channel")), "one scale"),
        (lambda: Scheme(activations=Format("int8", "token")), "dynamic"),
        (lambda: Scheme(Format("fp8_e4m3"), Format("int8", "tensor")), "same kind"),
        (lambda: Scheme(Format("int8", Group(4)), Format("int8", "tensor")), "in groups"),
        (lambda: Scheme(Format("int8", affine=True), Format("int8", "tensor")), "symmetric"),
        (lambda: Scheme(unmatched="ignore"), "ignore"),
        (lambda: Override(1.5), "1.5"),
        (lambda: Override("a", Scheme(overrides=(Override("b"),))), "overrides itself"),
    ],
)
def test_contradictions_are_refused(make, message) -> None:
    with pytest.raises(SchemeError, match=message):
        make()


@pytest.mark.parametrize(
    ("match", "names", "positions"),
    [
        ("*/attention/*", {"a/attention/q"}, set()),
        ("head", {"head"}, set()),
        (re.compile(r"^head|/q$"), {"head", "a/attention/q"}, set()),
        (0, set(), {0}),
        (-1, set(), {4}),
        (slice(1, 4, 2), set(), {1, 3}),
        (slice(-2, None), set(), {3, 4}),
        (7, set(), set()),
    ],
)
def test_exceptions_fit_what_they_say(match, names, positions) -> None:
    override = Override(match)
    known = {"a/attention/q", "a/dense", "head"}
    assert {n for n in known if override.fits(n, None, 5)} == names
    assert {p for p in range(5) if override.fits(None, p, 5)} == positions


def test_the_first_exception_that_fits_decides() -> None:
    eight, four = autoinfer.Int8Weights(), autoinfer.Int4()
    scheme = autoinfer.Int8(overrides=[Override("a*", four), Override("ab*"), Override(0, eight)])
    assert scheme.at("abc", 0, 3)[0] == four
    assert scheme.at("b", 0, 3)[0] == eight
    assert scheme.at("b", 1, 3)[0] is scheme
    assert scheme.with_overrides(Override("abc")).at("abc", 0, 3)[0] is None


def test_presets_are_schemes() -> None:
    assert autoinfer.Int4(64).weights == Format("int4", Group(64))
    assert autoinfer.Int4(None).weights == Format("int4")
    assert autoinfer.FP8("e5m2").weights.high == 57344.0
    assert autoinfer.Int8().activations.affine and not autoinfer.Int8().dynamic
    assert autoinfer.Int8Dynamic().dynamic and autoinfer.Int8Dynamic(per="tensor").activations.per == "tensor"
    assert autoinfer.BF16().weights.bits == autoinfer.F16().weights.bits == 16
    assert str(autoinfer.Int4()) == "weights int4 per group of 64"
