"""A policy on openpi's wire: `stereovla serve --model CHECKPOINT`, and `serving.client.PolicyClient`."""

from stereovla.extras import extra

with extra("serve"):
    import msgpack  # noqa: F401
    import websockets  # noqa: F401
