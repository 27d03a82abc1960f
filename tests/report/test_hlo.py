"""Comparing programs: figures, difference, and the files written."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.report.hlo import HloComparison, HloProgram

X = jnp.ones((16, 16))


def compiled(fun, *args):
    return jax.jit(fun).lower(*(args or (X,))).compile()


def changed(diff: str) -> list[str]:
    body = diff.splitlines()[2:]
    return [line for line in body if line[:1] in "+-"]


class Strict(HTMLParser):
    """Checks that every element is closed in order, and notes what a browser would fetch or run."""

    EMPTY = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text, self.links = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_figures_of_a_product():
    program = HloProgram.of(compiled(lambda x: x @ x))
    assert program.operations["dot"] == 1
    assert program.flops == pytest.approx(2 * 16**3, rel=0.1)
    assert program.argument_bytes == program.output_bytes == 4 * 16 * 16
    assert program.instructions == sum(program.operations.values())
    assert hash(program) == hash(HloProgram.of(compiled(lambda y: y @ y)))


def test_fusions_and_custom_calls_are_counted():
    program = HloProgram.of(compiled(lambda x: (jnp.tanh(x) * 2 + jnp.sin(x), jnp.linalg.qr(x))))
    assert program.fusions == program.operations["fusion"] >= 1
    assert any(name.startswith("custom-call:") and "geqrf" in name for name in program.operations)


def test_lowered_and_text_have_what_they_can():
    lowered = jax.jit(jnp.sin).lower(X)
    before = HloProgram.of(lowered)
    assert before.operations["sine"] == 1 and before.temporary_bytes is None
    text = HloProgram.of(lowered.compile().as_text())
    assert text.flops is None and text.argument_bytes is None
    assert text.text == HloProgram.of(lowered.compile()).text


def test_unknown_analyses_stay_unknown():
    text = compiled(jnp.sin).as_text()

    def refuse():
        raise NotImplementedError

    absent = SimpleNamespace(as_text=lambda: text, cost_analysis=lambda: None, memory_analysis=lambda: None)
    refusing = SimpleNamespace(as_text=lambda: text, cost_analysis=refuse, memory_analysis=refuse)
    negative = SimpleNamespace(
        as_text=lambda: text,
        cost_analysis=lambda: [{"flops": -1.0, "bytes accessed": float("nan")}],
        memory_analysis=lambda: SimpleNamespace(temp_size_in_bytes=-1),
    )
    for source in (absent, refusing, negative):
        program = HloProgram.of(source)
        assert (program.flops, program.bytes_accessed, program.temporary_bytes) == (None, None, None)
        shown = str(HloComparison.of(program, program))
        assert "None" not in shown and "not known" in shown
    with pytest.raises(ValueError, match="no HLO text"):
        HloProgram.of(SimpleNamespace(as_text=lambda: None))


def test_equal_programs_have_no_difference(tmp_path):
    def other_line_and_name(y):
        return jnp.tanh(y @ y)

    comparison = HloComparison.of(compiled(lambda x: jnp.tanh(x @ x)), compiled(other_line_and_name))
    assert comparison.identical and comparison.before == comparison.after
    assert comparison.diff() == ""
    assert "identical" in comparison.to_text()
    comparison.to_html(tmp_path / "same.html")
    assert "details" not in Strict((tmp_path / "same.html").read_text()).tags


def test_constants_that_xla_omits_are_owned_up_to():
    def product(seed):
        matrix = np.random.default_rng(seed).standard_normal((128, 128)).astype(np.float32)
        return jax.jit(lambda x: x @ matrix).lower(jnp.ones((4, 128)))

    one, other = product(0), product(1)
    comparison = HloComparison.of(one.compile(), other.compile())
    assert comparison.before.elided_constants == 1
    assert "at most in the values of large constants (1)" in comparison.to_text()
    # Before compilation XLA prints the values, and a digest of them is compared.
    lowered = HloComparison.of(one, other)
    assert lowered.before.elided_constants == 0
    assert any("constant(" in line for line in changed(lowered.diff()))
    assert max(map(len, lowered.before.text.splitlines())) < 400


def test_one_changed_operation_is_a_small_difference():
    def network(activation):
        def apply(x):
            for i in range(12):
                x = (activation if i == 3 else jnp.tanh)(x @ x + i)
            return x

        return apply

    for stage in (lambda fun: jax.jit(fun).lower(X), lambda fun: compiled(fun)):
        comparison = HloComparison.of(stage(network(jnp.sin)), stage(network(jnp.cos)))
        lines = changed(comparison.diff())
        assert any("sine(" in line for line in lines) and any("cosine(" in line for line in lines)
        # The operation itself and what uses it: never what comes after them.
        assert len(lines) <= 8, comparison.diff()
        assert comparison.histogram()["sine"] == (1, 0)
        assert comparison.histogram()["cosine"] == (0, 1)


def test_an_insertion_does_not_rename_what_follows():
    def network(extra):
        def apply(x):
            for i in range(40):
                x = jnp.tanh(x @ x)
                if i == extra:
                    x = x[::-1]
            return x

        return apply

    before, after = (jax.jit(network(extra)).lower(X) for extra in (None, 5))
    lines = changed(HloComparison.of(before, after).diff())
    assert any("reverse" in line for line in lines)
    assert len(lines) <= 6


def test_swapped_operands_are_a_difference():
    comparison = HloComparison.of(compiled(lambda a, b: a - b, X, X), compiled(lambda a, b: b - a, X, X))
    assert comparison.histogram()["subtract"] == (1, 1)
    assert not comparison.identical
    assert changed(comparison.diff())


def test_a_changed_loop_body_is_found_inside():
    def loop(step):
        return lambda x: jax.lax.fori_loop(0, 9, lambda _, v: step(v @ x), x)

    diff = HloComparison.of(compiled(loop(jnp.sin)), compiled(loop(jnp.cos))).diff()
    assert any("cosine(" in line for line in changed(diff))
    assert not any(" while(" in line for line in changed(diff))


def test_hunks_count_their_lines():
    diff = HloComparison.of(compiled(jnp.sin), compiled(lambda x: jnp.cos(x) @ x + 1)).diff()
    hunks = [part.splitlines() for part in diff.split("\n@@ ")[1:]]
    assert hunks
    for head, *lines in hunks:
        old, new = (int(part.split(",")[1]) for part in head.split(" @@")[0].split(" "))
        assert sum(line[0] in " -" for line in lines) == old
        assert sum(line[0] in " +" for line in lines) == new


def test_summary_and_text(tmp_path):
    comparison = HloComparison.of(compiled(lambda x: x @ x @ x), compiled(lambda x: x @ x), "two products")
    old, new = comparison.summary()["FLOPs"]
    assert old == pytest.approx(2 * new, rel=0.1)
    assert next(iter(comparison.histogram())) not in ("parameter", "tuple", "bitcast", "constant")
    text = comparison.to_text(tmp_path / "c.txt")
    assert (tmp_path / "c.txt").read_text() == text
    assert "two products" in text and "dot" in text and comparison.diff() in text
    assert max(map(len, str(comparison).splitlines())) <= 100


def test_json_round_trip(tmp_path):
    comparison = HloComparison.of(compiled(jnp.sin), compiled(jnp.cos).as_text(), "ψ <before>")
    text = comparison.to_json(tmp_path / "c.json")
    assert (tmp_path / "c.json").read_text(encoding="utf-8") == text
    assert json.loads(text)["after"]["flops"] is None
    again = HloComparison.from_json(text)
    assert again == comparison and again.diff() == comparison.diff()


def test_html_is_well_formed_self_contained_and_escaped(tmp_path):
    title = "<script>alert('x')</script> & \"q\""
    comparison = HloComparison.of(compiled(jnp.sin), compiled(lambda x: jnp.cos(x) @ x), title)
    path = tmp_path / "c.html"
    comparison.to_html(path)
    text = path.read_text(encoding="utf-8")
    page = Strict(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not page.links and "http" not in text and "url(" not in text and "@import" not in text
    assert title in "".join(page.text)
    assert {"details", "table", "h1"} <= set(page.tags)
    assert "prefers-color-scheme:dark" in text
    shown = "".join(page.text)
    for line in comparison.diff().splitlines()[2:]:
        assert line in shown
    Strict(comparison._repr_html_())


@pytest.mark.parametrize("write", ["to_text", "to_json", "to_html"])
def test_unwritable_paths_are_named_and_leave_nothing(write, tmp_path):
    program = HloProgram.of(compiled(jnp.sin))
    comparison = HloComparison(program, program)
    with pytest.raises(FileNotFoundError, match=r"cannot write the HLO comparison to .*absent.*No such file"):
        getattr(comparison, write)(tmp_path / "absent" / "c.out")
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError, match="taken"):
        getattr(comparison, write)(tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_program_text_is_escaped_in_html(tmp_path):
    head = "HloModule m\n\nENTRY e {\n  p = f32[2]{0} parameter(0)\n"
    target = "<img src=x>&amp;"
    before = head + "  ROOT r = f32[2]{0} sine(p)\n}\n"
    after = head + f'  ROOT r = f32[2]{{0}} custom-call(p), custom_call_target="{target}"\n}}\n'
    HloComparison.of(before, after).to_html(tmp_path / "c.html")
    page = Strict((tmp_path / "c.html").read_text())
    assert "img" not in page.tags
    assert f'custom_call_target="{target}"' in "".join(page.text)
