"""What is to go, from what is there: computed, so that a dry run tells the same as the real one does."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from dtruntime_torch.checkpoint import names
from dtruntime_torch.checkpoint.cleaning.retention import RetentionPolicy
from dtruntime_torch.checkpoint.cleaning.stock import Stock
from dtruntime_torch.checkpoint.manifest import Commit
from dtruntime_torch.checkpoint.names import Attempt, CommitKey
from dtruntime_torch.checkpoint.objects import Json

# How many of the deltas that use one attempt are named.
MOST_USERS_TOLD = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to go.

    Attributes:
        commits: to be taken away, oldest first.
        dead: attempts of older generations that are not committed, to be swept.
        victims: attempts whose files go, as far as is known before the look.
    """

    commits: tuple[Commit, ...]
    dead: tuple[Attempt, ...]
    victims: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What a prune took away, or would take.

    Attributes:
        dry_run: whether nothing was done.
        commits: the checkpoints, oldest first.
        attempts: the folders whose files went, relative to the checkpoint's.
        nbytes: bytes of these files.
        blocked: why something stays that should go.
        in_use: why files of what is no checkpoint any more stay, a line for each attempt: deltas that stay use them.
    """

    dry_run: bool
    commits: tuple[CommitKey, ...]
    attempts: tuple[str, ...]
    nbytes: int
    blocked: tuple[str, ...]
    in_use: tuple[str, ...] = ()


def make_plan(stock: Stock, policy: RetentionPolicy, generation: int) -> Plan:
    """Chooses what an incarnation may delete: of its own generation and older ones what retention does not keep,
    and of older ones what is not committed.

    Args:
        stock: in which nothing is blocked.
        policy: what is to be kept. The newest commit always is.
        generation: of the incarnation.
    """
    kept = policy.kept(metadata_of(stock))
    commits = [
        commit
        for key, commit in sorted(_understood(stock))
        if key not in kept and key.generation <= generation
    ]
    committed = {commit.attempt for commit in stock.commits.values()}
    old = [attempt for attempt in _attempts(stock) if attempt.generation < generation]
    uncommitted = [attempt for attempt in old if attempt.path not in committed]
    gone = {commit.attempt for commit in commits} | {attempt.path for attempt in uncommitted}
    named = _named(stock, gone)
    # One that others still need, and that protects nothing itself, would only be looked at and left.
    dead = [a for a in uncommitted if a.path in stock.manifests or a.path not in named]
    released = {attempt.path for attempt in dead}.union(
        *(stock.manifests[commit.attempt].uses for commit in commits)
    )
    victims = [attempt for attempt in stock.nbytes if attempt in released - named]
    return Plan(tuple(commits), tuple(dead), tuple(victims))


def metadata_of(stock: Stock) -> dict[CommitKey, Json]:
    """Of every checkpoint, what the user gave."""
    return {key: stock.manifests[commit.attempt].metadata for key, commit in _understood(stock)}


def _understood(stock: Stock) -> list[tuple[CommitKey, Commit]]:
    """Without what another prune took away while stock was taken."""
    return [(key, commit) for key, commit in stock.commits.items() if commit.attempt in stock.manifests]


def _attempts(stock: Stock) -> list[Attempt]:
    found = (names.parse_attempt(path) for path in stock.nbytes)
    return [attempt for attempt in found if attempt is not None]


def _named(stock: Stock, gone: set[str]) -> set[str]:
    """What the manifests that stay name."""
    return set().union(*(noted.uses for attempt, noted in stock.manifests.items() if attempt not in gone))


def report(
    dry_run: bool,
    stock: Stock,
    commits: Iterable[CommitKey],
    attempts: Collection[str],
    blocked: Iterable[str],
    cleared_attempts: Collection[str] = (),
) -> PruneReport:
    """Tells what goes or went, with the bytes that were there when stock was taken.

    Args:
        dry_run: whether nothing was done.
        stock: as it was before.
        commits: the checkpoints that go.
        attempts: those whose files go.
        blocked: why something stays that should go.
        cleared_attempts: those whose manifests go.
    """
    gone = [attempt for attempt in stock.nbytes if attempt in attempts]
    return PruneReport(
        dry_run=dry_run,
        commits=tuple(commits),
        attempts=tuple(gone),
        nbytes=sum(stock.nbytes[attempt] for attempt in gone),
        blocked=tuple(blocked),
        in_use=tuple(_in_use(stock, attempts, cleared_attempts)),
    )


def _in_use(stock: Stock, attempts: Collection[str], cleared_attempts: Collection[str]) -> Iterator[str]:
    staying = {
        attempt: noted.uses for attempt, noted in stock.manifests.items() if attempt not in cleared_attempts
    }
    for attempt in stock.nbytes:
        users = sorted(user for user, uses in staying.items() if attempt in uses)
        if users and attempt not in staying and attempt not in attempts:
            more = f" and {len(users) - MOST_USERS_TOLD} more" if len(users) > MOST_USERS_TOLD else ""
            yield f"files of {attempt} stay, used by {', '.join(users[:MOST_USERS_TOLD])}{more}"
