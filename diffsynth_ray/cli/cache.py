"""`dsray cache ls | verify | gc`: the cache of encoded samples of split training."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffsynth_ray.cli import render
from diffsynth_ray.cli.options import Json
from diffsynth_ray.errors import DsrayError, ExitCode

if TYPE_CHECKING:
    from diffsynth_ray.data.cache import Cache
    from diffsynth_ray.data.upkeep import DatasetSummary

cache_app = typer.Typer(
    help="Look after the cache of encoded samples (split training).", no_args_is_help=True, rich_markup_mode=None
)
CachePath = Annotated[str, typer.Argument(metavar="CACHE", help="The cache: split.cache_path of the jobs.")]
_DEFAULT = "./cache/dsray"


@cache_app.command("ls")
def ls(cache_path: CachePath = _DEFAULT, as_json: Json = False) -> int:
    """Show the data sets in a cache and what they take."""
    from diffsynth_ray.data.upkeep import summarize

    summary = summarize(_open(cache_path))
    if as_json:
        render.result_json(asdict(summary))
        return ExitCode.DONE
    for dataset in summary.datasets:
        render.result(_dataset_line(dataset))
    extras = f", {summary.num_extras} extra inputs" if summary.num_extras else ""
    render.result(
        f"{summary.num_texts} texts and {summary.num_images} images{extras} in {summary.num_shards} shards, "
        f"{render.num_bytes(summary.num_bytes)}"
    )
    if summary.num_unused:
        render.say(
            f"{summary.num_unused} entries ({render.num_bytes(summary.unused_bytes)}) belong to no data set; "
            f"`dsray cache gc {cache_path}` shows what can go"
        )
    if summary.num_damaged:
        render.say(f"{summary.num_damaged} entries were found damaged: the next submission encodes them anew")
    return ExitCode.DONE


def _dataset_line(dataset: DatasetSummary) -> str:
    created = datetime.fromtimestamp(dataset.created).isoformat(sep=" ", timespec="minutes")
    source = dataset.source.get("metadata_path") or dataset.source.get("base_path") or dataset.source
    missing = f", {dataset.num_missing} entries missing" if dataset.num_missing else ""
    return (
        f"{dataset.id}  {created}  {dataset.num_rows} rows, {render.num_bytes(dataset.num_bytes)}{missing}  "
        f"{dataset.family} {dataset.dtype}  {source}"
    )


@cache_app.command("verify")
def verify(cache_path: CachePath = _DEFAULT, as_json: Json = False) -> int:
    """Read everything in a cache and check it against its hashes.

    What is lost is noted, so that the next submission encodes it anew; nothing is deleted. The exit code is 100 where
    something is damaged.
    """
    from diffsynth_ray.data import upkeep

    num_entries, damages = upkeep.verify(_open(cache_path), render.say)
    if as_json:
        render.result_json({"num_entries": num_entries, "damages": [asdict(damage) for damage in damages]})
    else:
        for damage in damages:
            render.result(f"{damage.name}: {damage.cause}")
        render.result(f"{num_entries} entries checked, {sum(len(damage.keys) for damage in damages)} lost")
        if damages:
            render.say("submit the job again: what is lost is encoded anew")
    return ExitCode.RUN_FAILED if damages else ExitCode.DONE


@cache_app.command("gc")
def gc(
    cache_path: CachePath = _DEFAULT,
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", metavar="ID", help="Remove this data set first; may be repeated.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only say what would be deleted.")] = False,
    as_json: Json = False,
) -> int:
    """Delete what no data set of a cache refers to.

    Files younger than a day stay: a running job may be about to use them.
    """
    from diffsynth_ray.data.upkeep import delete_garbage, find_garbage

    cache = _open(cache_path)
    garbage = find_garbage(cache, without=tuple(dataset or ()))
    if yes:
        delete_garbage(cache, garbage)
    if as_json:
        render.result_json(asdict(garbage) | {"deleted": yes})
        return ExitCode.DONE
    for name in (*garbage.datasets, *garbage.shards, *garbage.leftovers):
        render.result(name)
    what = f"{len(garbage.datasets)} data sets, {garbage.num_entries} entries, {render.num_bytes(garbage.num_bytes)}"
    render.result(f"deleted {what}" if yes else f"would delete {what}")
    if garbage.num_kept:
        render.say(f"{garbage.num_kept} unused entries stay: their shards also hold used ones")
    if not yes and (garbage.datasets or garbage.shards or garbage.leftovers):
        render.say("--yes deletes it")
    return ExitCode.DONE


def import_cache(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The --output_path of its sft:data_process.")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="CACHE", help="Cache to write to (split.cache_path).")],
    trust_pickles: Annotated[
        bool, typer.Option("--trust-pickles", help="Also unpickle PIL images. No other code of a file is ever run.")
    ] = False,
    family: Annotated[str, typer.Option("--family", help="Model family that the files were made for.")] = "qwen_image",
    as_json: Json = False,
) -> int:
    """Import a split cache of DiffSynth-Studio ({rank}/{i}.pth).

    A job with split.enabled and without [dataset] trains from it. Files that cannot be taken are told with the reason.
    """
    from diffsynth_ray.data.cache import Cache
    from diffsynth_ray.train.foreign_cache import import_cache as take

    done = take(folder, Cache(output), family=family, trust_pickles=trust_pickles, say=render.say)
    for reason in done.refused:
        render.say(f"not taken: {reason}")
    if as_json:
        render.result_json(asdict(done))
    else:
        render.result(f"{done.manifest_id}: {done.num_rows} rows imported into {output}, {len(done.refused)} not taken")
        render.say("train from it: [split] enabled = true, this cache_path, and no [dataset] base_path")
    return ExitCode.DONE


def _open(cache_path: str) -> Cache:
    from diffsynth_ray.data.cache import Cache
    from diffsynth_ray.data.upkeep import is_cache

    cache = Cache(cache_path)
    if not is_cache(cache):
        raise DsrayError(
            f"{cache_path}: no such cache", hint="name the folder that the jobs have as split.cache_path (./cache/dsray)"
        )
    return cache
