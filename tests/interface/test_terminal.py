"""What a person sees: training and a night in a real terminal of 80 and 200 columns, and the same in a file."""

import re
import subprocess

import pytest
from checkout import MINUTES, Checkout
from conftest import environment
from terminal import Terminal, needs_tmux

from lab.interface.dashboard import verdict
from lab.loop.history import Experiment
from lab.show import Reading
from lab.trial.sandbox import available

pytestmark = needs_tmux
needs_sandbox = pytest.mark.skipif(available() == "none", reason="no sandbox on this machine (install bubblewrap)")
TOP, BOTTOM = "╭─ night", "─╯"
PROPOSE = 'sleep 3; sed -i "s/^FINAL_LR = .*/FINAL_LR = 0.0$$  # of the full rate/" train.py; echo a lower rate'


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return Checkout(tmp_path_factory.mktemp("terminal"))


def terminal(checkout: Checkout, columns: int, **more: str) -> Terminal:
    inherited = {key: text for key, text in environment(checkout.cache).items() if key != "NO_COLOR"}
    return Terminal(checkout.folder, inherited | more, columns)


def night(checkout: Checkout, tag: str, *flags: object) -> list[str]:
    agent = ("--agent", "command", "--command", PROPOSE)
    return checkout.command(
        "agent_loop.py", "run", *agent, "--tag", tag, "--minutes", MINUTES, "--rigor", "none", *flags
    )


@pytest.mark.parametrize(("columns", "length"), [(40, 40), (80, 80), (200, 100)])
def test_a_reading_fits_its_terminal_and_tells_done_from_left_without_colours(columns, length):
    painted = Reading(1087, 0.25, 2.3456, 7399.0, 41.2, 450.0, 1, 225.0).painted(columns).plain
    bar, figures = painted.split("\n")
    assert bar.endswith("─  25%  3:45 left")
    assert len(bar) == length
    assert bar.count("━") == int((length - 16) * 0.25)
    assert figures == "step 1087  loss 2.3456  7,399 tok/s  mfu 41.2%  450 MB  epoch 1"


@pytest.mark.parametrize(("columns", "more", "colours"), [(80, {}, True), (200, {"NO_COLOR": "1"}, False)])
def test_training_paints_one_bar_in_place_and_leaves_it_full(checkout, columns, more, colours):
    with terminal(checkout, columns, **more) as shown:
        shown.run(*checkout.command("train.py", "--steps", 60, "--no-score"))
        figures = r"step \d+  loss \d\.\d+  [\d,]+ tok/s  mfu [\d.]+%  \d+ MB  epoch 1"
        during = shown.wait(rf"━─+ +\d+%  \d+:\d\d left\n{figures}")
        painted = shown.screen(colours=True)
        after = shown.wait("status=0")
        assert bool(re.search(r"\x1b\[[\d;]*[39][0-8][\d;]*m", painted)) == colours
        assert during.count(" left") == after.count(" left") == 1
        assert re.search(r"━ 100%  0:00 left\nstep 59  loss .*\nstatus=0", after)
        assert shown.cursor_is_shown()


def test_in_a_file_training_is_plain_lines_whatever_the_environment_says(checkout):
    done = subprocess.run(
        checkout.command("train.py", "--steps", 3, "--no-score", "-v"),
        cwd=checkout.folder, env=environment(checkout.cache, FORCE_COLOR="1", TTY_COMPATIBLE="1"),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not {"\r", "\x1b"} & set(done.stdout + done.stderr)
    assert [line[:10] for line in done.stdout.splitlines()[3:]] == ["step 00000", "step 00001", "step 00002"]


@needs_sandbox
def test_a_night_shows_what_it_is_at_and_ends_after_one_interrupt_or_at_once_after_two(checkout):
    with terminal(checkout, 80) as shown:
        shown.run(*night(checkout, "seen", "--until", "23:59"))
        shown.wait("now +preflight 0:0")
        screen = shown.wait(r"now +training e0000-r1 [━─]+ +\d+%  0:0\d left  loss \d")
        assert "idea      baseline" in screen
        assert re.search(r"until 23:59, [\d:]+ left; Ctrl-C: end after this experiment", screen)
        shown.type("C-c")
        screen = shown.wait(r"ends after this experiment \(stopped\); Ctrl-C: at once")
        assert screen.count(TOP) == screen.count(BOTTOM) == 1
        screen = shown.wait("status=0")
        assert TOP not in screen
        assert "ended: stopped\nseen: 0 experiments: " in screen
        assert shown.cursor_is_shown()

        shown.type("clear", "Enter")
        shown.run(*night(checkout, "seen"))
        screen = shown.wait(r"now +thinking \(command\) 0:0")
        assert re.search(r"incumbent \d\.\d{6} ± 0\.\d{4} \(experiment 0, 1 run\)", screen)
        assert re.search(r"machine +[\d,]+ GFLOP/s", screen)
        shown.resize(50)
        shown.wait(r"(?m)^╭─ night seen, experiment 1 ─{17}╮$")
        shown.resize(200)
        screen = shown.wait(r"(?m)^╭─ night seen, experiment 1 ─{71}╮$")
        assert screen.count(TOP) == screen.count(BOTTOM) == 1
        shown.type("C-c")
        shown.wait(r"Ctrl-C: at once")
        shown.type("C-c")
        screen = shown.wait("status=130")
        assert [mark for mark in (TOP, BOTTOM, "Traceback") if mark in screen] == []
        assert screen.count("seen: 0 experiments: ") == screen.count("\nstopped\nstatus=130") == 1
        assert shown.cursor_is_shown()


@pytest.mark.parametrize(
    ("status", "delta", "shown"),
    [("keep", -0.0123, "keep    -0.012300 wider"), ("discard", 0.002, "discard +0.002000 wider"),
     ("crash", None, "crash             wider")],
)  # fmt: skip
def test_a_verdict_is_one_line(status, delta, shown):
    settled = Experiment(12, "search", "wider\nand more", "c", "f", 9, status=status, delta=delta)
    assert verdict(settled).plain == f"  12 {shown} and more"
