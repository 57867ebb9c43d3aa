"""Ranks as threads over one Store in memory: savers and loads of several ranks without processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence

from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]  # torch does not list them

from dtruntime_torch.barrier import Barrier
from dtruntime_torch.checkpoint import restore
from dtruntime_torch.checkpoint.arguments import LoadOptions
from dtruntime_torch.checkpoint.info import CheckpointInfo, LoadedCheckpoint
from dtruntime_torch.checkpoint.save import Saver
from dtruntime_torch.checkpoint.saving.lineage import Lineage
from dtruntime_torch.checkpoint.saving.policies import SavePolicies
from dtruntime_torch.membership import Membership
from dtruntime_torch.storage import StorageBackend

RUN_ID = "0123456789abcdef" * 2


class Rank:
    """What a manager does, for one of several ranks of this process."""

    def __init__(
        self,
        backend: StorageBackend,
        store: object,
        rank: int,
        ranks: int,
        timeout: float,
        chunk_bytes: int = 4096,
        **policies: object,
    ) -> None:
        barrier = Barrier(PrefixStore("run", store), rank, ranks, timeout)
        self.backend = backend
        self.members = Membership(barrier, rank, ranks, RUN_ID)
        self.lineage = Lineage()
        chosen = SavePolicies(chunk_bytes, **policies)  # type: ignore[arg-type]
        self.saver = Saver(backend, "model", self.members, self.lineage, chosen)
        self.loads = 0

    def save(self, state: object, step: object, metadata: object = None) -> CheckpointInfo:
        return self.saver.start(state, step, metadata).result()

    def load(
        self, state: object, step: int | None = None, keys: Collection[str] | None = None, strict: bool = True
    ) -> LoadedCheckpoint:
        self.loads += 1
        key = f"load/{self.loads}"
        distrust = self.lineage.distrust
        options = LoadOptions(step, keys, strict)
        loaded = restore.load(self.backend, "model", self.members, state, key, options, distrust)
        self.lineage.follow(loaded.info.key, loaded.newest)
        return loaded.info


def make_ranks(
    ranks: int,
    backends: Sequence[StorageBackend] | StorageBackend,
    timeout: float = 60,
    **policies: object,
) -> list[Rank]:
    """Makes the ranks of one incarnation. Long time-outs: a test that waits one out has failed.

    Args:
        ranks: how many.
        backends: one for all, or one for each.
        timeout: of their barriers.
        policies: of their savers: those of `SavePolicies`.
    """
    store = HashStore()
    each = backends if isinstance(backends, Sequence) else [backends] * ranks
    return [Rank(each[rank], store, rank, ranks, timeout, **policies) for rank in range(ranks)]


def together(*calls: Callable[[], object]) -> list[object]:
    """Runs the calls at the same time; returns of each what it returned or raised."""
    results: list[object] = [None] * len(calls)

    def run(i: int) -> None:
        try:
            results[i] = calls[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
