"""progress.png and one self-contained report.html from a night's journal, runs and branch.

Values, verdicts and noise are those of the journal; diffs come from the branch, loss curves from the runs that are
still on disk. The models write the sample stories in the sandbox, where they are also scored.
"""

import base64
import difflib
import html
import http.server
import io
import string
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from lab.errors import UserError, one_line, visible
from lab.files import ROOT, write_atomic
from lab.interface.plot import count, picture, short
from lab.loop.confirm import Gain, confirmed
from lab.loop.git import run
from lab.loop.history import Experiment, State
from lab.loop.journal import Journal, lock, read
from lab.loop.suggestions import Suggestions
from lab.loop.verdict import Run
from lab.trial.curve import read_curve
from lab.trial.sandbox import available

TEMPLATE = Path(__file__).with_suffix(".html")
WATCH_SECONDS = 60  # between reloads of a watched page
CURVE_POINTS = 60  # of one loss curve
DIFF_LINES, DIFF_CHARS = 120, 500  # shown of one experiment, and of each line
PROMPTS = ("Once upon a time", "One day, Lily found", "The dog was sad because")
STORY_TOKENS = 120


@dataclass
class Report:
    """The data of the report on one night."""

    folder: Path
    state: State
    runs: list[dict[str, Any]]  # the journal's "run" events
    parents: dict[int, Experiment] = field(default_factory=dict)  # experiment -> the incumbent it was judged against


def write_report(folder: Path, stories: str | None = None) -> list[Path]:
    """Write progress.png and report.html into a night's folder and return their paths.

    `stories`: HTML made by `sample_stories`, or None."""
    report = collect(folder)
    (folder / "progress.png").write_bytes(picture(report.state, folder.name))
    write_atomic(folder / "report.html", page(report, stories))
    return [folder / "report.html", folder / "progress.png"]


def serve(folder: Path, port: int, log: Callable[[str], None]) -> None:
    """Serve report.html on 127.0.0.1, rendered again when the journal has changed, until Ctrl-C."""

    drawing, kept = threading.Lock(), {}  # state of the journal -> page; matplotlib's style is global

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 10  # seconds; a browser opens connections that it does not use

        def do_GET(self) -> None:
            if self.path not in ("/", "/report.html"):
                return self.send_error(404)
            with drawing:
                state = (folder / "journal.jsonl").stat()
                key = (state.st_size, state.st_mtime_ns)
                if key not in kept:
                    kept.clear()
                    kept[key] = page(collect(folder), None, WATCH_SECONDS).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(kept[key])))
            self.end_headers()
            self.wfile.write(kept[key])

        def log_message(self, *args: Any) -> None:
            pass

    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UserError(f"cannot use port {port} ({error.strerror}); choose another with --port") from None
    log(f"serving night {folder.name} on http://127.0.0.1:{server.server_port}/ (Ctrl-C stops)")
    with server:
        server.serve_forever()


def collect(folder: Path) -> Report:
    """The journal of a night, and the incumbent of each experiment."""
    journal = Journal(folder)
    report = Report(folder, journal.state, [r for r in read(journal.path) if r["event"] == "run"])
    incumbent = None
    for experiment in journal.state.experiments:
        if incumbent:
            report.parents[experiment.id] = incumbent
        if experiment.status == "keep":
            incumbent = experiment
    return report


# ---------------------------------------------------------------------------------------------------------------------
# The page


