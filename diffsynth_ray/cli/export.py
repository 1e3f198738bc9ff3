"""`dsray export`: a LoRA under the key names of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from diffsynth_ray.cli import render
from diffsynth_ray.cli.options import Json, writing_output
from diffsynth_ray.errors import ExitCode, OutputError

Format = Literal["diffsynth", "diffusers", "comfyui", "kohya"]


def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A LoRA (.safetensors) with the key names of any tool.")],
    target: Annotated[Format, typer.Option("--format", help="The tool whose key names it gets.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where it is written; default: FORMAT in FILE's name.")
    ] = None,
    family: Annotated[
        str | None, typer.Option("--family", help="Model family; needed only where the key names fit several.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Json = False,
) -> int:
    """Write a LoRA under the key names of another tool; the values stay as they are."""
    if file.is_dir():
        raise OutputError(f"{file} is a folder; give the file of a LoRA in it")
    path = output or file.with_name(f"{file.stem}.{target}.safetensors")
    if path.is_dir():
        raise OutputError(f"{path} is a folder", hint="give a file's name with -o")
    if path.exists() and not force:
        raise OutputError(f"{path} is there already", hint="give another name with -o, or --force to replace it")
    render.say(f"reading {file}")
    from diffsynth_ray.models.convert import convert_lora
    from diffsynth_ray.train.export import write_tensors

    state, name = convert_lora(file, target=target, family=family)
    with writing_output(path):
        write_tensors(path, {key: tensor.contiguous() for key, tensor in state.items()})
    if as_json:
        render.result_json({"path": str(path), "family": name, "format": target, "num_tensors": len(state)})
    else:
        render.result(str(path))
        render.say(f"{len(state)} tensors of a LoRA for {name}, with {target}'s key names")
    return ExitCode.DONE
