"""The report of a night: what it says, that it stays one small file, and how a browser shows it."""

import html
import json
import random
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from itertools import pairwise

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.text import Text
from night_writer import night

from lab.errors import UserError
from lab.files import sealed
from lab.interface import report
from lab.loop.journal import Journal

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def a_night(folder, experiments: int):
    """A journal with `experiments` experiments and a loss curve for each."""
    folder.mkdir()
    night(folder, experiments + 1)
    steps = [{"step": i, "seconds": 0.3 * i, "loss": 8 * (i + 1) ** -0.2, "tokens": i} for i in range(1000)]
    curve = "".join(json.dumps(step) + "\n" for step in steps)
    for number in range(experiments + 1):
        path = folder / "runs" / f"e{number:04d}-r1" / "steps.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(curve)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return a_night(tmp_path_factory.mktemp("report") / "nov24", 30)


def text_of(folder) -> str:
    return report.page(report.collect(folder), None)


def test_every_experiment_is_in_the_table_with_its_verdict(small):
    state = Journal(small).state
    rows = re.findall(r'<tr data-status="(\w+)"><td>(\d+)</td>', text_of(small))
    assert rows == [(e.status, str(e.id)) for e in state.experiments]
    assert f"<td>{state.incumbent.val_bpb:.4f}</td>" in text_of(small)


def test_the_summary_is_three_sentences_of_the_journals_numbers(small):
    told = report.summary(report.collect(small))
    state = Journal(small).state
    assert len(re.findall(r"\. (?=[A-Zv])|\.$", told)) == 3
    assert "30 experiments" in told
    assert f"{state.experiments[0].val_bpb:.4f}" in told
    assert f"{state.noise.sigma:.4f}" in told


def test_nothing_comes_from_the_network(small):
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", text_of(small))


def test_an_agents_words_cannot_become_markup(tmp_path):
    folder = a_night(tmp_path / "n", 2)
    path = folder / "journal.jsonl"
    records = [
        json.loads(line) for line in path.read_text().replace("idea 1", "<script>alert(1)</script>").splitlines()
    ]
    path.write_text("".join(json.dumps(sealed(record)) + "\n" for record in records))
    shown = text_of(folder)
    assert "<script>alert" not in shown
    assert html.escape("<script>alert(1)</script>") in shown


def test_hundreds_of_experiments_in_seconds_and_megabytes(tmp_path):
    folder = a_night(tmp_path / "long", 400)
    begun = time.perf_counter()
    paths = report.write_report(folder)
    seconds = time.perf_counter() - begun
    assert sum(path.stat().st_size for path in paths) < 4e6
    assert seconds < 15  # under 2 on a machine that does nothing else


def test_a_diff_shows_the_change_and_two_lines_around_it():
    before = [f"line {i}" for i in range(50)]
    after = [*before[:20], "new <b>", *before[21:]]
    shown = report._diff(before, after).splitlines()
    assert shown == [
        " line 18", " line 19", '<span class="del">-line 20</span>', '<span class="add">+new &lt;b&gt;</span>',
        " line 21", " line 22",
    ]  # fmt: skip
    assert report._diff(before, before) == "no difference"
    assert "more lines" in report._diff([], [str(i) for i in range(500)])


def test_a_night_without_a_finished_experiment_has_a_report(tmp_path):
    folder = tmp_path / "new"
    Journal(folder).record("start", tag="new", commit="0" * 40)
    assert "No experiment is finished yet" in report.write_report(folder)[0].read_text()


def test_what_a_run_wrote_of_itself_may_be_anything(tmp_path):
    folder = a_night(tmp_path / "n", 3)
    for number, text in enumerate(
        ["[" * 10**5, '{"seconds": 1e308, "loss": 1e308}\n' * 99, '{"seconds": 9, "loss": NaN}']
    ):
        (folder / "runs" / f"e{number:04d}-r1" / "steps.jsonl").write_text(text)
    secret = tmp_path / "secret"
    secret.write_text('{"seconds": 1, "loss": 7.7777}\n' * 20)
    link = folder / "runs" / "e0003-r1" / "steps.jsonl"
    link.unlink()
    link.symlink_to(secret)
    assert "<polyline" not in text_of(folder)


