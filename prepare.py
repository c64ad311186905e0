"""Prepare data and tokenizer, once; and what train.py imports.

    python prepare.py --preset tinystories [--vocab 1024] [--seq 512] [--files 'GLOB'] [--val-files 'GLOB'] [--no-fit]
    python prepare.py score RUN_DIR       rescore any finished run
    python prepare.py sample [RUN_DIR]    text from a checkpoint; --chat, a second RUN_DIR, --export FOLDER
    python prepare.py doctor              what of this machine serves a night and what does not
    python prepare.py clean               prepared data and what it takes, to be removed; --runs: checkpoints of runs

train.py takes from here the settings of the preset (SETTINGS) and `execute`, which gives it batches, clock and seed
and writes checkpoint and records. Importing this module does nothing.
"""

import glob
import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from lab.errors import UserError
from lab.show import QUIET, VERBOSE, Bars, Finite, examples, silent, verbosity_options
from lab.training.run import DEFAULT_PRESET, current_path, execute, guarded, recorded, settings
from lab.trial.sandbox import KINDS

PROMPT = "Once upon a time"
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)

__all__ = ["SETTINGS", "execute"]  # noqa: F822 (SETTINGS is made when asked for)


def __getattr__(name: str) -> Any:
    if name == "SETTINGS":  # read when asked for, not when imported
        try:
            return settings()
        except UserError as error:  # train.py asks while it is imported, where nothing else would catch it
            sys.exit(f"error: {error}")
    raise AttributeError(f"prepare has no {name}")


@click.group(
    invoke_without_command=True,
    help="Prepare text and tokenizer for a preset: once; again is a no-op.",
    epilog=examples(
        "prepare.py --preset offline",
        "prepare.py --preset tinystories --vocab 1024 --seq 512",
        "prepare.py --files 'books/*.txt' --val-files held-out.txt",
    ),
)
@click.option("--preset", "preset_name", help="Name of a file in presets/.  "
              f"[default: {DEFAULT_PRESET}; with --fit alone what was prepared last]")  # fmt: skip
@click.option("--vocab", type=int, help="Tokens in the vocabulary; 256 means pure bytes.  [default: the preset's]")
@click.option("--seq", type=int, help="Tokens of context. Another task: not comparable.  [default: the preset's]")
@click.option("--files", help="Your own text in place of the preset's: a glob of parquet, jsonl or txt files.")
@click.option("--val-files", help="Validation text of your own.  [default: 1 in 20 documents of --files, by hash]")
@click.option("--fit/--no-fit", default=None, help="Measure anew what fits this machine, or take the preset's tier.  "
              "[default: measured once, about a minute]")  # fmt: skip
@verbosity_options("Only what was prepared, and errors.", "Also every setting that training starts from.")
@click.pass_context
def command(context: click.Context, **options: Any) -> None:
    if context.invoked_subcommand is None:
        prepare(**options)
    elif given := [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]:
        names = ", ".join(given)
        raise click.UsageError(f"{names}: options of prepare itself, which {context.invoked_subcommand} does not take")


