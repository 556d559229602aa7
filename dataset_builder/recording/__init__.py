"""Simulated episodes into the shards of a dataset, on one machine or on many."""
