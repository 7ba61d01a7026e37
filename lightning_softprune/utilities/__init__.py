"""A shelf of small tools that know nothing of pruning. Each file is its own door; this one imports nothing."""