def prepare(
    preset_name: str | None,
    vocab: int | None,
    seq: int | None,
    files: str | None,
    val_files: str | None,
    fit: bool | None,
    verbosity: int,
) -> None:
    """Prepare, say what there is, and make it what train.py trains on, fitted to this machine. Raises UserError."""
    from lab import preset
    from lab.data import shards
    from lab.data.corpus import open_corpus
    from lab.files import write_atomic
    from lab.machine import hardware
    from lab.machine.fit import fitted

    if val_files and not files:
        raise UserError("--val-files (VAL_FILES=) needs --files (FILES=)")
    named = [value for value in (preset_name, vocab, seq, files) if value is not None]
    record = recorded() if fit and not named else None
    last = preset.from_dict(record["preset"]) if record else None
    preset_name = preset_name or (last.name if last else DEFAULT_PRESET)
    chosen, tier = preset.adapt(preset.load(preset_name), hardware.hardware())
    if last:
        chosen = replace(chosen, data=last.data)
        vocab, seq = last.tokenizer.vocab_size, last.task.sequence_length
    chosen = preset.override(chosen, vocab_size=vocab, sequence_length=seq)
    if files:
        own = replace(chosen.data, source="files", train_files=_expand(files), val_files=_expand(val_files))
        chosen = replace(chosen, data=own)
    preset.validate(chosen, f"preset {preset_name} as asked for")
    with Bars(quiet=verbosity == QUIET) as progress:
        corpus = open_corpus(chosen.data, progress)
        prepared, rebuilt = shards.prepare(chosen, corpus, progress)
    totals, val = prepared.manifest["totals"], prepared.manifest["val"]
    if rebuilt:
        print(f"damaged and rebuilt: {', '.join(rebuilt)}")
    print(
        f"prepared {chosen.name}, vocabulary {prepared.manifest['vocab_size']}: "
        f"{totals['documents']:,} documents, {totals['bytes'] / 1e6:.1f} MB, {totals['tokens'] / 1e6:.1f}M tokens; "
        f"scored: {val['documents']:,} documents, {val['bytes']:,} bytes\n{prepared.folder}",
        flush=True,
    )
    chosen, found = fitted(chosen, prepared.folder, fit, print if verbosity > QUIET else silent)
    current_path().parent.mkdir(parents=True, exist_ok=True)
    record = {"preset": preset.to_dict(chosen), "tier": tier, "fit": found, "prepared": str(prepared.folder)}
    write_atomic(current_path(), json.dumps(record, indent=1))
    if verbosity == VERBOSE:
        print("\n".join(f"{name} = {value!r}" for name, value in chosen.settings().items()))


def _expand(pattern: str | None) -> tuple[str, ...]:
    """Absolute paths that match, none for no pattern. Raises UserError when a pattern matches nothing."""
    if not pattern:
        return ()
    found = [str(Path(name).resolve()) for name in glob.glob(pattern, recursive=True)]
    if not found:
        raise UserError(f"no file matches {pattern!r}; check the path (quote the pattern)")
    return tuple(sorted(found))


@command.command(
    "score",
    help="Score the checkpoint of a run again: val_bpb in bits per byte, or why it may not have one.",
    epilog=examples("prepare.py score runs/latest"),
)
@click.argument("run_dir", type=FOLDER)
@click.option("--sandbox", type=click.Choice(["auto", *KINDS]), default="auto", show_default=True, help="Of the model.")
@click.option("--batches", type=click.IntRange(min=1), help="Only see whether this many batches would work.")
def score_command(run_dir: Path, sandbox: str, batches: int | None) -> None:
    from lab.scoring.score import score_run
    from lab.trial.sandbox import available

    score = score_run(run_dir.resolve(), available() if sandbox == "auto" else sandbox, batches)
    if score["status"] == "tried":
        return
    if score["status"] != "ok":
        raise UserError(f"rejected: {score['reason']}")
    print(f"val_bpb: {score['val_bpb']:.6f}")
    print(f"{score['scored_bytes']:,} bytes scored in {score['scoring_seconds']} s, task {score['task']}")


