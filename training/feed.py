"""Batches for one training process, and where the stream of windows stands after those that were taken."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, IterableDataset

from stereovla.dataset_builder.streaming.questions import processor_arguments
from stereovla.dataset_builder.streaming.window_stream import WindowStream
from stereovla.modeling_stereovla import DepthVLAConfig, StereoVLAConfig
from stereovla.modeling_stereovla.flow_matching import sample_time
from stereovla.processing import DepthVLAProcessor, StereoProcessor


class Batches(IterableDataset):
    """Model inputs of `size` windows of a stream, their objectives, and the stream's state after them; the state that
    it begins with comes first, without inputs.
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
            windows.append(window)
            if len(windows) == self.size:
                yield self.collate(windows), [window["objective"] for window in windows], self.stream.state_dict()
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
