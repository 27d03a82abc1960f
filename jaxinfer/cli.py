"""The command line: ``jaxinfer demo``, ``bench``, ``explain`` and ``compare-hlo``.

Ends with status 0 when all went well, 1 when the work failed, 2 when it was asked for wrongly.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxinfer import target
from jaxinfer.optimize import Frozen, Optimized, optimize
from jaxinfer.pipeline import TUNES, Tune
from jaxinfer.report import output
from jaxinfer.rewriting.rule import TIERS
from jaxinfer.target import TargetError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the words after the program's name; by default those of this process.

    Returns:
        The exit status.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (TargetError, _MissingExtra, OSError) as error:
        if arguments.debug:
            raise
        print(f"jaxinfer {arguments.command}: error: {error}", file=sys.stderr)
        return error.status if isinstance(error, TargetError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


class _MissingExtra(Exception):
    """A command needs packages that the bare installation does not have."""


def _demo(arguments: argparse.Namespace) -> int:
    module = _experiment("demo", "demo")
    return 0 if module.demo(arguments.html, arguments.tune, arguments.tiny) else 1


def _bench(arguments: argparse.Namespace) -> int:
    bench, zoo = _experiment("bench", "zoo"), importlib.import_module("jaxinfer.models.zoo")
    task = importlib.import_module("jaxinfer.experiments.task")
    unknown = [name for name in arguments.models if name not in zoo.ZOO]
    if unknown:
        raise TargetError(f"no model {', '.join(unknown)} in the zoo; there are {', '.join(zoo.ZOO)}")
    request = task.Request(
        models=dict.fromkeys(arguments.models or zoo.ZOO, arguments.seconds),
        batches=arguments.batch,
        optimize={"numerics": arguments.numerics, "tune": arguments.tune},
        tiny=arguments.tiny,
        output=arguments.output,
    )
    rows = bench.bench(request)
    request.console.print(f"{len(rows)} rows appended to {request.output.resolve()}")
    return 1 if any("error" in row for row in rows) else 0


def _explain(arguments: argparse.Namespace) -> int:
    function, examples = _optimized(arguments)
    with target.blamed(arguments.target):
        explanation = function.explain(*examples)
    return _show(explanation, arguments)


def _compare_hlo(arguments: argparse.Namespace) -> int:
    function, examples = _optimized(arguments)
    with target.blamed(arguments.target):
        comparison = function.compare_hlo(*examples)
    return _show(comparison, arguments)


def _optimized(arguments: argparse.Namespace) -> tuple[Optimized, tuple[Any, ...]]:
    """The function that is asked about, and the arguments it takes; leading ones are frozen if that was asked for."""
    function = target.load(arguments.target)
    examples = target.arguments(arguments.args, arguments.shape)
    if not isinstance(function, Optimized):
        function = optimize(function, numerics=arguments.numerics, tune=arguments.tune)
    count = arguments.freeze
    if count > len(examples):
        raise TargetError(f"--freeze {count}: there are {len(examples)} example arguments")
    if count:
        if isinstance(function, Frozen):
            raise TargetError(f"--freeze {count}: {arguments.target} is frozen already; leave the option out")
        function = function.freeze(*examples[:count])
    return function, examples[count:]


def _show(report: Any, arguments: argparse.Namespace) -> int:
    """Prints a report, or writes it where it was asked for."""
    paths = {kind: getattr(arguments, kind) for kind in ("text", "json", "html")}
    for kind, path in paths.items():
        if path == "-":
            print(getattr(report, f"to_{kind}")())
        elif path is not None:
            getattr(report, f"to_{kind}")(path)
            print(f"written to {Path(path).resolve()}", file=sys.stderr)
    if not any(paths.values()):
        output.console().print(report)
    return 0


def _experiment(name: str, extra: str) -> ModuleType:
    """A module of `jaxinfer.experiments`, whose packages come with an extra.

    Raises:
        _MissingExtra: one of them is not installed.
    """
    try:
        return importlib.import_module(f"jaxinfer.experiments.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("jaxinfer"):
            raise
        raise _MissingExtra(f'the package {error.name!r} is missing: pip install "jaxinfer[{extra}]"') from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxinfer", description="A differentiable graph optimizer for JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="a pretrained network on real photographs, before and after")
    demo.add_argument("--html", type=Path, default=Path("demo.html"), metavar="PATH", help="default: demo.html")
    demo.add_argument("--tiny", action="store_true", help="a small random network, to try the command out")
    _add_tune(demo)
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="models of the zoo, original against optimized")
    bench.add_argument("models", nargs="*", metavar="MODEL", help="names in the zoo; default: all")
    bench.add_argument("--batch", type=_positive, nargs="+", default=[1], metavar="N", help="default: 1")
    bench.add_argument("--seconds", type=float, default=10.0, help="spent on timing each model; default: 10")
    bench.add_argument("--tiny", action="store_true", help="the small variants, to try the command out")
    bench.add_argument("--output", type=Path, default=Path("outputs/bench.jsonl"), metavar="PATH", help="JSON lines")
    _add_numerics(bench)
    _add_tune(bench)
    bench.set_defaults(run=_bench)

    explain = commands.add_parser("explain", help="what was done to a function, why, and what it brought")
    _add_target(explain)
    explain.set_defaults(run=_explain)

    compare = commands.add_parser("compare-hlo", help="what XLA makes of a function, before and after")
    _add_target(compare)
    compare.set_defaults(run=_compare_hlo)

    for command in (demo, bench, explain, compare):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="MODULE:FUNCTION", help="a function, as in mypackage.model:predict")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--args", metavar="MODULE:CALLABLE", help="a callable that returns a tuple of example arguments")
    given.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="DTYPE[SIZES]",
        help="an array argument, as in 'f32[8,128]'; once for each argument. Floats are drawn from a normal "
        "distribution, integers are 0 or 1",
    )
    parser.add_argument("--freeze", type=_count, default=0, metavar="N", help="take the first N arguments as known")
    parser.add_argument("--text", metavar="PATH", help="write plain text; - for standard output")
    parser.add_argument("--json", metavar="PATH", help="write JSON; - for standard output")
    parser.add_argument("--html", metavar="PATH", type=_file, help="write one page of HTML")
    _add_numerics(parser)
    _add_tune(parser)


def _add_numerics(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--numerics", choices=TIERS, default="reassociate", help="default: reassociate")


def _add_tune(parser: argparse.ArgumentParser) -> None:
    words = ", ".join(TUNES)
    parser.add_argument("--tune", type=_tune, default="auto", help=f"{words}, or a number of seconds; default: auto")


def _tune(text: str) -> Tune | float:
    if text in TUNES:
        return text  # type: ignore[return-value]
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: use one of {', '.join(TUNES)}, or a number of seconds")
    return seconds


def _positive(text: str) -> int:
    return _at_least(1, text)


def _count(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}: use a whole number, {least} or more")
    return int(text)


def _file(text: str) -> str:
    if text == "-":
        raise argparse.ArgumentTypeError("a page goes into a file; name one")
    return text


if __name__ == "__main__":
    sys.exit(main())
