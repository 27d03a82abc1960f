"""Parsing and normalising HLO of real programs, in both of XLA's dialects."""

from __future__ import annotations

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.report.hlo_text import Module, canonical, parse


def scan_and_branch(x, w):
    y, sums = jax.lax.scan(lambda c, a: (jnp.tanh(c @ w + a), c.sum()), x[0], x)
    z = jax.lax.cond(sums.sum() > 0, jnp.sin, lambda v: v * 2, y)
    return jax.lax.while_loop(lambda v: (v * v).sum() < 100, lambda v: v * 2 + 1, z)


def factorise(x, w):
    q, r = jnp.linalg.qr(x[0] + w)
    return q, r, jax.lax.top_k(w, 2), jnp.argsort(w)


def convolve(x, w):
    image = jnp.broadcast_to(x[0, :, :, None], (8, 8, 4))[None]
    kernel = jnp.broadcast_to(w[:3, :3, None, None], (3, 3, 1, 4))
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=4)


def call_back(x, w):
    result = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    return jax.pure_callback(lambda a: np.asarray(a) + 1, result, x[0]) + w


PROGRAMS = {
    scan_and_branch: ("while", "conditional", "fusion"),
    factorise: ("custom-call", "sort"),
    convolve: ("convolution",),
    call_back: ("custom-call",),
    lambda x, w: jax.random.normal(jax.random.key(0), (8,)) + x[0, 0]: ("fusion",),
}
X, W = jnp.ones((5, 8, 8)), jnp.eye(8)


def texts(fun) -> list[str]:
    lowered = jax.jit(fun).lower(X, W)
    return [lowered.compile().as_text(), lowered.as_text(dialect="hlo")]


def opcodes_by_pattern(text: str) -> Counter:
    """Counts opcodes by a different road than the parser: the first word before a parenthesis."""
    found = Counter()
    for line in text.splitlines():
        line = re.sub(r'"(?:[^"\\]|\\.)*"', "", line)
        if match := re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = .*?[})\]] ([a-z][a-z\-]*[a-z])\(", line):
            found[match[1]] += 1
    return found


def evaluate_references(module: Module) -> None:
    """Every operand and every called computation is defined, operands before users, and one root each."""
    computations = {c.name for c in module.computations}
    for computation in module.computations:
        seen = set()
        for i in computation.instructions:
            assert set(i.operands) | set(i.after) <= seen, i
            assert {name for _, names in i.called for name in names} <= computations, i
            assert i.name not in seen
            seen.add(i.name)
        assert sum(i.root for i in computation.instructions) == 1


@pytest.mark.parametrize("fun", PROGRAMS, ids=lambda fun: fun.__name__)
def test_real_programs(fun):
    for compiled, text in zip((True, False), texts(fun)):
        parsed = parse(text)
        opcodes = Counter(i.opcode for c in parsed.computations for i in c.instructions)
        assert opcodes == opcodes_by_pattern(text)
        if compiled:
            assert set(PROGRAMS[fun]) <= opcodes.keys()
        module = canonical(parsed)
        assert Counter(i.opcode for c in module.computations for i in c.instructions) == opcodes
        evaluate_references(module)
        assert canonical(parse(str(module))) == module
        for trace in ("metadata", "stack_frame", "FileNames", __file__, "HloModule jit"):
            assert trace not in str(module)


def from_source(blank_lines: int, name: str, inner: str):
    """The same computation from another line, of another file, under other names."""
    source = "\n" * blank_lines + (
        f"def {inner}(c, a):\n"
        f"    return jnp.tanh(c @ a), c.sum()\n"
        f"def {name}(x, w):\n"
        f"    final, sums = jax.lax.scan({inner}, w, x)\n"
        f"    return jax.jit({inner})(final, w), jnp.argsort(sums)\n"
    )
    scope = {"jax": jax, "jnp": jnp}
    exec(compile(source, f"{name}.py", "exec"), scope)
    return scope[name]


def test_lines_and_names_leave_no_trace():
    first, second = from_source(0, "predict", "step"), from_source(37, "apply", "advance")
    for one, other in zip(texts(first), texts(second)):
        assert one != other
        assert canonical(parse(one)) == canonical(parse(other))


def test_a_changed_operation_does_not_compare_equal():
    for one, other in zip(texts(lambda x, w: x[0] - w), texts(lambda x, w: w - x[0])):
        assert canonical(parse(one)) != canonical(parse(other))


def test_schedule_and_verbose_operands_do_not_matter():
    head, tail = "HloModule m, is_scheduled=true\n\nENTRY %e (p: f32[2]) -> f32[2] {\n", "}\n"
    a = "  %p = f32[2]{0} parameter(0)\n"
    b = '  %s = f32[2]{0} sine(%p), metadata={op_name="a}b" source_line=3}\n'
    c = "  %t = f32[2]{0} cosine(f32[2]{0} %p)\n"
    root = "  ROOT %r = (f32[2]{0}, /*index=1*/f32[2]{0}) tuple(%s, /*index=1*/%t)\n"
    assert canonical(parse(head + a + b + c + root + tail)) == canonical(parse(head + a + c + b + root + tail))


def hlo(line: str) -> str:
    return f"HloModule m\n\nENTRY e {{\n  p = f32[2]{{0}} parameter(0)\n  ROOT r = f32[2]{{0}} {line}\n}}\n"


def test_backend_noise_is_dropped_and_the_rest_kept_short_but_distinct():
    noise = '"operation_queue_id":"3","wait_on_operation_queues":[],"reification_cost":[{"cycles":1.5}]'
    config = '{{{},"fusion_backend_config":{{"kind":"__triton"}}}}'
    kept = str(canonical(parse(hlo(f"sine(p), backend_config={config.format(noise)}"))))
    assert 'backend_config={"fusion_backend_config":{"kind":"__triton"}}' in kept
    assert "backend_config" not in str(canonical(parse(hlo(f"sine(p), backend_config={{{noise}}}"))))
    opaque = [f'backend_config="{"abc(,{" * 500}{end}"' for end in "xy"]
    first, second = (str(canonical(parse(hlo(f"sine(p), {value}")))) for value in opaque)
    assert len(first) < 400 and first != second
    assert str(canonical(parse(first))) == first


def test_control_dependences_and_unreached_effects_are_kept():
    text = (
        "HloModule m\n\nENTRY e {\n  p = f32[2]{0} parameter(0)\n  t = token[] after-all()\n"
        '  o = token[] outfeed(p, t), outfeed_config="x"\n'
        "  ROOT r = f32[2]{0} sine(p), control-predecessors={o}\n  q = f32[2]{0} cosine(p)\n}\n"
    )
    shown = str(canonical(parse(text)))
    assert "control-predecessors={%outfeed.1}" in shown and "cosine(%parameter.0)" in shown
    evaluate_references(canonical(parse(text)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("module @jit_f { }", "not a whole HLO module"),
        (hlo("sine(p)")[:-2], "not a whole HLO module"),
        (hlo("sine(p)") * 2, "second HloModule"),
        (hlo("what is this"), "line 5 is not an HLO instruction"),
        (hlo("sine(p"), "unbalanced brackets"),
    ],
)
def test_other_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)
