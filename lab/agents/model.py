"""The agent that asks a local model, whatever server runs it, in a form of answer that models of its size can produce.

One proposal: choose the model (once a night), size the prompt to a context that stays the same all night, ask with a
JSON schema, validate the answer as if there were no schema, retry with a new seed when it is unusable, unload the model
and wait until its memory is free, so that the experiment has the machine to itself. Errors are not sent back to the
model: that fixes few of them (7 of 82 measured), and a new draw fixes most. Any failure becomes a NoProposal of one
line, and the sampler takes the turn; what only the user can fix is raised by `choose`, before the night. Options that a
model or its server rejects (`think`, a limit on text length, any schema) are left out from then on.
"""

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lab.agents.answers import FORMS, IDEA, Menu, NoAnswer, parse_answer, schema
from lab.agents.briefing import BYTES_PER_TOKEN, Briefing, NoProposal, Tried
from lab.agents.server import GRAMMAR, Model, ModelServer, Refused, Unusable
from lab.errors import UserError, one_line
from lab.loop.ideas import Idea
from lab.loop.proposal import REQUIRED, Proposal
from lab.loop.source import Rejected, definition, is_definition, parse
from lab.machine.hardware import describe

DRAWS = 4  # one, and three more with new seeds
TEMPERATURE = 0.7
PROMPT_TOKENS = {"menu": 2500, "definition": 4000, "replace": 16_000}  # at most; estimated on the long side
ANSWER_TOKENS = {"menu": 200, "definition": 2000, "replace": 4000}  # num_predict
THINKING_TOKENS = 4000  # added when the model thinks
SPARE_TOKENS = 256  # the chat template around the prompt
DEFINITION_FROM, REPLACE_FROM = 6.5, 30.0  # billions of parameters from which code edits worked
MEMORY_SHARE = 0.5  # of the memory, for weights; the rest is for the context, the system and what else runs
BYTES_PER_TOKEN_CUT = 6.0  # more bytes per prompt token mean that the server has cut the prompt
DENSITY_SLACK = 1.5  # the same, relative to the densest prompt of this form so far; a cut one is halved
LONGEST_DEFINITION = 120  # lines
IDEAS = 4  # on a menu, of those that were not tried: each costs some 50 tokens
RESTING = 3  # last failures whose constants leave the menu: a small model repeats them otherwise

SYSTEM = (
    "You improve a small language model that trains for five minutes. You propose one experiment at a time; "
    "it is run and judged by validation bits per byte (val_bpb, lower is better)."
)
ASK = {
    "menu": "Choose the one change most likely to lower val_bpb, and not like those that failed. Answer in JSON: "
    '"reason", one sentence on why it should help, then "change", one entry of the menu as NAME = value.',
    "definition": "Write a better {name}. Keep its name and how it is called; use only names that it uses now, the "
    "constants, or names of mlx. Answer with one sentence on why it should help, then the whole new definition of "
    "{name}, and nothing else, in one ```python block.",
    "replace": 'Propose one change to train.py. Answer in JSON: "reason", one sentence on why it should help, then '
    '"edits", search/replace pairs. Each "search" is copied exactly from the file, with whole lines, and occurs '
    "there once.",
}


@dataclass(frozen=True)
class Question:
    """The form of answer to ask for, and what it may change."""

    form: str
    prompt: str
    menu: Menu  # values on offer, or definitions by name


def model_memory_gb() -> float:
    """Memory for the weights of a model: a share of the GPU's, else of the machine's."""
    facts = describe()
    return MEMORY_SHARE * (facts["gpu_memory_gb"] or facts["memory_gb"])


