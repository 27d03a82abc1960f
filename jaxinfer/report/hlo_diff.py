"""The difference of two HLO programs, in which corresponding instructions have one name."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import count

from jaxinfer.report.hlo_text import Computation, Instruction, Module, renamed

Key = Callable[[Instruction], Hashable]

# Comparisons in one pass of the alignment beyond which frequent keys are left out of it, for speed.
_COSTLY = 20_000_000


@dataclass(frozen=True)
class Section:
    """What changed in one computation: its title and the lines of a unified diff."""

    title: str
    lines: tuple[str, ...]


def difference(before: Module, after: Module, context: int = 3) -> tuple[Section, ...]:
    """Compares two programs in canonical form.

    Computations are paired through the instructions that call them, starting from the entry. An instruction
    of the second program that has a counterpart in the first is shown under the counterpart's name, so that
    an insertion does not rename all that follows.

    Args:
      before: The first program, from `canonical`.
      after: The second program, from `canonical`.
      context: Unchanged lines shown around each change.

    Returns:
      A section for each computation that differs; none for equal programs.
    """
    if before == after:
        return ()
    after = _named_like(before, after)
    old = {c.name: (c.lines(), at) for c, at in zip(before.computations, _line_numbers(before))}
    new = {c.name: (c.lines(), at) for c, at in zip(after.computations, _line_numbers(after))}
    titles = {c.name: c.title for c in (*after.computations, *before.computations)}
    sections = []
    if before.header != after.header:
        sections.append(Section("HloModule", ("@@ -1 +1 @@", f"-{before.header}", f"+{after.header}")))
    for name in dict.fromkeys([*old, *new]):
        lines = _unified(old.get(name, ([], 0)), new.get(name, ([], 0)), titles[name], context)
        if lines:
            sections.append(Section(titles[name], tuple(lines)))
    return tuple(sections)


def _named_like(before: Module, after: Module) -> Module:
    """The second program with the first one's names wherever something corresponds."""
    old = {c.name: c for c in before.computations}
    new = {c.name: c for c in after.computations}
    old_deep, new_deep = _deep_keys(before), _deep_keys(after)
    entries = [next(c.name for c in module.computations if c.entry) for module in (before, after)]
    queue, pairs, instruction_names = [(entries[0], entries[1])], {entries[1]: entries[0]}, {}
    # Whatever no matched caller leads to may still be the same computation.
    while queue or (queue := _same_content(old, new, pairs, old_deep, new_deep)):
        a, b = (old[queue[0][0]], new[queue[0][1]])
        queue.pop(0)
        matched = _matches(a, b, old_deep, new_deep)
        instruction_names[b.name] = _instruction_names(a, b, matched)
        for i, j in matched:
            for (role_a, called_a), (role_b, called_b) in zip(i.called, j.called):
                if role_a != role_b or len(called_a) != len(called_b):
                    continue
                for name_a, name_b in zip(called_a, called_b):
                    if name_b not in pairs and name_a not in pairs.values():
                        pairs[name_b] = name_a
                        queue.append((name_a, name_b))
    used = set(old)
    for name in new:
        if name not in pairs:
            pairs[name] = _fresh(name, used)
        used.add(pairs[name])
    unpaired = {c.name: {i.name: i.name for i in c.instructions} for c in after.computations}
    return Module(
        after.header,
        tuple(renamed(c, pairs, instruction_names.get(c.name, unpaired[c.name])) for c in after.computations),
    )


def _same_content(
    old: dict[str, Computation],
    new: dict[str, Computation],
    pairs: dict[str, str],
    old_deep: dict[str, dict[str, int]],
    new_deep: dict[str, dict[str, int]],
) -> list[tuple[str, str]]:
    left = {tuple(old_deep[name].values()): name for name in old if name not in set(pairs.values())}
    for name in new:
        if name not in pairs and (match := left.pop(tuple(new_deep[name].values()), None)):
            pairs[name] = match
            return [(match, name)]
    return []


def _deep_keys(module: Module) -> dict[str, dict[str, int]]:
    """A number for each instruction that stands for all it is computed from, names left out."""
    computations = {c.name: c for c in module.computations}
    done: dict[str, dict[str, int]] = {}

    def content(name: str) -> int:
        if name not in done:
            keys: dict[str, int] = {}
            for i in computations[name].instructions:
                called = tuple(content(callee) for _, names in i.called for callee in names)
                keys[i.name] = hash((_own(i), tuple(keys[operand] for operand in i.operands), called))
            done[name] = keys
        return hash(tuple(done[name].values()))

    for name in computations:
        content(name)
    return done


