"""Proposes experiments: the built-in search, a local model, both, a coding CLI, or the user (`try`).

In: a briefing (`briefing`), rebuilt from the journal before every experiment. Out: a proposal, which is a complete
train.py and the reason for the change. All proposals are checked, trained and judged in the same way.
"""
