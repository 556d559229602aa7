"""Training steps of an earlier version of this project, in a process of its own beside `benchmarks.training`.

    python benchmarks/training_before.py CHECKOUT DATASET PRESET BATCH_SIZE

CHECKOUT is a work tree of a version whose rooms were packages of their own, such as c6cb3aa. For each line of its
input, a number of steps, it trains these as that version's own benchmark does, and writes a line: the seconds that the
process has used, over all its threads, and those of them that the data took.
"""

import sys
import time


def main(checkout: str, dataset: str, preset: str, batch_size: str) -> None:
    sys.path.insert(0, checkout)
    from benchmarks import training as before  # the checkout's

    meta = before.load_meta(dataset)
    before.torch.manual_seed(0)
    model, processor = before.untrained(preset, meta)
    config = model.config
    share = 0.125 if config.disparity_loss_weight else 0.0
    stream = before.WindowStream(
        dataset, chunk_size=config.chunk_size, history=config.state_history, depth_map_share=share
    )
    feed = before.Feed(before.Batches(stream, int(batch_size), processor, config), 0, 0)
    way = before.Way(model, lambda inputs: [model(**inputs).loss])
    for line in sys.stdin:
        begin, waited = time.process_time(), 0.0
        for _ in range(int(line)):
            asked = time.process_time()
            inputs = feed.take()[0]
            waited += time.process_time() - asked
            way.step(inputs)
        print(time.process_time() - begin, waited, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
