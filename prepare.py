"""Prepare the data and tokenizer of a preset; score, sample and clean up runs.

    python prepare.py --preset tinystories [--vocab 1024] [--seq 512] [--files 'GLOB'] [--val-files 'GLOB'] [--no-fit]
    python prepare.py score RUN_DIR       score a finished run again
    python prepare.py sample [RUN_DIR]    generate text; --chat, a second RUN_DIR to compare, --export FOLDER
    python prepare.py doctor              check this machine and list what to fix
    python prepare.py evidence            run everything once and write an archive of the results; --check reads one
    python prepare.py clean               list or remove prepared data and downloads; --runs: checkpoints

train.py imports two names from here: SETTINGS, the settings of the preset, and `execute`, which supplies batches,
clock and seed and writes the checkpoint and the records. Importing this module does nothing.
"""

import glob
import json
import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from lab.data.shards import HELD_OUT
from lab.errors import UserError
from lab.show import (
    MINUTES,
    QUIET,
    SEED,
    VERBOSE,
    Bars,
    Finite,
    Given,
    NewFolder,
    examples,
    outlast_reader,
    silent,
    verbosity_options,
)
from lab.training.run import DEFAULT_PRESET, current_path, execute, guarded, recorded, settings
from lab.trial.sandbox import KINDS

PROMPT = "Once upon a time"
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)

__all__ = ["SETTINGS", "execute"]  # noqa: F822 (SETTINGS comes from __getattr__)


def __getattr__(name: str) -> Any:
    if name == "SETTINGS":  # read on access, not on import
        try:
            return settings()
        except UserError as error:  # raised while train.py is imported, where nothing else catches it
            sys.exit(f"error: {error}")
    raise AttributeError(f"prepare has no {name}")


@click.group(
    invoke_without_command=True,
    help="Prepare the data and tokenizer of a preset. Does nothing if they are up to date.",
    epilog=examples(
        "prepare.py --preset offline",
        "prepare.py --preset tinystories --vocab 1024 --seq 512",
        "prepare.py --files 'books/*.txt' --val-files held-out.txt",
    ),
)
@click.option("--preset", "preset_name", type=Given(), help="A preset in presets/, without .toml.  "
              f"[default: {DEFAULT_PRESET}; with --fit alone, what was prepared last]")  # fmt: skip
@click.option("--vocab", type=int, help="Vocabulary size, in tokens; 256 means raw bytes.  [default: the preset's]")
@click.option(
    "--seq",
    type=int,
    help="Context length, in tokens. Changes the task: scores are not comparable.  [default: the preset's]",
)
@click.option(
    "--files", type=Given(), help="Use your own text instead: a file, a folder or a quoted glob; parquet, jsonl or txt."
)
@click.option(
    "--val-files",
    type=Given(),
    help="A glob of validation files, with --files.  [default: 1 in 20 documents of --files, by hash]",
)
@click.option("--fit/--no-fit", default=None, help="Measure again what fits this machine, or use the preset's tier.  "
              "[default: measure once, about a minute]")  # fmt: skip
@verbosity_options("Print only the result and errors.", "Also print every setting that training starts from.")
@click.pass_context
def command(context: click.Context, **options: Any) -> None:
    if context.invoked_subcommand is None:
        outlast_reader()
        prepare(**options)
    elif any(context.get_parameter_source(name).name == "COMMANDLINE" for name in context.params):
        name = context.invoked_subcommand
        raise click.UsageError(f"{name} takes no options before its name; see prepare.py {name} --help")


