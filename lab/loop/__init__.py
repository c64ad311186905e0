"""What a run of experiments knows and decides.

In: proposals and measured runs. Out: journal.jsonl and its fold (`history`), verdicts, commits on the branch, and what
may be proposed (`source`, `space`, `proposal`).
"""
