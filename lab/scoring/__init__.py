"""The score: val_bpb of a checkpoint, computed outside the experiment.

In: a run folder and the validation shard. Out: score.json and result.json, or a refusal by name. The model answers
from a process of its own (`model_server`) and never sees the arithmetic.
"""
