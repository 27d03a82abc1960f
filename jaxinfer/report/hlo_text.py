"""HLO text as data: parsed, freed of what source lines left in it, in one order and with plain names."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

# Where the program came from, not what it does.
_PROVENANCE = {"metadata", "original_value", "origin"}
# What a backend's scheduler and autotuner note for themselves.
_SCHEDULER_NOISE = {
    "force_earliest_schedule",
    "operation_queue_id",
    "reification_cost",
    "wait_on_operation_queues",
}
_CALLING = {
    "async_wrapped",
    "body",
    "branch_computations",
    "called_computations",
    "calls",
    "condition",
    "false_computation",
    "scatter",
    "select",
    "to_apply",
    "true_computation",
}
_LONGEST = 160

_QUOTED = r'"(?:[^"\\]|\\.)*"'
_COMMENT = re.compile(rf"({_QUOTED})|/\*.*?\*/")
_DELIMITER = re.compile(rf"{_QUOTED}|[(){{}}\[\],]")
_COMPUTATION = re.compile(r"(ENTRY\s+)?%?([\w.\-]+)(?:\s+\(.*|,.*)?\s*\{\s*")
_ASSIGNMENT = re.compile(r"\s*(ROOT\s+)?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_ALIAS = re.compile(r"(input_output_alias|num_partitions|replica_count)=")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of HLO.

    Args:
      name: Unique in its computation.
      shape: Type and layout, as HLO prints them.
      opcode: The operation ("add", "fusion", "custom-call").
      operands: Names of instructions of the same computation.
      literal: What stands between the parentheses of a constant or parameter.
      called: (attribute, names of computations) for each attribute that calls.
      after: Names of instructions that must run first (control dependences).
      attributes: The other attributes, (name, value) each, provenance removed.
      root: Whether this is the computation's result.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    called: tuple[tuple[str, tuple[str, ...]], ...]
    after: tuple[str, ...]
    attributes: tuple[tuple[str, str], ...]
    root: bool

    @property
    def kind(self) -> str:
        """The opcode; for a custom call with its target, which says what is done."""
        target = dict(self.attributes).get("custom_call_target")
        return f"{self.opcode}:{target.strip(chr(34))}" if target else self.opcode

    def __str__(self) -> str:
        arguments = self.literal or ", ".join(f"%{name}" for name in self.operands)
        parts = [f"{'ROOT ' if self.root else ''}%{self.name} = {self.shape} {self.opcode}({arguments})"]
        for attribute, names in self.called:
            listed = ", ".join(f"%{name}" for name in names)
            several = attribute in ("branch_computations", "called_computations")
            parts.append(f"{attribute}={{{listed}}}" if several else f"{attribute}={listed}")
        if self.after:
            parts.append(f"control-predecessors={{{', '.join(f'%{name}' for name in self.after)}}}")
        parts += [f"{name}={value}" for name, value in self.attributes]
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Computation:
    """A named list of instructions, of which one is the root."""

    name: str
    entry: bool
    instructions: tuple[Instruction, ...]

    @property
    def title(self) -> str:
        """The name, marked if this is where the program starts."""
        return f"{'ENTRY ' if self.entry else ''}%{self.name}"

    def lines(self) -> list[str]:
        """The computation as text, a line for each instruction."""
        return [f"{self.title} {{", *(f"  {instruction}" for instruction in self.instructions), "}"]


@dataclass(frozen=True, slots=True)
class Module:
    """A program: what is said of the whole (aliasing, partitions) and its computations."""

    header: str
    computations: tuple[Computation, ...]

    def __str__(self) -> str:
        return "\n".join([self.header, *("\n" + "\n".join(c.lines()) for c in self.computations)]) + "\n"


def parse(text: str) -> Module:
    """Reads HLO text in either of XLA's dialects, with or without % before names.

    Raises:
      ValueError: The text is no HLO module, or holds a line that cannot be read; the message quotes it.
    """
    header, computations = "", []
    current: tuple[str, bool, list[Instruction]] | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if current is not None:
            if line.startswith("}"):
                name, entry, instructions = current
                computations.append(Computation(name, entry, tuple(instructions)))
                current = None
            elif line.strip():
                current[2].append(_instruction(line, number))
        elif line.startswith("HloModule"):
            if header:
                raise ValueError(f"line {number} starts a second HloModule; give one program at a time")
            header = _header(line)
        elif match := _COMPUTATION.fullmatch(line):
            current = (match[2], bool(match[1]), [])
    if not header or current is not None or sum(c.entry for c in computations) != 1:
        raise ValueError(
            f"not a whole HLO module with one ENTRY computation: {text.lstrip()[:60]!r}; "
            "give Compiled.as_text(), or Lowered.as_text(dialect='hlo')"
        )
    return Module(header, tuple(computations))


def canonical(module: Module) -> Module:
    """Orders and renames a program by its structure alone.

    Computations stand in the order in which the entry reaches them; in each come the parameters, then the
    others with operands before users. Names count opcodes. Programs that differ in names, schedule or
    provenance only become equal.
    """
    by_name = {computation.name: computation for computation in module.computations}
    entry = next(computation for computation in module.computations if computation.entry)
    names, queue = {entry.name: "main"}, [entry.name]
    numbers: Counter[str] = Counter()
    ordered = []
    # A schedule or an attribute this file does not know may be all that refers to a computation.
    for start in [entry.name, *by_name]:
        if start not in names:
            numbers["computation"] += 1
            names[start] = f"computation.{numbers['computation']}"
            queue.append(start)
        while queue:
            computation = _in_structural_order(by_name[queue.pop(0)])
            ordered.append(computation)
            for instruction in computation.instructions:
                for attribute, called in instruction.called:
                    for name in called:
                        if name not in names:
                            stem = f"{instruction.opcode}_{_ROLE.get(attribute, attribute)}"
                            numbers[stem] += 1
                            names[name] = f"{stem}.{numbers[stem]}"
                            queue.append(name)
    return Module(module.header, tuple(renamed(c, names, _names_by_opcode(c)) for c in ordered))


def renamed(computation: Computation, computations: dict[str, str], instructions: dict[str, str]) -> Computation:
    """The same computation under other names.

    Args:
      computation: What to rename.
      computations: New names of all computations it is or calls.
      instructions: New names of its instructions.
    """
    return replace(
        computation,
        name=computations[computation.name],
        instructions=tuple(
            replace(
                i,
                name=instructions[i.name],
                operands=tuple(instructions[name] for name in i.operands),
                after=tuple(sorted(instructions[name] for name in i.after)),
                called=tuple((key, tuple(computations[name] for name in names)) for key, names in i.called),
            )
            for i in computation.instructions
        ),
    )


_ROLE = {
    "branch_computations": "branch",
    "called_computations": "body",
    "calls": "body",
    "to_apply": "body",
}


def _names_by_opcode(computation: Computation) -> dict[str, str]:
    numbers: Counter[str] = Counter()
    names = {}
    for instruction in computation.instructions:
        numbers[instruction.opcode] += 1
        number = instruction.literal if instruction.opcode == "parameter" else numbers[instruction.opcode]
        names[instruction.name] = f"{instruction.opcode}.{number}"
    return names


def _in_structural_order(computation: Computation) -> Computation:
    by_name = {instruction.name: instruction for instruction in computation.instructions}
    parameters = [i for i in computation.instructions if i.opcode == "parameter"]
    parameters.sort(key=lambda i: int(i.literal) if i.literal.isdigit() else 0)
    rootless = [i for i in computation.instructions if not i.root]
    roots = [i for i in computation.instructions if i.root]
    done: dict[str, Instruction] = {}
    # What the root does not reach (effects, mostly) keeps its order, after all that the root needs.
    for start in [*parameters, *roots, *rootless]:
        stack = [start.name]
        while stack:
            instruction = by_name[stack[-1]]
            missing = [n for n in (*instruction.operands, *instruction.after) if n not in done]
            if missing and instruction.name not in done:
                stack += reversed(missing)
            else:
                done.setdefault(instruction.name, instruction)
                stack.pop()
    return replace(computation, instructions=tuple(done.values()))


def _header(line: str) -> str:
    kept = [part for part in _split(line.removeprefix("HloModule")) if _ALIAS.match(part)]
    return ", ".join(["HloModule", *kept])


def _instruction(line: str, number: int) -> Instruction:
    line = _COMMENT.sub(lambda match: match[1] or "", line).rstrip()
    start = _ASSIGNMENT.match(line)
    opcode = None
    if start:
        # A tuple's shape is parenthesised and holds blanks; any other ends at the first blank.
        position = start.end()
        end = _closing(line, position) + 1 if line[position] == "(" else line.find(" ", position)
        opcode = _OPCODE.match(line, end) if end > 0 else None
    if not start or not opcode:
        raise ValueError(f"line {number} is not an HLO instruction: {line.strip()[:120]!r}")
    close = _closing(line, opcode.end() - 1)
    inside = line[opcode.end() : close].strip()
    literal = opcode[1] in ("constant", "parameter")
    called: list[tuple[str, tuple[str, ...]]] = []
    attributes: list[tuple[str, str]] = []
    after: tuple[str, ...] = ()
    for part in _split(line[close + 1 :]):
        key, _, value = part.partition("=")
        if key in _PROVENANCE:
            continue
        if key in _CALLING:
            called.append((key, _names(value)))
        elif key == "control-predecessors":
            after = _names(value)
        elif value := _tidy(key, value):
            attributes.append((key, value))
    return Instruction(
        name=start[2],
        shape=line[position:end].strip(),
        opcode=opcode[1],
        # With verbose printing an operand's shape stands before its name.
        operands=() if literal else tuple(part.split()[-1].lstrip("%") for part in _split(inside)),
        literal=_shortened(inside) if literal else "",
        called=tuple(called),
        after=after,
        attributes=tuple(attributes),
        root=bool(start[1]),
    )


def _names(value: str) -> tuple[str, ...]:
    return tuple(part.strip().lstrip("%") for part in value.strip("{}").split(",") if part.strip())


def _tidy(key: str, value: str) -> str:
    if key == "backend_config":
        try:
            config = _without_noise(json.loads(value))
        except ValueError:
            pass  # Custom calls carry MLIR attributes or opaque strings here; they stay as they are.
        else:
            value = json.dumps(config, separators=(",", ":")) if config else ""
        if value in ("{}", '""'):
            return ""
    return _shortened(value)


def _without_noise(config: Any) -> Any:
    if isinstance(config, dict):
        kept = {k: _without_noise(v) for k, v in config.items() if k not in _SCHEDULER_NOISE}
        return {k: v for k, v in kept.items() if v not in ({}, [], "", None)}
    return config


def _shortened(value: str) -> str:
    """Keeps long values readable, and different ones different, by a digest in place of the rest."""
    if len(value) <= _LONGEST:
        return value
    head = re.sub(r'[(){}\[\]"\\]', "", value[:60])
    digest = hashlib.blake2b(value.encode(errors="backslashreplace"), digest_size=6).hexdigest()
    return f"{{{head}… {len(value)} characters #{digest}}}"


def _delimiters(text: str, start: int) -> Iterator[tuple[int, str, int]]:
    """Yields (position, delimiter, depth after it) from `start` on, skipping quoted text."""
    depth = 0
    for match in _DELIMITER.finditer(text, start):
        token = match[0]
        depth += token in ("(", "{", "[")
        depth -= token in (")", "}", "]")
        yield match.start(), token, depth


def _closing(text: str, start: int) -> int:
    for position, token, depth in _delimiters(text, start):
        if depth == 0 and token in (")", "}", "]"):
            return position
    raise ValueError(f"unbalanced brackets in {text[start : start + 120]!r}")


def _split(text: str) -> list[str]:
    """Splits at the commas that stand outside all brackets and quotes; empty parts are dropped."""
    parts, begin = [], 0
    for position, token, depth in _delimiters(text, 0):
        if token == "," and depth == 0:
            parts.append(text[begin:position])
            begin = position + 1
    parts.append(text[begin:])
    return [part.strip() for part in parts if part.strip()]