def prepare(
    preset_name: str | None,
    vocab: int | None,
    seq: int | None,
    files: str | None,
    val_files: str | None,
    fit: bool | None,
    verbosity: int,
) -> None:
    """Prepare the data, fit the preset to this machine and make it current for train.py. Raises UserError."""
    from lab import preset
    from lab.data import shards
    from lab.data.corpus import open_corpus
    from lab.files import make_cache, sealed, write_atomic
    from lab.machine import hardware
    from lab.machine.fit import fitted

    if val_files and not files:
        raise UserError("--val-files (VAL_FILES=) needs --files (FILES=)")
    given = any(value is not None for value in (preset_name, vocab, seq, files))
    record = recorded() if fit and not given else None
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
    preset.validate(chosen, f"preset {preset_name} with these options")
    make_cache()
    with Bars(quiet=verbosity == QUIET) as progress:
        corpus = open_corpus(chosen.data, progress)
        prepared, rebuilt = shards.prepare(chosen, corpus, progress)
    totals, val = prepared.manifest["totals"], prepared.manifest["val"]
    if rebuilt:
        print(f"rebuilt damaged files: {', '.join(rebuilt)}")
    print(
        f"prepared {chosen.name}, vocabulary {prepared.manifest['vocab_size']}: "
        f"{totals['documents']:,} documents, {totals['bytes'] / 1e6:.1f} MB, {totals['tokens'] / 1e6:.1f}M tokens; "
        f"validation: {val['documents']:,} documents, {val['bytes']:,} bytes\n{prepared.folder}",
        flush=True,
    )
    chosen, measured = fitted(chosen, prepared.folder, fit, print if verbosity > QUIET else silent)
    record = {"preset": preset.to_dict(chosen), "tier": tier, "fit": measured, "prepared": str(prepared.folder)}
    write_atomic(current_path(), json.dumps(sealed(record), indent=1))
    if verbosity == VERBOSE:
        print("\n".join(f"{name} = {value!r}" for name, value in chosen.settings().items()))


def _expand(pattern: str | None) -> tuple[str, ...]:
    """The absolute paths that match `pattern`, if one is given; for a folder, its supported files. Raises UserError
    when there is none."""
    if not pattern:
        return ()
    pattern = os.path.expanduser(pattern)
    literal = os.path.lexists(pattern)  # brackets in an existing path are part of its name
    matches = [path for name in ([pattern] if literal else glob.glob(pattern, recursive=True)) for path in _files(name)]
    if not matches:
        raise UserError(f"no file matches {pattern!r}; check the path, and quote the pattern")
    return tuple(sorted({os.path.realpath(path) for path in matches}))


