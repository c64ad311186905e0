"""Records experiments and decides what to keep.

In: proposals and measured runs. Out: journal.jsonl and the state replayed from it (`history`), verdicts, commits on
the branch, and what may be proposed next (`source`, `space`, `proposal`).
"""
