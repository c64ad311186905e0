"""Computes the score, val_bpb of a checkpoint, outside the experiment.

In: a run folder and the validation shard. Out: score.json and result.json, or the reason for a rejection. The model
runs in a separate process (`model_server`) and never sees the calculation.
"""