def _files(path: str) -> list[str]:
    """The files with text in a folder; a path that is no folder as it is. Raises UserError for a closed folder."""
    from lab.data.documents import READERS

    if not os.path.isdir(path):
        return [path]
    try:
        names = os.listdir(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check FILES and the permissions") from None
    paths = [os.path.join(path, name) for name in names if Path(name).suffix.lower() in READERS]
    return [path for path in paths if os.path.isfile(path)]


@command.command(
    "score",
    help="Score the checkpoint of a run again. Prints val_bpb (bits per byte), or why it was rejected.",
    epilog=examples("prepare.py score runs/latest"),
)
@click.argument("run_dir", type=FOLDER)
@click.option("--sandbox", type=click.Choice(["auto", *KINDS]), default="auto", show_default=True,
              help="Sandbox for the model process.")  # fmt: skip
@click.option("--batches", type=click.IntRange(min=1), help="Only check that this many batches can be scored.")
@click.option("--text", "part", type=click.Choice(HELD_OUT), default="val", show_default=True,
              help="val, or test: the documents that only the confirmation of a night scores.")  # fmt: skip
def score_command(run_dir: Path, sandbox: str, batches: int | None, part: str) -> None:
    from lab.scoring.score import by_upstreams_rule, score_run
    from lab.training.run import read_record
    from lab.trial.sandbox import available

    score = score_run(run_dir.resolve(), available() if sandbox == "auto" else sandbox, batches, part)
    if score["status"] == "tried":
        return
    if score["status"] != "ok":
        raise UserError(f"rejected: {score['reason']}")
    print(f"val_bpb: {score['val_bpb']:.6f}")
    record = read_record(run_dir / "settings.json", "score another run")
    print("".join(f"{line}\n" for line in by_upstreams_rule(record["preset"]["data"]["repo"], score)), end="")
    print(f"{score['scored_bytes']:,} bytes scored in {score['scoring_seconds']} s, task {score['task']}")


@command.command(
    "sample",
    help="Generate text from the checkpoint of a run, or compare two runs side by side.  [default: the latest run]",
    epilog=examples(
        "prepare.py sample --prompt 'The dog' --count 3",
        "prepare.py sample --tag nov22 runs/latest",
        "prepare.py sample --chat",
        "prepare.py sample runs/latest --export folder",
    ),
)
@click.argument("run_dirs", metavar="[RUN_DIR] [RUN_DIR]", nargs=-1, type=FOLDER)
@click.option("--tag", help="Use the best run kept in nights/TAG, before any RUN_DIR.")
@click.option("--prompt", help=f"Start of the text.  [default: {PROMPT}; with --chat, what you type]")
@click.option(
    "--tokens", type=click.IntRange(min=1), help="Maximum number of tokens.  [default: 200; with --chat, 40 per turn]"
)
@click.option(
    "--temperature",
    default=0.8,
    show_default=True,
    type=Finite(min=0),
    help="Sampling temperature; 0 always takes the most likely token.",
)
@click.option(
    "--top-k", default=50, show_default=True, type=click.IntRange(min=0), help="Sample from the top K tokens; 0: all."
)
@click.option("--seed", default=0, show_default=True, type=SEED, help="Random seed of the first text.")
@click.option("--count", default=1, show_default=True, type=click.IntRange(min=1), help="Number of texts to generate.")
@click.option("--chat", is_flag=True, help="Write a story in turns with the model.")
@click.option("--export", "folder", type=NewFolder(), help="Export the run to this folder for mlx-lm.")
def sample_command(
    run_dirs: tuple[Path, ...], tag: str | None, count: int, chat: bool, folder: Path | None, **options: Any
) -> None:
    from lab.interface.sample import best_run, last_run

    runs = [best_run(tag)] if tag else []
    runs = [*runs, *run_dirs] or [last_run()]
    if len(runs) > (1 if chat or folder else 2):
        raise UserError(f"{len(runs)} runs given; name at most two to compare, or one with --chat or --export")
    if folder:
        return export_run(runs[0], folder)
    options["tokens"] = options["tokens"] or (40 if chat else 200)
    if chat:
        return chat_with(runs[0], **options)
    options["prompt"] = PROMPT if options["prompt"] is None else os.fsencode(options["prompt"]).decode(errors="replace")
    sample(runs, count, **options)


def sample(runs: list[Path], count: int, *, seed: int, **options: Any) -> None:
    """Print `count` texts from one run, or compare two. Raises UserError."""
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
    print(f"{folder}: model.safetensors, tokenizer.json, config.json, train.py; see its README.md for how to load them")
    print(f"mlx_lm.generate --model {folder} --trust-remote-code --prompt '{PROMPT}'")


@command.command(
    "doctor",
    help="Check the machine, data, sandbox, hub and models. Exits with status 1 if something must be fixed.",
    epilog=examples("prepare.py doctor", "prepare.py doctor --json"),
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
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
    "evidence",
    help="Run everything once on this machine, and write an archive without personal data.",
    epilog=examples("prepare.py evidence", "prepare.py evidence --check evidence.tar.gz"),
)
@click.option("--check", type=click.Path(path_type=Path), help="Say whether this archive is whole and what it shows.")
@click.option("--minutes", type=MINUTES, help="Minutes of each training instead of the preset's, and no fit.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("evidence.tar.gz"),
    show_default=True,
    help="The archive to write.",
)
def evidence_command(check: Path | None, minutes: float | None, out: Path) -> None:
    from lab.interface import evidence, evidence_check

    if check is None:
        files = evidence.collect(minutes, lambda line: print(line, flush=True))
        print(f"{out}: {evidence.write(files, out)}")
    content, digest = evidence_check.read(check or out)
    lines = evidence_check.expectations(content)
    print("\n".join(map(str, lines)))
    print(f"digest {digest}\n{evidence_check.row(content, digest)}")
    if missed := sum(not line.met for line in lines):
        raise UserError(f"{missed} of {len(lines)} expectations are not met; see NOT EXPECTED above")


@command.command(
    "clean",
    help="List prepared data and downloads with their sizes, and remove the NAMES given.",
    epilog=examples("prepare.py clean", "prepare.py clean prepared/NAME", "prepare.py clean --runs --all"),
)
@click.argument("names", nargs=-1)
@click.option(
    "--all", "--yes", "everything", is_flag=True, help="Remove everything that is not marked as kept, except downloads."
)
@click.option(
    "--runs", "of_runs", is_flag=True, help="List or remove checkpoints in runs/ and nights/ instead; records stay."
)
def clean_command(names: tuple[str, ...], everything: bool, of_runs: bool) -> None:
    from lab.interface import housekeeping

    for entry in housekeeping.runs() if of_runs else housekeeping.listing():
        print(entry)
    if names or everything:
        print((housekeeping.remove_checkpoints if of_runs else housekeeping.remove)(names, everything))


if __name__ == "__main__":
    guarded(command)
