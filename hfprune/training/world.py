"""World: whether the processes that were asked for are there and know each other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from hfprune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import TrainingArguments


def check_world(args: TrainingArguments) -> None:
    """Refuses a run whose processes are fewer than its launcher was asked for, or strangers to each other.

    Both happen in silence: `accelerate launch --num_processes 2` without a mode starts one process on a machine with
    one accelerator or none, and processes that are told to look for accelerators don't find each other on a CPU.

    Raises:
        ConfigError: with the launch line that does what was asked.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > args.world_size:
        raise ConfigError(
            f"training.use_cpu: {started} processes were launched, and each is alone (world size {args.world_size}): "
            f"set use_cpu: true on a machine without accelerators"
        )
    asked = asked_of_launcher()
    if asked > args.world_size:
        raise ConfigError(
            f"--num_processes: accelerate launch was asked for {asked} processes and started {args.world_size}; use "
            f"`accelerate launch --multi_gpu --num_processes {asked} ...`, which works on CPUs too"
        )


def asked_of_launcher() -> int:
    """How many processes the `accelerate launch` that started this one was asked for; 1 where none started it."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return 1
    try:
        line = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):  # it has ended, or may not be looked at
        return 1
    options = _options(line)
    if options is None:
        return 1
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    said = launch_command_parser().parse_args(options)
    if said.num_processes is not None:
        return said.num_processes
    if said.config_file is None and (said.cpu or not Path(default_config_file).is_file()):
        return 1
    return max(1, load_config_from_file(said.config_file).num_processes)


def _options(line: list[str]) -> list[str] | None:
    """What follows `accelerate launch` in a command line; None where it is none."""
    for index, word in enumerate(line):
        name = Path(word).name
        if name == "accelerate-launch" or word.endswith(
            ("accelerate.commands.launch", "accelerate/commands/launch.py")
        ):
            return line[index + 1 :]
        if name in ("accelerate", "accelerate_cli.py", "accelerate.commands.accelerate_cli"):
            return line[index + 2 :] if line[index + 1 : index + 2] == ["launch"] else None
    return None
