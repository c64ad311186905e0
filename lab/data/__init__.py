"""Turns documents into rows of tokens.

In: a preset's source of text (the hub, local files, or the built-in stories). Out: tokenizer, token shards and manifest
in the cache (`shards`); from them, batches for training and rows for scoring (`batches`).
"""