def test_dollars_in_a_hypothesis_are_dollars(small):
    found = report.collect(small)
    for experiment in found.state.experiments[1:]:
        experiment.status, experiment.hypothesis = "keep", r"$LR_a_b \foo$ costs $3"
    assert report.picture(found.state, found.folder.name).startswith(b"\x89PNG")


def test_no_label_lies_on_another_a_point_or_the_frontier(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    folder = a_night(tmp_path / "n", 40)
    found = report.collect(folder)
    rng = random.Random(0)
    best = 1.0
    for experiment in found.state.experiments[1:]:  # a night of many gains, some of them beside each other
        if kept := experiment.id in (1, 2, 3, 20, 21, 30, 39):
            best -= rng.uniform(0.002, 0.03)
        experiment.status, experiment.val_bpb = ("keep", best) if kept else ("discard", best + rng.random() / 20)
        experiment.error = 0.001
        experiment.hypothesis = "the rate of the matrices from 0.02 to 0.04, as it is too low"
    found.state.experiments[0].val_bpb = 1.0
    report.picture(found.state, found.folder.name)
    axes = drawn[0].axes[0]
    canvas = FigureCanvasAgg(drawn[0])
    canvas.draw()
    for text in axes.texts:
        text.update_positions(canvas.get_renderer())
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without its line
    points = [axes.transData.transform((e.id, e.val_bpb)) for e in found.state.experiments]
    frontier = next(line for line in axes.lines if line.get_drawstyle() == "steps-post").get_path()
    assert len(boxes) >= 5  # of 7
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])
        assert not any(box.contains(*point) for point in points)
        assert axes.bbox.x0 <= box.x0
        assert box.y0 >= axes.bbox.y0
    corners = frontier.vertices
    steps = [(corner[0], before[1]) for before, corner in pairwise(corners)]
    line = Path([point for pair in zip(corners, [*steps, corners[-1]], strict=True) for point in pair])
    assert not any(axes.transData.transform_path(line).intersects_bbox(box.padded(1), filled=False) for box in boxes)


def test_conditions_and_spoiled_runs_are_told(small):
    found = report.collect(small)
    found.runs = [
        {"run": "e0001-r1", "status": "invalid", "reason": "the machine slept for 60 s",
         "before": {"flops": 1.5e11, "power": "AC"}, "after": {"heat": 2, "swap_mb": 10.0, "power": "battery"}},
        {"run": "e0001-r2", "status": "ok", "reason": "",
         "before": {"flops": 1.2e11, "power": "AC"}, "after": {"heat": 0, "swap_mb": 10.0, "power": "AC"}},
    ]  # fmt: skip
    told = report._machine(found)
    assert 'points="0,10.0 240,100.0"' in told  # 150, then 120
    assert "120 to 150 GFLOP/s; thermal pressure at most 2" in told
    assert "power: AC and battery" in told
    assert "e0001-r1: the machine slept" in told


def test_watching_serves_the_night_as_it_goes(small, monkeypatch):
    told = []
    thread = threading.Thread(target=report.serve, args=(small, 0, told.append), daemon=True)
    thread.start()
    while not told and thread.is_alive():
        time.sleep(0.01)
    address = re.search(r"http://127\.0\.0\.1:\d+/", told[0])[0]
    answer = urllib.request.urlopen(address, timeout=30)
    assert answer.status == 200
    assert "location.reload" in answer.read().decode()
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(address + "journal.jsonl", timeout=30)
    with pytest.raises(UserError, match="--port"):
        report.serve(small, int(address.split(":")[2].strip("/")), told.append)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1200, False)])
def test_a_browser_shows_it_without_sideways_scrolling(small, tmp_path, width, dark):
    page = tmp_path / "page.html"
    probe = "<script>document.title = 'width ' + document.documentElement.scrollWidth</script></body>"
    page.write_text(text_of(small).replace("</body>", probe))
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--hide-scrollbars",
    ]  # fmt: skip
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    shown = int(re.search(r"<title>width (\d+)</title>", done.stdout)[1])
    assert shown <= max(width, 500)  # a headless window is never narrower than 500
    picture = tmp_path / "page.png"
    subprocess.run([*command, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=120, check=True)
    assert picture.read_bytes().startswith(b"\x89PNG")
