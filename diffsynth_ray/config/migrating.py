"""The flag table for users of DiffSynth-Studio in Markdown, made from `flags.py`; `python -m` this module writes it."""

from __future__ import annotations

import sys

from diffsynth_ray.config import schema
from diffsynth_ray.config.flags import FAMILY_OPTIONS, KEY_OF_FLAG, WITHOUT_COUNTERPART

_HEAD = """\
# Coming from DiffSynth-Studio

Made from the code by `python -m diffsynth_ray.config.migrating > jobs/MIGRATING.md`; do not edit.

```
dsray import train.sh -o job.toml        # a script with one training
dsray import train.sh -o jobs/           # several: one job each, to be submitted together and in order
dsray plan job.toml
dsray submit job.toml
```

reads a launch script and writes job files with comments. It follows line continuations, quotes, comments, variables,
arrays and JSON arguments; `accelerate launch`, `torchrun` and `python`; accelerate's YAML with DeepSpeed, which the script
names or `--config_file` gives. Nothing of the script is run. What has no counterpart is listed in the file and on the
terminal.

| in the script | in the job |
| --- | --- |
| `--task sft:data_process` and the `sft:train` that reads its output | one job with `[split] enabled = true` |
| several trainings | one job each; a later one may name files of an earlier one |
| comma lists, JSON strings | arrays |
| switches (`--enable_csv_log`) | `true` |
| `--save_steps N` with accumulation | divided: it counts micro steps there, optimizer steps here |
| `--cpu_offload_split_threshold N` | `param_size_threshold = 2 N`: millions of parameters there, MB here (bf16) |
| accelerate's `num_processes` | `[distributed] num_workers` |
| `offload_param_device: cpu` with ZeRO-2 | left out: it has no effect there either |
| accelerate's `gradient_accumulation_steps` under DeepSpeed | wins over the script's, as in accelerate |
| `modelscope download` | a comment: run it first |
| `DIFFSYNTH_MODEL_BASE_PATH`, `..._SKIP_DOWNLOAD`, `..._DOWNLOAD_SOURCE` | `[model] base_path`, `skip_download`, `source` |
| `CUDA_VISIBLE_DEVICES` | the number of workers: which GPUs they get, Ray decides |
| other environment variables | listed; secrets are not copied |
| tokens, keys and passwords of other commands (`wandb login`, `--token`, URLs) | shown as `***` |
"""


def build_page() -> str:
    """The whole page."""
    parts = [_HEAD, "## Flags and their keys\n"]
    order = list(schema.keys())
    rows = sorted(KEY_OF_FLAG.items(), key=lambda item: (order.index(item[1]), item[0]))
    table = [f"| `--{flag}` | {_place(flag, key)} | {_meaning(key)} |" for flag, key in rows]
    parts.append("\n".join(["| flag | key | meaning |", "| --- | --- | --- |", *table]) + "\n")
    parts.append("## Flags without a key\n")
    without = [f"| `--{flag}` | {reason} |" for flag, reason in sorted(WITHOUT_COUNTERPART.items())]
    parts.append("\n".join(["| flag | why, and what does its work |", "| --- | --- |", *without]) + "\n")
    return "\n".join(parts)


def _place(flag: str, key: str) -> str:
    if key == FAMILY_OPTIONS:
        return f"`[model] options = {{ {flag} = ... }}`"
    section, _, leaf = key.rpartition(".")
    return f"`[{section}] {leaf}`" if section else f"`{leaf}`"


def _meaning(key: str) -> str:
    return " ".join((schema.keys()[key].description or "").split()).replace("|", "\\|")


def main() -> None:
    """Write the page to stdout."""
    sys.stdout.write(build_page())


if __name__ == "__main__":
    main()
