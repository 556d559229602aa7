"""Batches for one training process, and where the stream of windows stands after those that were taken."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, IterableDataset

from stereovla.dataset_builder.streaming.questions import processor_arguments, questions_of
from stereovla.dataset_builder.streaming.window_stream import WindowStream
from stereovla.modeling_stereovla import DepthVLAConfig, StereoVLAConfig
from stereovla.modeling_stereovla.flow_matching import sample_time
from stereovla.processing import DepthVLAProcessor, StereoProcessor

# what is of a picture, whatever is asked about it
OF_FRAMES = ("pixel_values", "disparity", "point_transform", "point_frame", "names", "name_points")


class Batches(IterableDataset):
    """Model inputs of `size` samples of a stream, their objectives, and the stream's state after them; the state that
    it begins with comes first, without inputs. Where a frame is asked several questions, each is a sample, and what is
    of their pictures is there once (`frames` of the policy's `forward`).
    """

    def __init__(
        self,
        stream: WindowStream,
        size: int,
        processor: StereoProcessor | DepthVLAProcessor,
        config: StereoVLAConfig | DepthVLAConfig,
    ):
        self.stream, self.size, self.processor, self.config = stream, size, processor, config

    def __iter__(self) -> Iterator[tuple[dict | None, list[str], dict]]:
        windows = []
        yield None, [], self.stream.state_dict()
        for window in self.stream:
            windows.append(questions_of(window))
            if sum(map(len, windows)) >= self.size:
                samples = [sample for of_frame in windows for sample in of_frame]
                inputs = self.collate(samples)
                if len(samples) > len(windows):
                    inputs = shared(inputs, [len(of_frame) for of_frame in windows])
                yield inputs, [sample["objective"] for sample in samples], self.stream.state_dict()
                windows = []

    def collate(self, windows: list[dict]) -> dict[str, torch.Tensor]:
        """Inputs of the policy's `forward`, the draws of flow matching among them: they follow from
        each window's own seed, so that they do not depend on how a batch is split.
        """
        config, inputs = self.config, dict(self.processor(**processor_arguments(windows, self.processor.pixel_views)))
        inputs.pop("action_mask", None)  # the loss covers the whole chunk, the held-still steps after its end included
        draws = []
        for window in windows:
            generator = torch.Generator().manual_seed(window["seed"])
            noise = torch.randn(config.flow_draws, config.chunk_size, config.action_dim, generator=generator)
            interval = (config.time_alpha, config.time_beta, config.time_min, config.time_max)
            time = sample_time((config.flow_draws,), *interval, generator=generator)
            draws.append({"noise": noise, "time": time})
            if config.writes_pose:
                draws[-1]["hide_pose"] = torch.rand((), generator=generator) < config.direct_probability
        return inputs | {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


def shared(inputs: dict[str, torch.Tensor], samples: list[int]) -> dict[str, torch.Tensor]:
    """Inputs of which so many `samples` after each other are about one frame, with what is of the frames once."""
    frames = torch.arange(len(samples)).repeat_interleave(torch.tensor(samples))
    first = torch.tensor(samples).cumsum(0) - torch.tensor(samples)
    of_frames = {name: inputs[name][first] for name in OF_FRAMES if name in inputs}
    return inputs | of_frames | {"frames": frames}


class Feed:
    """Batches of one process, from its workers, and where the stream stands after those that were taken."""

    def __init__(self, batches: Batches, workers: int, taken: int):
        # the worker whose turn it would be comes first, as DataLoader always begins with worker 0
        batches.stream.rotation = taken % max(1, workers)
        self.states: dict[str, dict] = {}
        context = "forkserver" if workers else None
        self.loader = iter(DataLoader(batches, batch_size=None, num_workers=workers, multiprocessing_context=context))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield self.take()[0]

    def take(self) -> tuple[dict[str, torch.Tensor], list[str]]:
        inputs = None
        while inputs is None:
            inputs, objectives, state = next(self.loader)
            self.states[min(state["lanes"])] = state
        return inputs, objectives
