"""Who proposes: the built-in search, a local model, both, a coding CLI, or somebody outside (`try`).

In: a briefing (`briefing`), rebuilt from the journal before every experiment. Out: a proposal, which is a whole
train.py and the reason for it. Checks, training and verdict are the same for all and know no agent.
"""
