"""The page's fields and pictures, and which button does what."""

from collections.abc import Sequence
from typing import Any

import gradio as gr
import numpy as np

from stereovla.app.drawing import SEEN
from stereovla.app.frames import states_text
from stereovla.app.page import Page, marks_html
from stereovla.serving.served_model import ServedModel

FONT = ["Inter", "system-ui", "-apple-system", "Segoe UI", "sans-serif"]  # nothing is fetched
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
CSS = """
.gradio-container {max-width: 1680px !important; margin: auto !important;}
#title h1 {margin: 0; font-size: 1.6rem; letter-spacing: -0.01em;}
#title p {margin: 0.1rem 0 0; color: var(--body-text-color-subdued);}
.view img {width: 100% !important; height: 100% !important; object-fit: contain !important;}
.drawn img {width: 100% !important; height: auto !important; border-radius: var(--radius-lg);}
.drawn, .drawn > div {border: none !important; background: none !important; box-shadow: none !important;}
.head p {margin: 0; font-weight: 600;}
.legend {font-size: 0.8rem; line-height: 1.5rem; color: var(--body-text-color-subdued);}
.legend span {display: inline-flex; align-items: center; gap: 0.35rem; margin-right: 0.7rem; white-space: nowrap;}
.legend i {width: 0.75rem; height: 0.75rem; border-radius: 50%; display: inline-block;}
.legend i.keyframe {border-radius: 1px; transform: rotate(45deg) scale(0.85);}
.facts {font-size: 1rem;}
.chunk table, .chunk td * {font-size: 0.7rem !important;}
.chunk th, .chunk td {padding: 0.3rem 0.25rem !important;}
footer {display: none !important;}
"""
WORLD_KEPT_S = 900  # of a visitor who has gone
HEADS = {"disparity": "What it sees: disparity", "depth": "What it sees: depth"}


def theme() -> gr.themes.Base:
    """Quiet: the pictures have the colours."""
    plain = "transparent"
    return gr.themes.Soft(primary_hue="teal", neutral_hue="slate", font=FONT, font_mono=MONO).set(
        block_title_background_fill=plain,
        block_title_background_fill_dark=plain,
        block_title_padding="0",
        block_title_text_color="*neutral_500",
        block_title_text_weight="500",
        block_label_background_fill="*neutral_50",
        block_label_text_color="*neutral_500",
        block_label_text_weight="500",
    )


def build(page: Page, title: str, about: str) -> gr.Blocks:
    """The page with its fields.

    Args:
        about: a line of Markdown below the title.
    """
    served = page.served
    robot = page.robots[0]
    middle = served.processor.normalizer.unnormalize(np.zeros((1, served.model.config.state_dim)), robot, "state")
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown(f"# {title}\n{about}", elem_id="title")
        carried = gr.State(None)
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=340):
                with gr.Row():
                    views = [view_field(name) for name in page.views]
                text = gr.Textbox(label="Instruction", placeholder="pick up the red cube", lines=1)
                ask = gr.Button("Ask the model", variant="primary")
                tabs = {}
                with gr.Tabs():
                    if page.datasets:
                        with gr.Tab("Dataset"):
                            tabs["dataset"] = dataset_fields(page)
                    with gr.Tab("Simulator"):
                        tabs["simulator"] = simulator_fields(page)
                    with gr.Tab("State and camera"):
                        robots = gr.Dropdown(page.robots, value=robot, label="Robot", interactive=True)
                        states = gr.Textbox(
                            states_text(np.round(middle, 4)),
                            label="State, one per line, the present one last",
                            info=_state_names(served, robot),
                            lines=2,
                        )
                        calibration = gr.Textbox(
                            label="Calibration of the left view, JSON; may be empty",
                            placeholder='{"focal_length_px": [..], "principal_point_px": [..], "baseline_m": .., '
                            '"transform_camera_to_base": [[..], ..]}',
                            lines=3,
                        )
                        noise = gr.Number(0, label="Seed of the noise that a chunk starts from", precision=0)
            with gr.Column(scale=9, min_width=560):
                facts = gr.Markdown(
                    "Take a frame, begin a world or drop a pair of pictures, and ask the model.", elem_classes="facts"
                )
                with gr.Row():
                    with gr.Column(min_width=170):
                        drawn = [picture("Chunk and keyframe")]
                        marks = gr.HTML()
                    if page.points:
                        with gr.Column(min_width=170):
                            drawn.append(picture("Where it points"))
                            gr.HTML(marks_html({name: SEEN[name] for name in page.points}))
                    if page.distances:
                        with gr.Column(min_width=170):
                            drawn.append(picture(HEADS[page.distances]))
                with gr.Row():
                    with gr.Column(scale=5, min_width=300):
                        gr.Markdown("In the robot's base frame", elem_classes="head")
                        space = gr.Plot(show_label=False)
                    with gr.Column(scale=6, min_width=300):
                        table = gr.Dataframe(label="Chunk", interactive=False, elem_classes="chunk", max_height=460)
        fields = [*views, text, robots, states, calibration, carried]
        outputs = [*drawn, space, marks, facts, table]
        one = {"concurrency_limit": 1, "concurrency_id": "model"}
        for view in views:  # what came with other pictures
            view.input(lambda: None, None, carried, queue=False, api_visibility="private")
        asked = {"fn": page.on_thread(page.look), "inputs": [*fields, noise], "outputs": outputs, **one}
        ask.click(**asked, api_name="look")
        text.submit(**asked, api_visibility="private")
        if page.datasets:
            dataset, split, episode, number, take = tabs["dataset"]
            chosen = {
                "fn": page.on_thread(page.take),
                "inputs": [dataset, split, episode, number],
                "outputs": fields,
                **one,
            }
            take.click(**chosen, api_name="take").success(**asked, api_visibility="private")
        if page.open_trial is not None:
            connect_simulator(page, tabs["simulator"], fields, outputs, text, noise, asked, one)
    return blocks


