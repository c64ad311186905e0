"""From documents to rows of tokens.

In: a preset's source of text (the hub, local files, the built-in stories). Out: tokenizer, token shards and their
manifest in the cache (`shards`), and from them batches for training and rows for scoring (`batches`).
"""
