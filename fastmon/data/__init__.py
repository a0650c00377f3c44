"""Where tokens come from: the embedded corpus and its tokenizer, shard files, and the reading order."""
