"""The agent that needs no model: tree-structured Parzen estimation (TPE) over the constants block.

The sampler is Optuna's TPESampler (Bergstra et al. 2011), used in memory. CMA-ES from `cmaes` was
considered: it needs only numpy and is as good a sampler, but it moves every constant at once, from a mean of its
own, and learns from whole generations that it drew itself. Here a proposal changes one or two constants of the
incumbent, so that a verdict says something about them; results come from other agents too; a structural change
alters the block. TPE is made for such conditional spaces: which constant to change is a choice like any other,
and each constant's density is learned from the experiments that changed it. Optuna's storage back ends
(SQLAlchemy, Alembic) come with it and are never imported.

Every proposal is a pure function of (briefing, seed): the study is rebuilt from the history each time, so that a
resumed night continues exactly like an uninterrupted one. The value of a trial is the change of val_bpb against the
incumbent at the time. A failed run becomes a pruned trial, which TPE ranks behind every finished one (Optuna ignores
failed trials); an invalid run is left out.
"""

import dataclasses
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from lab.agents import ideas
from lab.agents.briefing import FAILED, Briefing, NoProposal, Tried
from lab.loop.proposal import Proposal, check, describe, in_words
from lab.loop.source import Rejected, set_constant

CHOICE = "constant"  # the parameter that says which constant is changed; lower case, so never a constant's name
PAIRS = 0.3  # share of proposals that change two constants; all do once no single change is left
STARTUP = 10  # experiments before densities decide instead of chance
DRAWS = 20  # pairs drawn before the agent gives up

Menu = Mapping[str, Sequence[Any]]


class Search:
    """Proposes one or two changed constants around the incumbent; never a repetition."""

    name = "search"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def propose(self, briefing: Briefing) -> Proposal:
        """Raises NoProposal when every neighbour of the incumbent was tried."""
        if idea := ideas.draw(briefing, self.seed):
            return idea
        draw = random.Random(f"{self.seed} {briefing.number} {briefing.attempt}")
        menu = briefing.menu()
        if not menu or (len(briefing.history) >= STARTUP and draw.random() < PAIRS):
            pair = self._pair(briefing, draw)
            if pair:
                return self._proposal(briefing, pair)
        if menu:
            return self._proposal(briefing, dict([_ask(briefing, menu, draw)]))
        raise NoProposal("search has tried every neighbour of the incumbent's constants")

    def tell(self, proposal: Proposal, outcome: Tried) -> None:
        """Nothing to remember: the next briefing's history holds the outcome."""

    def _pair(self, briefing: Briefing, draw: random.Random) -> dict[str, Any]:
        """Two constants with new values, the second possible beside the first; {} when none was found."""
        first = briefing.menu(repeats=True)
        for _ in range(DRAWS if first else 0):
            name, value = _ask(briefing, first, draw)
            changed = dataclasses.replace(briefing, source=set_constant(briefing.source, name, value))
            second = {key: options for key, options in changed.menu().items() if key != name}
            if second:
                return dict([(name, value), _ask(changed, second, draw)])
        return {}

    def _proposal(self, briefing: Briefing, changes: Mapping[str, Any]) -> Proposal:
        source = briefing.source
        for name, value in changes.items():
            source = set_constant(source, name, value)
        try:
            check(source, briefing.source, briefing.tried, briefing.settings)
        except Rejected as reason:
            raise NoProposal(f"the sampler's proposal was refused: {reason}") from None
        edit = describe(source, briefing.source, briefing.settings)
        return Proposal(source, f"sampled: {in_words(edit)}", self.name, edit)


def _ask(briefing: Briefing, menu: Menu, draw: random.Random) -> tuple[str, Any]:
    """One constant and its new value from a menu that is not empty."""
    known = {name: item.value for name, item in briefing.constants().items()}
    nearby = briefing.menu(repeats=True)
    spaces = {name: _distribution(menu[name], [known[name], *nearby.get(name, ())]) for name in menu}
    spaces[CHOICE] = CategoricalDistribution(list(menu))
    trial = _study(briefing.history, spaces, draw.randrange(2**31)).ask()
    name = trial.suggest_categorical(CHOICE, list(menu))
    return name, _pick(menu[name], trial, name, spaces[name])


def _study(history: Sequence[Tried], spaces: Mapping[str, BaseDistribution], seed: int) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it announces every study otherwise
    sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP, multivariate=False, seed=seed)
    study = optuna.create_study(sampler=sampler, direction="minimize")
    study.add_trials(list(_trials(history, spaces)))
    return study


def _trials(history: Sequence[Tried], spaces: Mapping[str, BaseDistribution]) -> Iterator[FrozenTrial]:
    """The history as Optuna trials: the constants that each experiment changed, and the result."""
    for tried in history:
        values = (tried.edit or {}).get("values", {})
        encoded = {name: _encode(value, spaces.get(name)) for name, value in values.items()}
        params = {name: value for name, value in encoded.items() if value is not None}
        if not params or tried.verdict == "invalid":
            continue
        params[CHOICE] = next(iter(params))
        finished = tried.verdict not in FAILED and tried.delta is not None and math.isfinite(tried.delta)
        yield create_trial(
            state=TrialState.COMPLETE if finished else TrialState.PRUNED,
            value=tried.delta if finished else None,
            params=params,
            distributions={name: spaces[name] for name in params},
        )


def _distribution(options: Sequence[Any], nearby: Sequence[Any]) -> BaseDistribution:
    """The range of the options and of values nearby, tried or not; the options alone when they are no numbers."""
    values = [*options, *nearby]
    if all(_is_number(value) for value in values):
        low, high = float(min(values)), float(max(values))
        return FloatDistribution(low, high, log=low > 0)
    return CategoricalDistribution([repr(option) for option in options])


def _encode(value: Any, space: BaseDistribution | None) -> float | str | None:
    """A constant's value as a parameter, or None when it lies outside this space."""
    if isinstance(space, FloatDistribution):
        return float(value) if _is_number(value) and space.low <= value <= space.high else None
    return repr(value) if isinstance(space, CategoricalDistribution) and repr(value) in space.choices else None


def _pick(options: Sequence[Any], trial: optuna.Trial, name: str, space: BaseDistribution) -> Any:
    """The option that the sampler's suggestion means; the closest one, since tried values leave holes."""
    if isinstance(space, FloatDistribution):
        wanted = trial.suggest_float(name, space.low, space.high, log=space.log)
        scale = math.log if space.log else float
        return min(options, key=lambda option: abs(scale(option) - scale(wanted)))
    wanted = trial.suggest_categorical(name, space.choices)
    return next(option for option in options if repr(option) == wanted)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