@command.command(
    "sample",
    help="Write text with the checkpoint of a run, or with those of two, side by side.  [default: the last one]",
    epilog=examples(
        "prepare.py sample --prompt 'The dog' --count 3",
        "prepare.py sample --tag nov22 runs/latest",
        "prepare.py sample --chat",
        "prepare.py sample runs/latest --export folder",
    ),
)
@click.argument("run_dirs", metavar="[RUN_DIR] [RUN_DIR]", nargs=-1, type=FOLDER)
@click.option("--tag", help="The best model that this night kept, before the runs that are named.")
@click.option("--prompt", help=f"What the text starts with.  [default: {PROMPT}; in a chat what you type]")
@click.option(
    "--tokens", type=click.IntRange(min=1), help="Length at most, in tokens.  [default: 200; 40 a turn in a chat]"
)
@click.option(
    "--temperature",
    default=0.8,
    show_default=True,
    type=Finite(min=0),
    help="0 always takes the likeliest token.",
)
@click.option(
    "--top-k", default=50, show_default=True, type=click.IntRange(min=0), help="Choose among this many tokens; 0: all."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the choice.")
@click.option("--count", default=1, show_default=True, type=click.IntRange(min=1), help="Texts, each of its own seed.")
@click.option("--chat", is_flag=True, help="Write a story in turns: your sentence, the model's, yours.")
@click.option("--export", "folder", type=click.Path(path_type=Path), help="Write the run to a folder for other tools.")
def sample_command(
    run_dirs: tuple[Path, ...], tag: str | None, count: int, chat: bool, folder: Path | None, **options: Any
) -> None:
    from lab.interface.sample import best_run, last_run

    runs = [best_run(tag)] if tag else []
    runs = [*runs, *run_dirs] or [last_run()]
    if len(runs) > (1 if chat or folder else 2):
        raise UserError(f"{len(runs)} runs are too many: two can be compared, and one is for --chat or --export")
    if folder:
        return export_run(runs[0], folder)
    options["tokens"] = options["tokens"] or (40 if chat else 200)
    if chat:
        return chat_with(runs[0], **options)
    options["prompt"] = PROMPT if options["prompt"] is None else options["prompt"]
    sample(runs, count, **options)


def sample(runs: list[Path], count: int, *, seed: int, **options: Any) -> None:
    """Write `count` texts by one run, or by two for comparison. Raises UserError."""
    from rich.console import Console

    from lab.interface.sample import compare, confinement, opened

    with ExitStack() as stack:
        models = [stack.enter_context(opened(run, confinement(run))) for run in runs]
        for number in range(count):
            if len(models) > 1:
                compare(models, Console(), seed=seed + number, **options)
                continue
            for piece in models[0].write(seed=seed + number, **options):
                print(piece, end="", flush=True)
            print("\n" if number + 1 < count else "")


def chat_with(run: Path, *, prompt: str | None, **options: Any) -> None:
    from lab.interface.chat import Chat
    from lab.interface.sample import confinement, opened

    with opened(run, confinement(run)) as model:
        Chat(model, **options).talk(prompt)


def export_run(run: Path, folder: Path) -> None:
    from lab.interface.export import export

    export(run, folder)
    print(f"{folder}: model.safetensors, tokenizer.json, config.json, train.py; its README.md says how to load them")
    print(f"mlx_lm.generate --model {folder} --trust-remote-code --prompt '{PROMPT}'")


@command.command(
    "doctor",
    help="Look at machine, data, sandbox, hub and models. Exit status 1 if something must be mended.",
    epilog=examples("prepare.py doctor", "prepare.py doctor --json"),
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor_command(as_json: bool) -> None:
    from rich.console import Console

    from lab.interface import doctor

    doctor.end_at_interrupt()
    console, findings = Console(), []
    for finding in doctor.examine():
        findings.append(finding)
        if not as_json:
            console.print(doctor.as_text(finding), soft_wrap=True)
    if as_json:
        print(doctor.as_json(findings))
    if any(finding.level == "failure" for finding in findings):
        sys.exit(1)


@command.command(
    "clean",
    help="List prepared data and downloads, or runs, with their sizes in MB; remove what is named.",
    epilog=examples("prepare.py clean", "prepare.py clean prepared/NAME", "prepare.py clean --runs --all"),
)
@click.argument("names", nargs=-1)
@click.option("--all", "--yes", "everything", is_flag=True, help="Remove all that is not kept, downloads excepted.")
@click.option(
    "--runs", "of_runs", is_flag=True, help="Of runs/ and nights: checkpoints. What a run wrote about itself stays."
)
def clean_command(names: tuple[str, ...], everything: bool, of_runs: bool) -> None:
    from lab.interface import housekeeping

    for entry in housekeeping.runs() if of_runs else housekeeping.listing():
        print(entry)
    if names or everything:
        print((housekeeping.remove_checkpoints if of_runs else housekeeping.remove)(names, everything))


if __name__ == "__main__":
    guarded(command)
