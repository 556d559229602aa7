"""A policy behind a WebSocket: `python -m serving --model CHECKPOINT`, and `serving.client.PolicyClient`."""