def page(report: Report, stories: str | None, refresh: int = 0) -> str:
    """report.html: one file, nothing from the network. `refresh`: seconds between reloads, 0 for never."""
    sources = _sources(report)
    curves = {e.id: _curve(report, e) for e in report.state.settled}
    found = confirmed(report.state)
    shares = found.shares if found else {}
    rows = "\n".join(_row(report, e, sources, curves, shares) for e in report.state.settled)
    tag = report.folder.name
    pictures = {
        f"{'dark' if dark else 'light'}_{'narrow' if narrow else 'wide'}": base64.b64encode(
            picture(report.state, tag, dark, narrow)
        ).decode()
        for dark in (False, True)
        for narrow in (False, True)
    }
    best = report.state.incumbent
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(f"Night {tag}"),
        lead=html.escape(summary(report)),
        **pictures,
        rows=rows,
        suggestions="".join(f'<p class="quiet">{html.escape(line)}</p>' for line in suggestions(report)),
        stories=stories or '<p class="quiet">No stories: they need the checkpoints of baseline and best.</p>',
        machine=_machine(report),
        reproduce=html.escape(
            f"python agent_loop.py replay --tag {tag} {best.id}     # train and score it again with another seed\n"
            f"git checkout {best.commit[:12]} -- train.py   # copy it into your checkout"
            if best
            else "no experiment is finished yet"
        ),
        footer=html.escape(
            f"Written {datetime.now():%Y-%m-%d %H:%M} from {report.folder.name}/journal.jsonl. val_bpb: bits per byte "
            "of the validation text, lower is better: the baseline's mean, and for others what was gained on it at "
            "equal seeds. delta: against the incumbent; ±: its standard error."
        ),
        watch=f"setTimeout(() => location.reload(), {1000 * refresh});" if refresh else "",
    )


def suggestions(report: Report) -> list[str]:
    """What a person suggested and is not an experiment: it waits, or was refused."""
    return Suggestions(report.folder).lines(report.state.suggestions)


def summary(report: Report) -> str:
    """The night in three sentences."""
    state = report.state
    best = state.incumbent
    if not best:
        return "No experiment is finished yet."
    counts, tried = state.counts(), state.tried_out
    base, gain = state.baseline.val_bpb, state.baseline.val_bpb - best.val_bpb
    spent = sum(e.minutes for e in state.settled)
    took = f"{spent / 60:.1f} hours" if spent >= 60 else f"{spent:.0f} minutes"
    first = (
        f"{count(len(tried), 'experiment')} took {took} of training and scoring: {counts['keep']} kept, "
        f"{counts['discard']} discarded, {counts['crash']} crashed, {state.refused} refused before training."
    )
    if best is state.baseline:
        near = sum(e.near_miss for e in tried)
        second = f"Nothing beat the baseline's {base:.4f} bits per byte beyond the noise ({count(near, 'near miss')})."
    else:
        second = (
            f"val_bpb fell from {base:.4f} to {best.val_bpb:.4f} (-{100 * gain / base:.1f} %) at equal seeds; "
            f"the best is experiment {best.id}, {short(best.title, 80)}, after "
            f"{count(len(best.results), 'run')}."
        )
    noise = str(state.noise)
    return f"{headline(state)}{first} {second} {noise[0].upper()}{noise[1:]}."


def headline(state: State) -> str:
    """What the confirmation found, "" before it has run."""
    found = confirmed(state)
    if found is None:
        return ""
    new_text = "" if found.test is None else f"; on text that no verdict looked at, {found.test}"
    return f"Confirmed with {count(found.pairs, 'new seed')}: a gain of {found.gain} bits per byte{new_text}. "


def _escaped(text: str) -> str:
    """A text of a model, file or person as HTML."""
    return html.escape(visible(text))


def _row(
    report: Report,
    e: Experiment,
    sources: dict[int, list[str]],
    curves: dict[int, list[tuple]],
    shares: dict[int, Gain],
) -> str:
    parent = report.parents.get(e.id)
    inside = [f"<p>{_escaped(e.reason)}</p>"] if e.reason else []
    if share := shares.get(e.id):
        inside.append(f"<p>Confirmation: without this change, the winner loses {share} bits per byte.</p>")
    if e.values:
        inside.append(f'<p class="quiet">runs: {", ".join(map(_run, e.results))}; {_escaped(e.agent)}</p>')
    if parent and e.id in sources and parent.id in sources:
        inside.append(f"<pre>{_diff(sources[parent.id], sources[e.id])}</pre>")
    if curves[e.id]:
        inside.append(_losses(curves[e.id], curves.get(parent.id, []) if parent else []))
    idea = _escaped(e.title)
    text = f"<details><summary>{idea}</summary>{''.join(inside)}</details>" if inside else idea
    value = "" if e.val_bpb is None else f"{e.val_bpb:.4f}"
    return (
        f'<tr data-status="{e.status}"><td>{e.id}</td><td class="text" data-v="{idea}">{text}</td>'
        f'<td class="{e.status}">{e.status}</td><td>{value}</td>{_cell(e.delta if parent else None, "+.4f")}'
        f'{_cell(e.error, ".4f", "wide")}<td class="wide">{e.runs}</td>{_cell(e.memory_gb, ".1f", "wide")}'
        f"{_cell(e.minutes, '.1f', 'wide')}</tr>"
    )