def _own(i: Instruction) -> Hashable:
    """What an instruction is, without names."""
    roles = tuple((role, len(names)) for role, names in i.called)
    return (i.opcode, i.shape, len(i.operands), i.literal, roles, i.attributes, i.root)


def _opcode_and_shape(i: Instruction) -> Hashable:
    return (_opcode(i), i.shape)


def _opcode(i: Instruction) -> Hashable:
    # A parameter is never another one, whatever its shape.
    return (i.opcode, i.literal if i.opcode == "parameter" else "")


def _matches(
    a: Computation, b: Computation, old_deep: dict[str, dict[str, int]], new_deep: dict[str, dict[str, int]]
) -> list[tuple[Instruction, Instruction]]:
    """Pairs of corresponding instructions: by all they compute from, then by less, by opcode last."""

    keys_a, keys_b = old_deep[a.name], new_deep[b.name]
    by_a, by_b = {i.name: i for i in a.instructions}, {i.name: i for i in b.instructions}

    def near(by_name: dict[str, Instruction]) -> Key:
        return lambda i: (_own(i), tuple(_own(by_name[operand]) for operand in i.operands))

    levels: list[tuple[Key, Key]] = [
        (lambda i: keys_a[i.name], lambda i: keys_b[i.name]),
        (near(by_a), near(by_b)),
        (_own, _own),
        (_opcode_and_shape, _opcode_and_shape),
        (_opcode, _opcode),
    ]
    matched = _align(a.instructions, b.instructions, levels)
    # Something equal that merely stands elsewhere keeps its name too: its users have not changed.
    taken_a, taken_b = {i.name for i, _ in matched}, {j.name for _, j in matched}
    moved: dict[int, list[Instruction]] = {}
    for i in a.instructions:
        if i.name not in taken_a:
            moved.setdefault(keys_a[i.name], []).append(i)
    for j in b.instructions:
        if j.name not in taken_b and moved.get(keys_b[j.name]):
            matched.append((moved[keys_b[j.name]].pop(0), j))
    return matched


def _align(
    a: Sequence[Instruction], b: Sequence[Instruction], levels: Sequence[tuple[Key, Key]]
) -> list[tuple[Instruction, Instruction]]:
    """Aligns two sequences by the first level's keys, and what lies between the matches by the next's."""
    if not (a and b and levels):
        return []
    keys_a, keys_b = [levels[0][0](i) for i in a], [levels[0][1](j) for j in b]
    often: dict[Hashable, int] = {}
    for key in keys_b:
        often[key] = often.get(key, 0) + 1
    costly = sum(often.get(key, 0) for key in keys_a) > _COSTLY
    pairs: list[tuple[Instruction, Instruction]] = []
    for tag, i1, i2, j1, j2 in SequenceMatcher(None, keys_a, keys_b, autojunk=costly).get_opcodes():
        if tag == "equal":
            pairs += zip(a[i1:i2], b[j1:j2])
        elif tag == "replace":
            pairs += _align(a[i1:i2], b[j1:j2], levels[1:])
    return pairs


def _instruction_names(
    a: Computation, b: Computation, matched: list[tuple[Instruction, Instruction]]
) -> dict[str, str]:
    names = {j.name: i.name for i, j in matched}
    used = {i.name for i in a.instructions}
    for j in b.instructions:
        if j.name not in names:
            names[j.name] = _fresh(j.name, used)
            used.add(names[j.name])
    return names


def _fresh(name: str, used: set[str]) -> str:
    if name not in used:
        return name
    stem = name.rpartition(".")[0] or name
    return next(f"{stem}.{n}" for n in count(1) if f"{stem}.{n}" not in used)


def _line_numbers(module: Module) -> list[int]:
    """The line of the program's text before which each computation starts."""
    numbers, line = [], 1
    for computation in module.computations:
        numbers.append(line + 1)
        line += 1 + len(computation.instructions) + 2
    return numbers


def _unified(old: tuple[list[str], int], new: tuple[list[str], int], title: str, context: int) -> list[str]:
    (a, a_start), (b, b_start) = old, new
    lines = []
    for group in SequenceMatcher(None, a, b, autojunk=False).get_grouped_opcodes(context):
        i1, i2, j1, j2 = group[0][1], group[-1][2], group[0][3], group[-1][4]
        old_range = f"-{a_start + i1 + (i2 > i1)},{i2 - i1}"
        lines.append(f"@@ {old_range} +{b_start + j1 + (j2 > j1)},{j2 - j1} @@ {title}")
        for tag, first, last, other_first, other_last in group:
            if tag == "equal":
                lines += [f" {line}" for line in a[first:last]]
                continue
            lines += [f"-{line}" for line in a[first:last]]
            lines += [f"+{line}" for line in b[other_first:other_last]]
    return lines
