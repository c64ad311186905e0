"""Options that commands of agent_loop.py share."""

from collections.abc import Callable

import click

from lab.loop.branch import TAG_RULE, check_tag
from lab.show import MINUTES, Finite
from lab.trial.sandbox import KINDS


def tag_option(default: str) -> Callable:
    """--tag, checked before anything is made."""
    return click.option(
        "--tag",
        callback=lambda context, option, tag: tag if tag is None else check_tag(tag),
        help=f"Name of the night: {TAG_RULE}.  [default: {default}]",
    )


def night_options(function: Callable) -> Callable:
    """What a night is: preset, budget, rule and sandbox."""
    for option in (
        click.option("--preset", help="Prepare and use this preset.  [default: what was prepared last]"),
        click.option("--minutes", type=MINUTES, help="Of training.  [default: 5]"),
        click.option("--rigor", type=click.Choice(["full", "none"]), default="full", show_default=True,
                     help="none is upstream's rule: keep whatever is lower once."),
        click.option("--sandbox", type=click.Choice(["auto", *KINDS]), default="auto", show_default=True,
                     help="Around an experiment."),
    ):  # fmt: skip
        function = option(function)
    return function


def agent_options(function: Callable) -> Callable:
    """Who proposes."""
    kinds = click.Choice(["auto", "hybrid", "search", "ollama", "command"])
    for option in (
        click.option("--agent", "kind", type=kinds, default="auto", show_default=True,
                     help="Who proposes. auto: hybrid when a local model answers or --model names one, else search."),
        click.option("--model", default="", help="Ollama model.  [default: the most able one that fits]"),
        click.option("--command", "cli", default="",
                     help="For --agent command: a coding CLI, run in a scratch folder."),
        click.option("--llm-share", default=0.3, type=Finite(0, 1), show_default=True,
                     help="Of hybrid's proposals by the model, 0 to 1."),
    ):  # fmt: skip
        function = option(function)
    return function


def end_options(function: Callable) -> Callable:
    """When a night ends by itself."""
    for option in (
        click.option("--max-experiments", type=click.IntRange(min=0), help="After so many: stop.  [default: no limit]"),
        click.option("--until", type=click.DateTime(["%H:%M"]), metavar="HH:MM",
                     help="Time of day from which no new experiment starts, like 07:00.  [default: no end]"),
    ):  # fmt: skip
        function = option(function)
    return function
