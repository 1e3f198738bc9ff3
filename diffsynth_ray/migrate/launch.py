"""Commands of a script -> training commands: `accelerate launch [its arguments] train.py [flags]` and its relatives."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffsynth_ray.config.flags import KEY_OF_FLAG, WITHOUT_COUNTERPART
from diffsynth_ray.migrate.secrets import hide_secrets
from diffsynth_ray.migrate.shell import Command

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_PYTHON = re.compile(r"(.*/)?python[\d.]*")
_MODULES = {
    "accelerate.commands.launch": "accelerate",
    "accelerate.commands.accelerate_cli": "accelerate",
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torchrun",
}
_SWITCHES = {
    "quiet", "cpu", "multi_gpu", "tpu", "enable_cpu_affinity", "dynamo_use_fullgraph", "dynamo_use_dynamic",
    "dynamo_use_regional_compilation", "use_deepspeed", "use_fsdp", "use_parallelism_config", "use_megatron_lm",
    "same_network", "module", "no_python", "tpu_cluster", "no_tpu_cluster", "tpu_use_sudo", "downcast_bf16",
    "fp8_use_autocast_during_eval", "debug", "standalone", "run_path",
}  # fmt: skip
"""Arguments of accelerate and torchrun that take no value."""
_PYTHON_WITH_VALUE = {"X", "W"}


@dataclass(frozen=True)
class TrainingCommand:
    """A command that trains."""

    line: int
    launcher: Mapping[str, str]
    """Arguments of accelerate or torchrun by name, "" for switches; empty under plain python."""
    script: str
    flags: tuple[tuple[str, tuple[str, ...]], ...]
    """The script's flags in order, each with its values; values that belong to no flag are under ""."""
    environment: Mapping[str, str]
    prefix: str
    """What stands in front of the program (`nohup`, `srun ...`)."""

    @property
    def folder(self) -> str | None:
        """DiffSynth-Studio's folder of the model series, from the script's path ("wanvideo"), where it is there."""
        found = re.search(r"(?:^|/)([^/]+)/model_training/", self.script)
        return found[1] if found else None


def as_training(command: Command) -> TrainingCommand | None:
    """The command as one that trains, or None where it is another."""
    for index, word in enumerate(command.words):
        rest = command.words[index + 1 :]
        if word.rpartition("/")[2] == "accelerate" and rest[:1] == ("launch",):
            launcher, words = _launcher_arguments(rest[1:])
        elif word.rpartition("/")[2] == "torchrun":
            launcher, words = _launcher_arguments(rest)
        elif _PYTHON.fullmatch(word):
            launcher, words = _python_arguments(rest)
        else:
            continue
        if not words:
            return None
        flags = split_flags(words[1:])
        if not any(name in KEY_OF_FLAG or name in WITHOUT_COUNTERPART for name, _ in flags):
            return None
        assigned, prefix = _split_prefix(command.words[:index])
        return TrainingCommand(
            line=command.line,
            launcher=launcher,
            script=words[0],
            flags=tuple(flags),
            environment={**command.environment, **assigned},
            prefix=" ".join(hide_secrets(prefix)),
        )
    return None


def _split_prefix(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """What stands in front of the program: the variables that `env` sets, and the other words."""
    assigned, others = {}, []
    for word in words:
        if (found := _ASSIGNMENT.fullmatch(word)) is not None:
            assigned[found[1]] = found[2]
        else:
            others.append(word)
    return assigned, [] if others == ["env"] else others


def split_flags(words: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Words -> flags without their dashes, each with the words up to the next flag."""
    flags: list[tuple[str, tuple[str, ...]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            flags.append((name, (value,) if equals else ()))
        elif flags:
            flags[-1] = (flags[-1][0], (*flags[-1][1], word))
        else:
            flags.append(("", (word,)))
    return flags


def _launcher_arguments(words: Sequence[str]) -> tuple[dict[str, str], Sequence[str]]:
    """Arguments in front of the script, and the words from the script on."""
    arguments: dict[str, str] = {}
    position = 0
    while position < len(words) and words[position].startswith("-"):
        name, equals, value = words[position].lstrip("-").replace("-", "_").partition("=")
        name = {"m": "module"}.get(name, name)
        position += 1
        if not equals and name not in _SWITCHES and position < len(words):
            value = words[position]
            position += 1
        arguments[name] = value
    return arguments, words[position:]


def _python_arguments(words: Sequence[str]) -> tuple[dict[str, str], Sequence[str]]:
    position = 0
    while position < len(words) and words[position].startswith("-"):
        option = words[position].lstrip("-")
        position += 1
        if option == "m":
            module, rest = words[position : position + 1], words[position + 1 :]
            if module and module[0] in _MODULES:
                return _launcher_arguments(rest[1:] if rest[:1] == ("launch",) else rest)
            return {}, [*module, *rest]
        position += option in _PYTHON_WITH_VALUE
    return {}, words[position:]
