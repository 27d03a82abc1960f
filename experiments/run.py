"""The experiments, configured by Hydra.

    python -m jaxinfer.experiments.run task=bench model=[mobilenetv2,lstm] optimize=full batch=[1,8]

Groups: `model` (one of the zoo, several, or all), `optimize` (default, off, full, bitwise), `task`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from jaxinfer.experiments.task import Request, Row


def request_of(config: DictConfig) -> tuple[Callable[..., list[Row]], Request, dict[str, Any]]:
    """The task that a configuration asks for, what it is given, and options of its own.

    Raises:
        omegaconf.errors.OmegaConfBaseException: the configuration is incomplete.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    task, batch = plain["task"], plain["batch"]
    request = Request(
        models={name: options["seconds"] for name, options in plain["models"].items()},
        batches=batch if isinstance(batch, list) else [batch],
        optimize=plain["optimize"],
        tiny=plain["tiny"],
        output=Path(plain["output"]),
    )
    options = {key: value for key, value in task.items() if key not in ("name", "function")}
    return hydra.utils.get_method(task["function"]), request, options


@hydra.main(version_base="1.3", config_path="pkg://jaxinfer.configs", config_name="config")
def main(config: DictConfig) -> None:
    """Runs the task and says where its rows are; ends with status 1 where something could not be measured."""
    task, request, options = request_of(config)
    rows = task(request, **options)
    request.console.print(f"{len(rows)} rows appended to {request.output.resolve()}")
    if any("error" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