class LocalModel:
    """A local model's proposals. `model` and `form` are chosen by what is installed and its size when empty."""

    def __init__(
        self,
        server: ModelServer,
        model: str = "",
        form: str = "",
        seed: int = 0,
        think: bool = False,
        memory_gb: float = 0.0,  # for the model; 0: a share of this machine's
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        if form and form not in FORMS:
            raise UserError(f"unknown form of answer {form!r}; choose one of: {', '.join(FORMS)}")
        self.server, self.name = server, server.kind
        self.wanted, self.form, self.seed, self.think = model, form, seed, think
        self.memory_gb, self.log = memory_gb, log
        self.model: Model | None = None
        self._left_out: defaultdict[str, set[str]] = defaultdict(set)  # model -> think, maxLength, format
        self._density: dict[str, float] = {}  # form -> most bytes per prompt token so far

    def propose(self, briefing: Briefing) -> Proposal:
        """Raises NoProposal for every failure."""
        try:
            model = self.choose()
            self.server.refuse_if_moved(model)
            try:
                return self._draw(briefing, model, self._question(briefing, model))
            finally:
                if not self.server.unload(model.name):
                    self.log(f"{model.name} is still loaded; the next run shares the memory with it")
        except (UserError, Unusable) as error:  # the model was removed during the night, or another program answers
            self.model = None
            raise NoProposal(str(error)) from None

    def tell(self, proposal: Proposal, outcome: Tried) -> None:
        """Nothing to remember: the next briefing's history holds the outcome."""

    def choose(self) -> Model:
        """The model of this night: the requested one, else the most capable that runs here and fits. Raises UserError
        when there is none or another program answers, NoProposal when the server is not available."""
        if self.model is None:
            installed = [model for model in self.server.models() if model.completes]
            self.model = self._wanted(installed) if self.wanted else self._most_capable(installed)
            self.log(f"using {self.model.name}, form of answers: {' or '.join(self._forms(self.model))}")
            self._say_where(self.model)
        return self.model

    def _say_where(self, model: Model) -> None:
        sent = "train.py and the briefing are sent to"
        if not self.server.local:
            self.log(f"{sent} {self.server.host}")
        if model.remote:
            self.log(f"{sent} {model.remote}, where {model.name} runs")

    def _wanted(self, installed: list[Model]) -> Model:
        for model in installed:
            if self.server.same(model.name, self.wanted):
                return model
        for name, reason in self.server.unread.items():
            if self.server.same(name, self.wanted):
                raise UserError(reason)
        raise UserError(self.server.missing(self.wanted))

    def _most_capable(self, installed: list[Model]) -> Model:
        """The largest that runs here and fits; a coder counts twice its size."""
        room = (self.memory_gb or model_memory_gb()) * 2**30
        elsewhere = [f"{model.name} runs at {model.remote}" for model in installed if model.remote]
        installed = [model for model in installed if not model.remote]
        if not installed and self.server.unread:
            raise UserError("; ".join(self.server.unread.values()))
        if not installed:
            remote = f" that runs locally ({', '.join(elsewhere)}; use it with --model)" if elsewhere else ""
            raise UserError(f"the {self.server.title} server has no model{remote}; {self.server.suggestion}")
        fitting = [model for model in installed if model.bytes <= room or not self.server.local]
        if not fitting:
            smallest = min(installed, key=lambda model: model.bytes)
            raise UserError(
                f"no installed model fits {room / 2**30:.1f} GB (the smallest, {smallest.name}, needs "
                f"{smallest.bytes / 2**30:.1f}); {self.server.suggestion}"
            )
        return max(fitting, key=lambda m: (m.parameters * (2 if "code" in m.name.lower() else 1), m.name))

    def _forms(self, model: Model) -> tuple[str, ...]:
        """Forms of answer for a model of this size, smallest change first."""
        if self.form:
            return (self.form,)
        if model.parameters >= REPLACE_FROM:
            return ("replace",)
        return ("menu", "definition") if model.parameters >= DEFINITION_FROM else ("menu",)

    def _question(self, briefing: Briefing, model: Model) -> Question:
        """What to ask this time; on a plateau code is changed where the model can."""
        forms, menu = self._forms(model), briefing.menu() if briefing.wish else _rested(briefing)
        draw = random.Random(f"{self.seed} {briefing.number} {briefing.attempt}")
        form = forms[-1] if briefing.plateau else draw.choice(forms)
        if form == "menu" and not menu:
            if "definition" not in forms:
                raise NoProposal("the menu of constants is empty")
            form = "definition"
        room = self._prompt_tokens(form, model)
        if form == "menu":
            ideas = briefing.untried_ideas()
            ideas = draw.sample(ideas, min(IDEAS, len(ideas)))
            offered = dict(menu) | ({IDEA: [idea.name for idea in ideas]} if ideas else {})
            return Question(form, _menu_prompt(briefing, menu, ideas, room), offered)
        if form == "replace":
            ask = ASK[form]
            return Question(form, f"{briefing.render(room - _tokens(ask))}\n{ask}", {})
        name = draw.choice(_targets(briefing.source))
        ask = ASK[form].format(name=name)
        names = f"The constants: {', '.join(briefing.constants())}."
        text = replace(briefing, ideas={}).render(room - _tokens(ask + names), definition(briefing.source, name))
        return Question(form, f"{text}\n{names}\n{ask}", {name: ()})

    def _draw(self, briefing: Briefing, model: Model, question: Question) -> Proposal:
        """The first answer that passes every check. Raises NoProposal with the last refusal."""
        reason = ""
        for draw in range(DRAWS):
            try:
                text = self._ask(briefing, model, question, draw)
                return parse_answer(
                    text,
                    question.form,
                    briefing.source,
                    briefing.settings,
                    question.menu,
                    tried=briefing.tried,
                    agent=self.name,
                    ideas=briefing.ideas,
                )
            except (Rejected, Unusable) as refusal:
                reason = str(refusal)
                self.log(f"{model.name}, draw {draw + 1} of {DRAWS}: {reason}")
                self._learn(model, refusal)
        raise NoProposal(f"{model.name} gave no usable answer in {DRAWS} draws; the last: {reason}")

    def _learn(self, model: Model, refusal: Exception) -> None:
        """Leave out the option that was refused; with a schema, think=false makes some models answer nothing."""
        left_out, text = self._left_out[model.name], str(refusal)
        if isinstance(refusal, Refused) and "think" in text.lower():
            left_out.add("think")
        elif isinstance(refusal, Refused) and GRAMMAR.search(text):
            left_out.add("format" if "maxLength" in left_out else "maxLength")
        elif isinstance(refusal, NoAnswer) and model.thinks:
            left_out.add("format" if "think" in left_out else "think")

    def _ask(self, briefing: Briefing, model: Model, question: Question, draw: int) -> str:
        form = question.form
        context = self._context(model)
        options = {
            "num_ctx": context,
            "num_predict": self._answer_tokens(form, model),
            "temperature": TEMPERATURE,
            "seed": random.Random(f"{self.seed} {briefing.number} {briefing.attempt} {draw}").randrange(2**31),
        }
        left_out = self._left_out[model.name]
        think = self.think if model.thinks and "think" not in left_out else None  # others refuse it
        shape = None if "format" in left_out else schema(form, question.menu)
        shape = _unbounded(shape) if "maxLength" in left_out else shape
        answer = self.server.ask(model.name, SYSTEM, question.prompt, options, shape, think)
        self._refuse_truncation(model, question, answer.prompt_tokens, context)
        return answer.text

    def _refuse_truncation(self, model: Model, question: Question, counted: int | None, context: int) -> None:
        """Raise NoProposal when the server cut the prompt, which it does silently."""
        loaded = self.server.context(model.name)
        if loaded is not None and loaded < context:
            raise NoProposal(f"{model.name} was loaded with a context of {loaded} tokens; {context} are needed")
        if counted is None:
            return
        density = len((SYSTEM + question.prompt).encode()) / counted
        before = self._density.get(question.form, density)
        if density > min(BYTES_PER_TOKEN_CUT, before * DENSITY_SLACK):
            raise NoProposal(f"the server cut the prompt for {model.name} to {counted} tokens")
        self._density[question.form] = max(before, density)

    def _context(self, model: Model) -> int:
        """num_ctx: room for the longest prompt and answer of any form, the same all night, as a change reloads."""
        needs = [PROMPT_TOKENS[form] + self._answer_tokens(form, model) for form in self._forms(model)]
        size = -(-(max(needs) + SPARE_TOKENS) // 1024) * 1024
        return min(size, model.context or size)

    def _answer_tokens(self, form: str, model: Model) -> int:
        thinks = model.thinks and (self.think or "think" in self._left_out[model.name])
        return ANSWER_TOKENS[form] + (THINKING_TOKENS if thinks else 0)

    def _prompt_tokens(self, form: str, model: Model) -> int:
        """What the context leaves for a prompt of this form."""
        left = self._context(model) - self._answer_tokens(form, model) - SPARE_TOKENS
        return min(PROMPT_TOKENS[form], left)


def _menu_prompt(briefing: Briefing, menu: Menu, ideas: list[Idea], room: int) -> str:
    """Briefing, menu and question; constants and ideas stand in the menu, so the briefing has neither them nor code."""
    block = briefing.constants()
    lines = [
        f"{name} = {block[name].value!r} now ({one_line(block[name].comment)}). Menu: {', '.join(map(repr, values))}"
        for name, values in menu.items()
    ]
    lines += [f"{IDEA} = {idea.name!r}: {idea.claim}" for idea in ideas]
    tail = "\n".join(["## Menu", *lines, "", ASK["menu"]])
    return f"{replace(briefing, ideas={}).render(room - _tokens(tail), code='')}\n{tail}"


def _unbounded(shape: Any) -> Any:
    """A schema without bounds on the length of texts."""
    if not isinstance(shape, dict):
        return shape
    return {key: _unbounded(value) for key, value in shape.items() if key != "maxLength"}


def _rested(briefing: Briefing) -> Menu:
    """The menu without the constants of the last failures, or the whole one where nothing else is left."""
    menu = briefing.menu()
    failed = [tried for tried in briefing.history if tried.edit and tried.verdict != "keep"][-RESTING:]
    resting = {name for tried in failed for name in (tried.edit or {}).get("values", {})}
    return {name: values for name, values in menu.items() if name not in resting} or menu


def _targets(source: str) -> list[str]:
    """Definitions that a model may rewrite: not those that lab/ calls, none too long for the prompt."""
    names = [
        node.name
        for node in parse(source).body
        if is_definition(node) and node.name not in REQUIRED and node.end_lineno - node.lineno < LONGEST_DEFINITION
    ]
    if not names:
        raise NoProposal("train.py has no definition that can be replaced")
    return names


def _tokens(text: str) -> int:
    return int(len(text.encode()) / BYTES_PER_TOKEN) + 1