def _run(run: Run) -> str:
    pace = "" if run.pace is None else f", pace {run.pace:.2f}"
    return f"{run.value:.4f} (seed {run.seed}{pace})"


def _cell(value: float | None, form: str, kind: str = "") -> str:
    shown = "" if value is None else format(value, form)
    return f'<td class="{kind}" data-v="{"" if value is None else value}">{shown}</td>'


def _sources(report: Report) -> dict[int, list[str]]:
    """Lines of train.py of every experiment whose commit git still has, from one git process."""
    done = report.state.settled
    asked = "".join(f"{e.commit}:train.py\n" for e in done)
    try:
        answer = io.BytesIO(run(ROOT, f"--git-dir={ROOT / '.git'}", "cat-file", "--batch", data=asked.encode()))
    except UserError:
        return {}
    found = {}
    for experiment in done:
        head = answer.readline().split()
        if len(head) == 3:
            found[experiment.id] = answer.read(int(head[2])).decode(errors="replace").splitlines()
            answer.read(1)
    return found


def _diff(before: list[str], after: list[str]) -> str:
    """Unified diff as HTML. Equal ends are cut off first: they are nearly the whole file."""
    head = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    tail = 0
    while tail < min(len(before), len(after)) - head and before[-1 - tail] == after[-1 - tail]:
        tail += 1
    start, spare = max(0, head - 2), max(0, tail - 2)
    lines = list(difflib.unified_diff(before[start : len(before) - spare], after[start : len(after) - spare], n=2))[2:]
    shown = []
    for line in lines[:DIFF_LINES]:
        kind, text = {"+": "add", "-": "del"}.get(line[:1], ""), _escaped(short(line, DIFF_CHARS))
        if not line.startswith("@@"):
            shown.append(f'<span class="{kind}">{text}</span>' if kind else text)
    more = [f"({len(lines) - DIFF_LINES} more lines)"] if len(lines) > DIFF_LINES else []
    return "\n".join(shown + more) or "no difference"


def _curve(report: Report, e: Experiment) -> list[tuple[float, float]]:
    """(seconds, smoothed loss in nats per token) of its first valid run, if its files exist."""
    name = _first_run(report, e)
    return _points(report.folder / "runs" / name / "steps.jsonl") if name else []


def _first_run(report: Report, e: Experiment) -> str:
    """Name of an experiment's first valid run; "" for none."""
    own = (r["run"] for r in report.runs if r["id"] == e.id and r["who"] == "candidate" and r["status"] == "ok")
    return next(own, e.ended_run)


