"""A page to look at a policy: `stereovla app --model CHECKPOINT`, on this machine or as a Space of the Hub."""

from stereovla.extras import extra

with extra("app"):
    import gradio  # noqa: F401
    import plotly  # noqa: F401
