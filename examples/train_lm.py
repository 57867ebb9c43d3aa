"""Trains a small language model on the source code of Python's standard library, and survives being killed.

    torchrun --standalone --nproc-per-node 2 examples/train_lm.py --checkpoints checkpoints

Kill it at any moment and start it again, on as many ranks as you like: it goes on behind its newest checkpoint, in
the middle of the epoch; on as many ranks as before, bit for bit. See `dt`, `hook` and `sampler` in `main`.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import dtruntime_torch as dt

CONTEXT = 128
WIDTH, HEADS, LAYERS, DROPOUT = 96, 4, 2, 0.1


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Sample `i` is the file's window `i`: its number, for the log, and CONTEXT + 1 bytes. Nothing is read ahead."""

    def __init__(self, path: Path, limit: int | None) -> None:
        self.data = np.memmap(path, dtype=np.uint8, mode="r")
        windows = (len(self.data) - 1) // CONTEXT
        self.length = windows if limit is None else min(limit, windows)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.data[index * CONTEXT : (index + 1) * CONTEXT + 1]
        return torch.tensor(index), torch.from_numpy(window.astype(np.int64))


class LanguageModel(nn.Module):
    """Bytes (batch, length) -> logits of the byte that follows each (batch, length, 256)."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, layers: int = LAYERS) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, DROPOUT, activation="gelu", batch_first=True, norm_first=True
        )
        self.bytes = nn.Embedding(256, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.normal_(self.bytes.weight, std=0.05)
        nn.init.normal_(self.positions.weight, std=0.05)
        self.head.weight = self.bytes.weight

    def forward(self, tokens: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        x = self.bytes(tokens) + self.positions.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.layers(x, mask=causal, is_causal=True))
        return logits


def write_corpus(path: Path) -> None:
    """Joins the sources of the standard library into one file, once."""
    if path.exists():
        return
    library = Path(sysconfig.get_paths()["stdlib"])
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with unfinished.open("wb") as corpus:
        for source in sorted(library.rglob("*.py")):
            if "site-packages" not in source.parts:
                corpus.write(source.read_bytes())
    unfinished.replace(path)


def learning_rate(step: int) -> float:
    """Rises for 100 steps, then falls with the root of the step: no total needed, so a run can be prolonged."""
    return min((step + 1) / 100, math.sqrt(100 / (step + 1)))


def digest(model: nn.Module) -> str:
    """Returns one SHA-256 of all weights: equal exactly if they are equal bit for bit."""
    weights = hashlib.sha256()
    for weight in model.state_dict().values():
        weights.update(weight.cpu().numpy().tobytes())
    return weights.hexdigest()


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Train a small language model on Python's standard library.")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--corpus", type=Path, help="file for the text [corpus.bin beside the checkpoints]")
    parser.add_argument("--samples", type=int, help="use so many windows of the text only [all]")
    parser.add_argument("--steps", type=int, default=1000, help="stop after so many steps [%(default)s]")
    parser.add_argument("--batch-size", type=int, default=32, help="samples of all ranks [%(default)s]")
    parser.add_argument("--every", type=int, default=50, help="steps from save to save [%(default)s]")
    parser.add_argument("--workers", type=int, default=1, help="loader processes of a rank [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    parser.add_argument("--freeze", metavar="PREFIX", help="do not train the parameters whose names begin so")
    parser.add_argument("--delta", action="store_true", help="write only what changed since the last save")
    parser.add_argument("--record", type=Path, help="folder for a file per rank with a JSON line per step")
    return parser.parse_args()


class Log:
    """Appends one JSON line for each call to this rank's file, and shows rank 0's losses."""

    def __init__(self, folder: Path | None, rank: int) -> None:
        self.rank, self.begin, self.file = rank, time.perf_counter(), None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = (folder / f"rank-{rank}.jsonl").open("a", buffering=1)

    def write(self, **values: object) -> None:
        line = {**values, "seconds": time.perf_counter() - self.begin}
        if self.file is not None:
            self.file.write(json.dumps(line) + "\n")
        if self.rank == 0 and "loss" in values:
            print(f"step {values['step']:>6}  epoch {values['epoch']}  loss {values['loss']:.4f}", flush=True)


def main() -> None:
    """Trains on this rank, from the newest checkpoint on."""
    args = parse()
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit(
            f"start it with torchrun: torchrun --nproc-per-node 2 {__file__} --checkpoints FOLDER"
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if args.batch_size % world_size:
        raise SystemExit(f"--batch-size {args.batch_size} does not divide by the {world_size} ranks")
    torch.use_deterministic_algorithms(True)

    corpus = args.corpus or args.checkpoints.parent / "corpus.bin"
    if local_rank == 0:
        write_corpus(corpus)
    dist.barrier()
    dataset = Windows(corpus, args.samples)
    sampler = dt.ElasticDistributedSampler(dataset, seed=args.seed)
    loader = DataLoader(dataset, args.batch_size // world_size, sampler=sampler, num_workers=args.workers)

    torch.manual_seed(args.seed)
    model = LanguageModel().to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(args.freeze is None or not name.startswith(args.freeze))
    torch.manual_seed(args.seed + rank)  # the same weights on each rank, but another dropout
    trained = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)

    manager = dt.CheckpointManager(args.checkpoints, delta=args.delta)
    hook = dt.CheckpointHook(
        manager,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        sampler=sampler,
        every_n_steps=args.every,
    )
    step = hook.restore()
    log = Log(args.record, rank)
    for epoch in itertools.count(sampler.epoch):
        if step >= args.steps:
            break
        sampler.set_epoch(epoch)
        for samples, tokens in hook.track(loader):
            tokens = tokens.to(device)
            logits = trained(tokens[:, :-1])
            loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
            step += 1
            # Before the save: what a checkpoint holds is in the log, also if the next instant kills this rank.
            stalled = {"called": hook.call_seconds, "waited": hook.door_seconds}
            log.write(step=step, epoch=epoch, loss=loss.item(), samples=samples.tolist(), **stalled)
            hook.step()
            if step == args.steps:
                break
    manager.close()
    log.write(step=step, weights=digest(model), called=hook.call_seconds, waited=hook.door_seconds)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it to be deterministic
    main()
