"""What a model, a file or a person wrote is text for a terminal, never its markup, escape sequences or direction."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from test_night import night  # noqa: F401 (a fixture)

from lab import show
from lab.interface.dashboard import View
from lab.interface.sample import write
from lab.loop.history import Experiment
from lab.show import live_console
from lab.trial.runner import Phase

HOSTILE = "[/INST] [red]x[/red] :smile: \x1b[2J\x1b]0;title\x07 \u202eabc\n" + "y" * 10_000


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("TTY_INTERACTIVE", raising=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(renderable) -> str:
    console = Console(file=(out := io.StringIO()), width=100, force_terminal=True, color_system=None)
    console.print(renderable)
    return out.getvalue()


def test_the_panel_shows_a_hypothesis_as_it_is(night):  # noqa: F811
    night = night()
    night.idea, night.folder, night.runner.phase = HOSTILE, night.folder.parent / "[bold]", Phase()
    night.agent.name, night.stop = "[/agent]", lambda: "[/stop]"
    night.journal.state.experiments.append(Experiment(1, "search", HOSTILE, "c", "f", 9, status="discard", delta=0.1))
    told = shown(View(night, None, Console(width=100)).panel())
    assert "idea      [/INST] [red]x[/red] :smile:" in told
    assert "night [bold], " in told
    assert "[/agent]" in told
    assert not {"\x1b", "\u202e"} & set(told)


def test_the_log_shows_a_line_as_one_line(capsys):
    show.log(HOSTILE)
    told = capsys.readouterr().out
    assert told[8:].startswith(" [/INST] [red]x[/red] :smile: abc yyy")
    assert told.count("\n") == 1
    assert len(told) < 2000


def test_a_live_console_reads_no_markup():
    live_console(out := Terminal()).print("[/INST] :smile:", highlight=False)
    assert "[/INST] :smile:" in out.getvalue()


def test_a_model_that_writes_escape_sequences_moves_no_cursor():
    tokenizer = SimpleNamespace(bos=0, token_bytes=[b"", *(bytes([n]) for n in b"a\x1b\r\x9b\n\xe2\x80\xae")])
    tokenizer.encode = lambda texts: [np.array([0])]
    order = iter(range(1, len(tokenizer.token_bytes)))
    model = lambda tokens: np.eye(9)[[next(order)] * tokens.shape[1]][None]  # noqa: E731
    text = "".join(write(model, tokenizer, 4, prompt="", tokens=8, temperature=0.0, top_k=0, seed=0))
    assert text == "a\ufffd\ufffd\ufffd\n\ufffd"
