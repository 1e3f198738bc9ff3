"""`dsray download`: models of a job file, or a data set, ahead of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffsynth_ray.cli import render
from diffsynth_ray.cli.options import Json, Overrides
from diffsynth_ray.errors import DsrayError, ExitCode, JobFileError


def download(
    job_file: Annotated[
        str | None, typer.Argument(metavar="JOB.toml", help="A job file or shipped recipe, whose model is fetched.")
    ] = None,
    overrides: Overrides = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", metavar="OWNER/NAME", help="A data set repository, instead of a job.")
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="PATTERN", help="Files of the data set, as 'qwen_image/*'; may be repeated."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Where the data set goes; else ./data/NAME.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Fetch a job's model, or a data set, ahead of a run.

    What is there is left alone, what was cut goes on from where it was. Runs fetch what they lack by themselves.
    """
    if (job_file is None) == (dataset is None):
        raise DsrayError("give a job file, or --dataset OWNER/NAME")
    if dataset is None and (include or output):
        raise DsrayError("--include and --output belong to --dataset; a model goes to model.base_path")
    if job_file is not None:
        files = _model_files(job_file, overrides)
    else:
        assert dataset is not None
        files = _dataset_files(dataset, include or [], output)
    if as_json:
        render.result_json({"files": [str(path) for path in files]})
    else:
        for path in files:
            render.result(str(path))
    return ExitCode.DONE


def _model_files(job_file: str, overrides: list[str] | None) -> list[Path]:
    from diffsynth_ray.config.load import load_job
    from diffsynth_ray.config.resolve import resolve_model

    model = resolve_model(load_job(job_file, overrides), source=job_file)
    if model.tiny:
        render.say("model.tiny has random weights: nothing to download")
        return []
    from diffsynth_ray.models.download import download_model

    family, components, folders = download_model(model, render.say)
    render.say(f"{family}: {', '.join(components)} are complete")
    return [path for component in components.values() for path in component.paths] + list(folders.values())


def _dataset_files(repo: str, include: list[str], output: Path | None) -> list[Path]:
    from diffsynth_ray.config.origins import parse_origin
    from diffsynth_ray.config.resolve import with_source
    from diffsynth_ray.config.schema import ModelSection

    parse_origin(f"{repo}:")
    model, problems = with_source(ModelSection())
    if problems:
        raise JobFileError("environment", problems)
    from diffsynth_ray.models.download import download_dataset

    folder = output or Path("data") / repo.partition("/")[2]
    assert model.source is not None  # with_source has filled it in
    return download_dataset(repo, include, source=model.source, output=folder.absolute(), say=render.say)
