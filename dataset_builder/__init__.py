"""Stereo demonstrations: recorded into shards, described by a card, streamed as training windows."""
