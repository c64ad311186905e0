"""Options that the commands of agent_loop.py share."""

from collections.abc import Callable

import click

from lab.loop.branch import TAG_RULE, check_tag
from lab.show import MINUTES, Finite, Given
from lab.trial.sandbox import KINDS

AGENTS = ("auto", "hybrid", "search", "ollama", "openai", "command")


def tag_option(default: str) -> Callable:
    """--tag, checked before anything is created."""
    return click.option(
        "--tag",
        callback=lambda context, option, tag: tag if tag is None else check_tag(tag),
        help=f"Name of the night: {TAG_RULE}.  [default: {default}]",
    )


def _together(*options: Callable) -> Callable:
    """One decorator for these options; --help lists them in this order."""

    def decorate(function: Callable) -> Callable:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


# What defines a night: preset, budget, rule and sandbox.
night_options = _together(
    click.option("--preset", type=Given(), help="Prepare and use this preset.  [default: what was prepared last]"),
    click.option("--minutes", type=MINUTES, help="Minutes of training per run.  [default: 5]"),
    click.option("--rigor", type=click.Choice(["full", "none"]), default="full", show_default=True,
                 help="full: repeat an apparent win before it is kept. none: keep whatever is lower once."),
    click.option("--sandbox", type=click.Choice(["auto", *KINDS]), default="auto", show_default=True,
                 help="Sandbox for experiments; auto picks one that works."),
)  # fmt: skip

# Which agent proposes.
agent_options = _together(
    click.option("--agent", "kind", type=click.Choice(AGENTS), default="auto", show_default=True,
                 help="Which agent proposes. auto: hybrid if a local model is found or named, else search."),
    click.option("--model", default="", help="The local model.  [default: the most capable one that fits]"),
    click.option("--base-url", default="",
                 help="Server with OpenAI's protocol (llama-server, mlx_lm.server, LM Studio), like "
                 "http://127.0.0.1:8080/v1; its prompts contain train.py.  [default: Ollama's, else one that is found "
                 "on port 8080, 1234 or 8000 of this machine]"),
    click.option("--command", "cli", default="",
                 help="For --agent command: the coding CLI to run, in a scratch folder."),
    click.option("--llm-share", default=0.3, type=Finite(0, 1), show_default=True,
                 help="For --agent hybrid: share of proposals by the model."),
)  # fmt: skip

futility_option = click.option("--futility/--no-futility", default=True, show_default=True,
                               help="End a run early that is nearly certain to lose.")  # fmt: skip
until_option = click.option("--until", type=click.DateTime(["%H:%M"]), metavar="HH:MM",
                            help="Start nothing new from this time of day, like 07:00; a night confirms its winner "
                            "before.  [default: no limit]")  # fmt: skip

# When a night ends.
end_options = _together(
    click.option("--max-experiments", type=click.IntRange(min=0),
                 help="Stop after this many experiments.  [default: no limit]"),
    until_option,
)  # fmt: skip
