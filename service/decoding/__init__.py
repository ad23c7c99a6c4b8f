"""The decoder's side of the record: what may come next, the whole trie, what changed."""
