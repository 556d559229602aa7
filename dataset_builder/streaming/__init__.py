"""Shards into training windows: shuffled, mixed, split over processes, resumed exactly."""