def _points(path: Path) -> list[tuple[float, float]]:
    """(seconds, loss) of the steps that a run recorded, each the mean of several."""
    curve = read_curve(path, 4 * CURVE_POINTS)
    size = max(1, -(-len(curve.loss) // CURVE_POINTS))
    starts = range(0, len(curve.loss), size)
    return [(float(curve.seconds[at : at + size][-1]), float(curve.loss[at : at + size].mean())) for at in starts]


def _losses(mine: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> str:
    """Two loss curves; the first tenth is left out, where all runs look alike."""
    mine, theirs = (curve[len(curve) // 10 :] for curve in (mine, theirs))
    beside = ", the incumbent's in grey" if theirs else ""
    caption = f"training loss from {mine[0][0]:.0f} to {mine[-1][0]:.0f} s{beside}"
    return _svg({"theirs": theirs, "mine": mine}, caption, ".2f")


def _svg(curves: dict[str, list[tuple[float, float]]], caption: str, form: str) -> str:
    """Curves in one frame, by CSS class, with the lowest and highest value; `caption` stands below."""
    points = [point for curve in curves.values() for point in curve]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    wide, tall = right - left or 1.0, high - low or 1.0
    lines = "".join(
        f'<polyline class="{name}" points="'
        + " ".join(f"{240 * (x - left) / wide:.0f},{100 - 90 * (y - low) / tall:.1f}" for x, y in curve)
        + '"/>'
        for name, curve in curves.items()
        if curve
    )
    return (
        f'<svg viewBox="0 0 280 104" role="img" aria-label="{caption}">{lines}'
        f'<text x="245" y="102">{low:{form}}</text><text x="245" y="14">{high:{form}}</text></svg>'
        f'<p class="quiet">{caption}</p>'
    )


def _machine(report: Report) -> str:
    """The machine's condition over the night, and the runs that are invalid because of it."""
    recorded = [r for r in report.runs if r.get("before") and r.get("after")]
    if not recorded:
        return '<p class="quiet">No conditions were recorded.</p>'
    speeds = [r["before"]["flops"] / 1e9 for r in recorded]
    parts = [f"matmul speed before runs {min(speeds):,.0f} to {max(speeds):,.0f} GFLOP/s"]
    for name, words in (("heat", "thermal pressure"), ("memory_pressure", "memory pressure")):
        levels = [r["after"][name] for r in recorded if r["after"].get(name) is not None]
        parts += [f"{words} at most {max(levels)}"] if levels else []
    swaps = [r["after"]["swap_mb"] for r in recorded if r["after"].get("swap_mb") is not None]
    parts += [f"swap at most {max(swaps):,.0f} MB"] if swaps else []
    powers = {r["after"]["power"] for r in recorded if r["after"].get("power")}
    parts += [f"power: {' and '.join(sorted(powers))}"] if powers else []
    invalid = [r for r in report.runs if r["status"] == "invalid"]
    items = "".join(f"<li>{_escaped(r['run'])}: {_escaped(one_line(r['reason']))}</li>" for r in invalid[:50])
    repeated = f"<p>{count(len(invalid), 'run')} invalid and repeated:</p><ul>{items}</ul>" if invalid else ""
    clean = "" if invalid else " Every run was valid."
    curve = _svg({"mine": list(enumerate(speeds))}, "matmul speed before each run, GFLOP/s", ",.0f")
    return f"<p>Over {count(len(recorded), 'run')}: {_escaped(one_line('; '.join(parts)))}.{clean}</p>{repeated}{curve}"


def sample_stories(folder: Path, log: Callable[[str], None]) -> str | None:
    """HTML with the same prompts continued by baseline and best; None when that fails, with the reason in the log."""
    sandbox = available()
    if sandbox == "none":  # an agent wrote the code of these models
        return None
    try:
        with lock(folder / "lock"):  # a running night must not be slowed down
            return _samples(folder, sandbox)
    except (UserError, OSError, ValueError, KeyError) as reason:
        log(f"no stories: {reason}")
        return None


def _samples(folder: Path, sandbox: str) -> str | None:
    report = collect(folder)
    best = report.state.incumbent
    if not best:
        return None
    columns = []
    for title, e in (("baseline", report.state.baseline), ("best", best)):
        name = _first_run(report, e)
        run_dir = folder / "runs" / name
        if not name or not (run_dir / "checkpoint.safetensors").is_file():
            return None
        texts = "".join(f"<p>{_escaped(text)}</p>" for text in _stories(run_dir, sandbox))
        columns.append(f"<div><strong>{title}</strong>, {e.values[0]:.4f}{texts}</div>")
        if best is report.state.baseline:
            break
    return f'<div class="stories">{"".join(columns)}</div>'


def _stories(run_dir: Path, sandbox: str) -> list[str]:
    """Continuations of PROMPTS by the model of a run, which answers from the sandbox."""
    from lab.interface.sample import opened

    options = {"tokens": STORY_TOKENS, "temperature": 0.8, "top_k": 50, "seed": 0}
    try:
        with opened(run_dir, sandbox) as run:
            return ["".join(run.write(prompt=p, **options)) for p in PROMPTS]
    except UserError as reason:
        return [f"(no story: {reason})"]
