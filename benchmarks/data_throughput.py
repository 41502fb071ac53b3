"""Throughput from prepared records to ready batches, against Pillow alone and torch's DataLoader, on the same cores.

    moon-jax prepare --data catalogue/ --output prepared
    python benchmarks/data_throughput.py --data prepared [--config quickstart] [--seconds 8] [--rounds 5]

All three process the same images of the same products, in alternation, with one thread or worker per core:

  bare     Pillow alone: decodes images from memory and resizes them to the model's size
  ours     reads records from disk, tokenises texts, alters queries, decodes images, resizes them and cuts them into
           patches, packs rows: the batches for training
  torch    a DataLoader over the same records: decodes and resizes as "bare" and tokenises titles; collates, but does
           not pack (left out if torch is not installed)

Prints images per second. A ratio compares two results of the same round; the median over rounds is printed.
"""

import argparse
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tokenizers
from rich.console import Console
from rich.table import Table

from moon_jax import config as config_lib
from moon_jax.data import pipeline, text
from moon_jax.data.images import decode, patchify
from moon_jax.data.prepared import open_prepared


def images_of(batch):
    return int((np.asarray(batch.rows.image_hw)[..., 0] > 0).sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parsed = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    config = config_lib.replace(config_lib.load(parsed.config), {"data.threads": cores})
    prepared = open_prepared(parsed.data)
    titles = (prepared.products[index].text for index in prepared.train[:5000])
    tokenizer = text.train((title for title in titles if title), config.language.vocab)
    reader = pipeline.Reader(config, tokenizer)
    order = np.random.default_rng(0).permutation(len(prepared.train))
    held = [image for index in order[:4000] for image in prepared.products[int(index)].images[:1]]

    def bare(seconds):
        def one(content):
            picture = decode(content, config.data.max_pixels)
            high, wide = reader.rule.size(picture.height, picture.width)
            np.asarray(picture.resize((wide, high), 3))

        began, done = time.monotonic(), 0
        with ThreadPoolExecutor(cores) as pool:
            while time.monotonic() - began < seconds:
                part = [held[(done + offset) % len(held)] for offset in range(512)]
                list(pool.map(one, part, chunksize=16))
                done += len(part)
        return done / (time.monotonic() - began)

    step = 0

    def ours(seconds):
        nonlocal step
        batches = pipeline.from_step(pipeline.batches(prepared, reader), step, cores)
        next(batches)
        began, done = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            done += images_of(next(batches))
            step += 1
        return done / (time.monotonic() - began)

    loader = torch_loader(prepared, config, reader, tokenizer, order, cores)

    def torch(seconds):
        batches = iter(loader)
        next(batches)
        began, done = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            try:
                done += len(next(batches)[0])
            except StopIteration:
                batches = iter(loader)
        return done / (time.monotonic() - began)

    sides = {"bare": bare, "ours": ours} | ({"torch": torch} if loader else {})
    rates = {name: [] for name in sides}
    for _ in range(parsed.rounds):
        for name, side in sides.items():
            rates[name].append(side(parsed.seconds))
    table = Table(title=f"images per second, {cores} cores, {parsed.data}, config {parsed.config}")
    for column in ("", "median", "lowest to highest", "share of bare"):
        table.add_column(column, justify="right")
    for name, found in rates.items():
        share = statistics.median(one / base for one, base in zip(found, rates["bare"], strict=True))
        spread = f"{min(found):,.0f} to {max(found):,.0f}"
        table.add_row(name, f"{statistics.median(found):,.0f}", spread, f"{100 * share:.0f}%")
    Console().print(table)


class Products:
    """The dataset for torch's DataLoader. Its workers are spawned, not forked, because record readers use threads."""

    def __init__(self, prepared, reader, tokenizer, order):
        self.prepared, self.reader, self.order = prepared.products, reader.rule, order
        self.tokenizer, self.longest = tokenizer.base.to_str(), reader.config.data.text_tokens

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        if isinstance(self.tokenizer, str):
            self.tokenizer = text.Tokenizer.of(tokenizers.Tokenizer.from_str(self.tokenizer), "the benchmark's")
        product = self.prepared[int(self.order[index])]
        tokens = self.tokenizer.encode([product.text or ""], self.longest)[0]
        if not product.images:
            return None, tokens
        return patchify(decode(product.images[0], 10**9), self.reader).pixels, tokens


def collate(items):
    import torch

    pixels = [torch.from_numpy(pixels) for pixels, _ in items if pixels is not None]
    return pixels, [torch.from_numpy(tokens) for _, tokens in items]


def torch_loader(prepared, config, reader, tokenizer, order, workers):
    try:
        import torch
    except ImportError:
        return None
    return torch.utils.data.DataLoader(
        Products(prepared, reader, tokenizer, order),
        batch_size=3 * config.data.batch,
        num_workers=workers,
        collate_fn=collate,
        multiprocessing_context="spawn",
        persistent_workers=True,
    )


if __name__ == "__main__":
    main()
