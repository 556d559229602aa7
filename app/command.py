"""Opens the page of a model."""

import socket
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from stereovla.app.layout import CSS, build, theme
from stereovla.app.page import Page
from stereovla.command_line import json_object, option
from stereovla.dataset_builder.streaming.episodes import open_splits
from stereovla.serving.serve import ModelOptions, load_model
from stereovla.serving.served_model import ServedModel

MOST_MB = 32  # of an uploaded file
LAST_WORDS_S = 3  # of connections that are open when it ends


@dataclass
class AppOptions(ModelOptions):
    """A page to look at a policy: drop a stereo pair, take a dataset's frame or step the simulator in closed loop, and
    see what the model sees, where it points, the keyframe and the chunk, in the picture and in space.

    stereovla app --model CHECKPOINT --dataset DATASET

    It is for this machine alone unless told otherwise; with --host 0.0.0.0, whoever reaches it may use it.
    """

    dataset: list[str] = option([], "Datasets, folders or Hub ids, whose frames can be chosen.")
    world: str = option(
        "{}", 'Options of simulation.WorldConfig and its preset as JSON, such as \'{"preset": "easy"}\'.'
    )
    execution_horizon: int = option(3, "Actions executed of each chunk in the simulator.")
    max_steps: int = option(120, "Steps of 0.1 s after which an episode has failed.")
    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(7860, "Port to listen on; 0 takes a free one.")

    def __post_init__(self):
        super().__post_init__()
        self.world_options()

    def world_options(self) -> dict[str, Any]:
        """Keyword arguments of `WorldConfig.from_preset`; ValueError for what is none."""
        return json_object("world", self.world, '{"preset": "easy"}')


def make_page(options: AppOptions) -> tuple[Page, gr.Blocks]:
    """Loads the model, checks datasets and world; what the page does, and its fields."""
    datasets = {name: open_splits(name) for name in options.dataset}
    served = load_model(options)
    served.warm_up([1])
    open_trial, why = simulator(options, served)
    parameters = sum(parameter.numel() for parameter in served.model.parameters())
    kind = type(served.model).__name__.partition("For")[0]
    about = (
        f"**{served.name}**, {parameters / 1e6:,.1f} million parameters, revision `{served.revision[:16]}`. "
        f"Sees {', '.join(served.keys.views)}; moves {', '.join(served.processor.norm_stats)}."
    )
    page = Page(served, datasets, open_trial, why)
    return page, build(page, kind, about)


def simulator(options: AppOptions, served: ServedModel) -> tuple[Any, str]:
    """What opens a world of a seed, or None, and why there is none; ValueError for options that no world has."""
    if set(served.keys.views) - {"left", "right"}:
        return None, f"The model sees {', '.join(served.keys.views)}; the simulator has the views left and right alone."
    try:
        from stereovla.app.trials import Trial
        from stereovla.evaluation.rollouts import RolloutConfig
        from stereovla.simulation import WorldConfig
        from stereovla.simulation.robots import ROBOTS
    except ModuleNotFoundError as error:
        if error.__cause__ is None:
            raise
        return None, f"No simulator here: {error}"
    config = WorldConfig.from_preset(**{"image_size": served.model.config.image_size, **options.world_options()})
    embodiment, known = ROBOTS[config.robot].embodiment, list(served.processor.norm_stats)
    if embodiment not in known:
        return None, f"The simulator's {config.robot} is {embodiment}; this model moves {', '.join(known)}."
    if options.execution_horizon > (most := served.model.config.chunk_size):
        raise ValueError(f"--execution_horizon is {options.execution_horizon}; the model predicts {most} actions")
    rollout = RolloutConfig(config, options.execution_horizon, options.max_steps)
    return partial(Trial, rollout, needs_depth=served.model.config.reads_depth), ""


def server_of(blocks: gr.Blocks) -> uvicorn.Server:
    """What answers for a page. gradio's own `launch` first calls itself, and gives up on a machine that is busy."""
    shown = {"theme": theme(), "css": CSS, "footer_links": [], "ssr_mode": False, "run_history": False}
    app = gr.mount_gradio_app(FastAPI(), blocks, "/", show_error=True, max_file_size=MOST_MB * 2**20, **shown)
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=LAST_WORDS_S))


def launch(options: AppOptions) -> None:
    """Serves the page until it is interrupted."""
    with listening(options.host, options.port) as taken:
        page, blocks = make_page(options)
        host, port = taken.getsockname()[:2]
        print(f"the page is on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        try:
            server_of(blocks).run(sockets=[taken])
        finally:
            page.close()


def listening(host: str, port: int) -> socket.socket:
    """A bound socket; OSError where the address or the port cannot be had, before a model is loaded."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error}") from error
