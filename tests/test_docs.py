"""The documentation against the program: its commands run, its links lead somewhere, its tables leave nothing out.

Commands of `sh` blocks are RUN in order, as a reader would, in a clone whose presets take a second; what cannot be run
here is PARSED: make resolves it, and the script's own command line accepts it. A command in neither list fails.
"""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys

import click
import pytest
from checkout import Checkout
from conftest import ROOT, documents, environment, write_jsonl

import agent_loop
import prepare
from lab import preset
from lab.loop.history import FIELDS
from lab.machine.condition import Condition
from lab.training import run

PAGES = [ROOT / "README.md", ROOT / "program.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page: page.read_text() for page in PAGES}
COMMANDS, LOOP, PRESETS = (TEXT[ROOT / "docs" / f"{name}.md"] for name in ("COMMANDS", "LOOP", "PRESETS"))

NIGHT = "MINUTES=0.02 EXPERIMENTS=0 RIGOR=none"  # the baseline alone: test_loop.py runs experiments
DEMO = "make agent PRESET=offline AGENT=search TAG=demo EXPERIMENTS=3 MINUTES=0.2"
TRY = ".venv/bin/python agent_loop.py try --tag mine"
RUN = {  # command -> (what is added so that it takes seconds, what it must print)
    "make": ("", r"train +train for five minutes"),
    "make train PRESET=offline": ("", r"---\nval_bpb: +\d"),
    "make sample": ("", "Once upon a time"),
    "make sample CHAT=1": ("PROMPT='The dog' TOKENS=5 </dev/null", r"\w"),
    "make sample RUN=runs/A AGAINST=runs/B": ("RUN=runs/latest AGAINST=runs/latest TOKENS=5", "val_bpb"),
    "make sample EXPORT=exports/story": ("", "exports/story: model.safetensors"),
    "make doctor": ("", r"(ok +data +offline|warning +data +offline.* times slower)"),
    DEMO: (NIGHT, r"demo: 0 experiments: (.*\n)+.*resume with: python agent_loop.py run --tag demo"),
    "make status": ("", "demo: 0 experiments"),
    "make status TAG=demo": ("", "demo: 0 experiments"),
    "make report": ("", "progress.png"),
    "git log --oneline -5 autoresearch/demo": ("", "start"),
    "git diff HEAD autoresearch/demo -- train.py": ("", ""),
    "git checkout autoresearch/demo -- train.py": ("", ""),
    "git worktree remove --force nights/demo/worktree": ("", ""),
    "git branch -D autoresearch/demo": ("", "Deleted branch"),
    "rm -r nights/demo": ("", ""),
    "make prepare PRESET=offline VOCAB=512": ("NO_FIT=1", "prepared offline, vocabulary 512"),
    "make prepare PRESET=offline SEQ=128": ("NO_FIT=1", "prepared offline"),
    "make prepare PRESET=tinystories FILES='books/*.txt'": ("NO_FIT=1", "prepared tinystories"),
    "make prepare PRESET=tinystories FILES='a/*.jsonl' VAL_FILES='b.jsonl'": ("NO_FIT=1", "prepared tinystories"),
    "make train": ("", r"preset tinystories(.*\n)+val_bpb: +\d"),
    "make lint": ("", "All checks passed"),
}
HUB, HOURS, SERVER, CLI = "needs the hub", "until stopped", "needs a real Ollama", "needs a coding CLI and an account"
PARSED = {  # command -> why it is not run
    "make test": "this",
    "make setup": "installs",
    "make lock": "needs the registry",
    "make prepare PRESET=tinystories": HUB,
    "make prepare PRESET=tinystories VOCAB=256": HUB,
    "make prepare PRESET=fineweb": HUB,
    "make agent": HOURS,
    "make agent UNTIL=07:00": HOURS,
    "make confirm": "needs a kept change: loop/test_confirm.py",
    "make report WATCH=1": HOURS,
    "make suggest TEXT='DEPTH=3'": "an experiment more: test_suggestions.py",
    "make suggest TEXT='MATRIX_LR=0.03 DEPTH=3'": "the same",
    "make suggest TEXT=averaged_weights": "the same",
    "make suggest TEXT='try a longer warm-down' TAG=demo": "the same",
    "make skip WHY='worse from the start'": "the same",
    ".venv/bin/python agent_loop.py replay 1 --tag demo": "a training run more: test_loop.py",
    f"{TRY} --preset offline -m start": "two training runs more: test_loop.py",
    f'{TRY} -m "what I changed and why"': "the same",
    "ollama pull qwen2.5-coder:1.5b": SERVER,
    "make agent AGENT=ollama MODEL=qwen2.5-coder:1.5b": SERVER,
    "make agent AGENT=openai": SERVER,
    "make agent AGENT=openai BASE_URL=http://127.0.0.1:1234/v1 MODEL=qwen2.5-coder-7b-instruct": SERVER,
    "make agent AGENT=ollama MODEL=qwen2.5-coder:7b UNTIL=07:00": SERVER,
    **dict.fromkeys(re.findall(r"^make agent AGENT=command COMMAND='(?:claude|codex|gemini|opencode|aider) .*'$",
                               TEXT[ROOT / "docs/AGENTS.md"], re.M), CLI),
}  # fmt: skip


def commands() -> list[str]:
    """The lines of every `sh` block, without comments."""
    blocks = [block for text in TEXT.values() for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)]
    lines = [re.sub(r"(^|\s{2,})# .*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def inline() -> list[str]:
    """Calls of the program in running text; `...` and an assignment to nothing stand for any value."""
    code = [" ".join(span.split()) for text in TEXT.values() for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    return sorted({span for span in code if re.match(r"make [a-z]|(\.venv/bin/)?python \w+\.py ", span)})


def test_every_command_of_the_documentation_is_known():
    assert sorted(set(commands())) == sorted(RUN | PARSED)


# ---- run


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess]:
    """Every command of RUN, one after the other in one clone."""
    checkout = Checkout(tmp_path_factory.mktemp("docs"))
    small = example().replace("sequence_length = 128", "sequence_length = 64\nminutes = 0.02")
    for much, little in (("8_000_000", "300_000"), ("60_000", "20_000"), ("depth = 4", "depth = 2"), ("2048", "512")):
        small = small.replace(much, little)
    for name in ("offline", "tinystories"):
        (checkout.folder / "presets" / f"{name}.toml").write_text(small.replace("rows = 16", "rows = 8"))
    checkout.git("commit", "--quiet", "-am", "start small")
    for folder in ("books", "a"):
        (checkout.folder / folder).mkdir()
    (checkout.folder / "books" / "all.txt").write_text("\n\n".join(documents(300)))
    write_jsonl(checkout.folder / "a" / "train.jsonl", documents(300))
    write_jsonl(checkout.folder / "b.jsonl", documents(20, seed=8))
    (checkout.folder / ".venv").symlink_to(sys.prefix)
    done = {command: walk(checkout, f"{command} {more}") for command, (more, _) in RUN.items()}
    return done | {"journal": checkout.kept}


def walk(checkout: Checkout, command: str) -> subprocess.CompletedProcess:
    journal = checkout.folder / "nights" / "demo" / "journal.jsonl"
    if journal.exists():
        checkout.kept = journal.read_text()
    # The environment is there: make must not install it again because the clone's requirements.txt is younger.
    command = re.sub(r"^make\b", "make -o .venv/.ready", command)
    where = {"cwd": checkout.folder, "env": environment(checkout.cache, OLLAMA_HOST="127.0.0.1:9")}
    return subprocess.run(command, shell=True, **where, capture_output=True, text=True, timeout=240)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("command", RUN)
def test_a_command_of_the_documentation_runs(walked, command):
    done, printed = walked[command], RUN[command][1]
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(printed, done.stdout), done.stdout


# ---- parsed


def script_calls(command: str) -> list[list[str]]:
    """The calls of our scripts that a command makes: script and arguments."""
    words = [command]
    if command.startswith("make"):
        shown = subprocess.run(["make", "-n", "-o", ".venv/.ready", *shlex.split(command)[1:]], cwd=ROOT,
                               capture_output=True, text=True)  # fmt: skip
        assert shown.returncode == 0, shown.stderr
        words = shown.stdout.replace("\\\n", " ").splitlines()
    calls = [shlex.split(line) for line in words if re.search(r"\b(prepare|train|agent_loop)\.py\b", line)]
    return [call[next(i for i, word in enumerate(call) if re.fullmatch(r"\w+\.py", word)) :] for call in calls]


def train_command(monkeypatch) -> click.Command:
    made = []
    monkeypatch.setattr(run, "guarded", made.append)
    run.execute(lambda run: None, "train.py")
    return made[0]


def every_command(top: click.Command) -> list[click.Command]:
    return [top, *(getattr(top, "commands", {}).values())]


@pytest.fixture
def accept(monkeypatch):
    """Parse a call of a script as it would itself, doing nothing then."""
    train = train_command(monkeypatch)
    scripts = {"prepare.py": prepare.command, "agent_loop.py": agent_loop.command, "train.py": train}
    for command in [command for top in scripts.values() for command in every_command(top)]:
        monkeypatch.setattr(command, "callback", lambda **_: None)
        for path in [param.type for param in command.params if isinstance(param.type, click.Path)]:
            monkeypatch.setattr(path, "exists", False)  # a run that the reader has
    return lambda call: scripts[call[0]].main(call[1:], prog_name=call[0], standalone_mode=False)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("command", [*PARSED, *inline()])
def test_a_command_that_is_not_run_is_accepted(accept, command):
    calls = script_calls(command)
    targets = ("test", "setup", "lock", "lint", "format", "clean", "pull", "bench", "fuzz", "torture", "soak")
    assert calls or command.split()[1] in targets
    for call in calls:
        accept(call)
    if PARSED.get(command) == CLI:  # what the shell gets: the briefing, and a syntax that it knows
        given = calls[-1][calls[-1].index("--command") + 1]
        assert "briefing.md" in given
        assert "$$" not in given
        assert subprocess.run(["sh", "-n", "-c", given]).returncode == 0


def test_a_wrong_option_would_not_be_accepted(accept):
    with pytest.raises(click.UsageError):
        accept(["agent_loop.py", "run", "--agents", "search"])
    with pytest.raises(click.UsageError):
        accept(["train.py", "--minutes", "soon"])


# ---- links, names, tables


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_and_named_files_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target.read_text()), link
    ours = r"`((?:lab|tests|docs|benchmarks|presets|\.github)/[\w./-]+\.\w+)`"
    missing = [name for name in re.findall(ours, page.read_text()) if not (ROOT / name).exists()]
    assert [name for name in missing if name != "presets/mine.toml"] == []


def test_every_target_and_variable_of_make_is_documented():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^([a-z-]+) ", shown, re.M)
    assert len(targets) > 10
    assert [name for name in targets if f"make {name}" not in COMMANDS and name != "help"] == []
    assert [name for name in set(re.findall(r"\b[A-Z_]+=", shown)) if f"`{name}" not in COMMANDS] == []


def test_every_option_is_explained(monkeypatch):
    text = "\n".join(TEXT.values())
    scripts = [prepare.command, agent_loop.command, train_command(monkeypatch)]
    for command in [command for script in scripts for command in every_command(script)]:
        for option in [param for param in command.params if isinstance(param, click.Option)]:
            name = option.opts[-1]
            assert option.help or f"{name.removeprefix('--').upper()}=" in text, f"{command.name} {name}"


KINDS = {str: "text", int: "integer", float: "number"}
KINDS |= {tuple[str, ...]: "list of texts", tuple[int, ...]: "two integers"}


def test_every_key_of_a_preset_is_documented():
    for section, kind in preset.SECTIONS.items():
        part = PRESETS.partition(f"\n### [{section}]\n")[2].partition("\n#")[0]
        rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", part, re.M))
        assert set(rows) == {field.name for field in dataclasses.fields(kind)}, section
        for field in dataclasses.fields(kind):
            assert rows[field.name].startswith(KINDS[field.type]), field.name
            assert ("default" in rows[field.name]) == (field.default is not dataclasses.MISSING), field.name
    tiers = PRESETS.partition("\n## Tiers\n")[2]
    assert [f.name for f in dataclasses.fields(preset.Hardware) if f"| `{f.name}` |" not in tiers] == []


def example() -> str:
    return re.search(r"^```toml\n(.*?)^```", PRESETS, re.M | re.S)[1]


def test_the_preset_of_the_documentation_loads(tmp_path):
    (tmp_path / "mine.toml").write_text(example())
    loaded = preset.load("mine", tmp_path)
    assert preset.adapt(loaded, preset.Hardware("metal", 36.0, 30))[0].model.depth == 6
    assert preset.adapt(loaded, preset.Hardware("cpu", 16.0, 0))[0] == loaded


def event_fields() -> dict[str, set[str]]:
    """Event -> fields, as the table of the journal in docs/LOOP.md says."""
    table = LOOP.partition("| event | when |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`[\w`, ]+`) \| [^|]+ \| (`[\w`, ]+`) \|$", table, re.M)
    return {name: set(re.findall(r"\w+", fields)) for names, fields in rows for name in re.findall(r"\w+", names)}


def test_every_field_of_the_journal_is_documented(walked):
    table = event_fields()
    assert {event: set(fields) for event, fields in FIELDS.items()} == {
        event: table.get(event, set()) & set(FIELDS[event]) for event in FIELDS
    }
    explained = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[\w`, ]+`) \|", LOOP, re.M))))
    assert set().union(*table.values(), {field.name for field in dataclasses.fields(Condition)}) - explained == set()
    records = [json.loads(line) for line in walked["journal"].splitlines()]
    assert {record["event"] for record in records} >= {"start", "proposal", "run", "verdict", "kept"}
    for record in records:
        assert set(record) - table[record["event"]] == {"n", "time", "event", "check"}, record