def view_field(name: str) -> gr.Image:
    """Where a view is dropped. Its file is read by `frames.read_view`, so that one that is no picture is told in words;
    those of datasets and of the simulator go through PNG, which changes nothing.
    """
    field = gr.Image(
        label=f"{name} view",
        type="filepath",
        image_mode=None,
        format="png",
        sources=["upload", "clipboard"],
        height=250,
        min_width=120,
        buttons=[],
        elem_classes="view",
    )
    # a class derived from gr.Image would write a stub beside this file
    field.preprocess = lambda payload: None if payload is None else payload.path
    return field


def picture(head: str) -> gr.Image:
    """A picture that the model's answer is drawn into, below its heading."""
    gr.Markdown(head, elem_classes="head")
    return gr.Image(
        show_label=False, format="png", interactive=False, buttons=["fullscreen"], elem_classes="drawn", min_width=160
    )


def _state_names(served: ServedModel, robot: str) -> str:
    told = served.metadata()["embodiments"][robot]
    pairs = zip(told["state_names"], told["state_units"], strict=True)
    return ", ".join(f"{name} ({unit})" if unit else name for name, unit in pairs)


def dataset_fields(page: Page) -> tuple[Any, ...]:
    """Which frame of which dataset, and a button."""
    first = next(iter(page.datasets))
    held_out = "validation" if "validation" in page.datasets[first] else page.datasets[first][0]
    dataset = gr.Dropdown(list(page.datasets), value=first, label="Dataset", interactive=True)
    split = gr.Dropdown(page.datasets[first], value=held_out, label="Split", interactive=True)
    with gr.Row():
        episode = gr.Number(0, label="Episode", precision=0, min_width=80)
        number = gr.Number(0, label="Frame", precision=0, min_width=80)
    take = gr.Button("Take this frame and ask", variant="secondary")

    def splits_of(name: str) -> Any:
        return gr.update(choices=page.datasets[name], value=page.datasets[name][0])

    dataset.input(splits_of, dataset, split, queue=False, api_visibility="private")
    return dataset, split, episode, number, take


def simulator_fields(page: Page) -> tuple[Any, ...]:
    """A world of a seed, what it is asked, and buttons; or why there is none."""
    if page.open_trial is None:
        gr.Markdown(page.closed_loop)
        return ()
    trial = gr.State(None, time_to_live=WORLD_KEPT_S, delete_callback=page.close_trial)
    with gr.Row(equal_height=True):
        seed = gr.Number(0, label="Seed of the world", precision=0, min_width=120)
        begin = gr.Button("New world", min_width=100)
    task = gr.Dropdown([], label="What can be asked in this scene", interactive=True)
    with gr.Row():
        step = gr.Button("Step", min_width=80)
        run = gr.Button("Run", variant="primary", min_width=80)
        stop = gr.Button("Stop", variant="stop", min_width=80)
    told = gr.Markdown(
        "Each step executes the beginning of a chunk; success is counted by physics.", elem_classes="facts"
    )
    return trial, seed, begin, task, step, run, stop, told


def connect_simulator(
    page: Page, simulator: Sequence[Any], fields: list, outputs: list, text: Any, noise: Any, asked: dict, one: dict
) -> None:
    """What the simulator's buttons do."""
    trial, seed, begin, task, step, run, stop, told = simulator
    begun = {"fn": page.on_thread(page.begin), "inputs": [trial, seed], "outputs": [trial, task, told, *fields], **one}
    begin.click(**begun, api_name="begin").success(**asked, api_visibility="private")
    task.input(lambda chosen: chosen, task, text, queue=False, api_visibility="private").success(
        **asked, api_visibility="private"
    )
    stepped = {"inputs": [trial, text, noise], "outputs": [told, *fields, *outputs], **one}
    step.click(page.on_thread(page.step), **stepped, api_name="step")
    running = run.click(page.run, **stepped, api_name="run", show_progress="hidden")
    stop.click(None, None, None, cancels=[running], api_visibility="private")
