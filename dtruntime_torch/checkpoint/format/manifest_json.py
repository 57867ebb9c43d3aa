"""Manifests, commits and generation records to JSON values and back; the types are checked here, what they mean in
`checks`.
"""

from __future__ import annotations

from dtruntime_torch.checkpoint.format import checks, strict_json
from dtruntime_torch.checkpoint.format.metadata_json import metadata_from_json, metadata_to_json
from dtruntime_torch.checkpoint.format.records import Commit, Generation, Manifest, PartRef
from dtruntime_torch.checkpoint.format.strict_json import Fields
from dtruntime_torch.checkpoint.names import CommitKey
from dtruntime_torch.checkpoint.objects import Json


def manifest_to_json(manifest: Manifest) -> dict[str, Json]:
    """The fields of a manifest."""
    return {
        "name": manifest.name,
        "generation": manifest.generation,
        "step": manifest.step,
        "attempt": manifest.attempt,
        "run_id": manifest.run_id,
        "parent": None if manifest.parent is None else list(manifest.parent),
        "world_size": manifest.world_size,
        "full": manifest.full,
        "uses": list(manifest.uses),
        "requires": list(manifest.requires),
        "created": manifest.created,
        "versions": dict(manifest.versions),
        "metadata": metadata_to_json(manifest.metadata),
        "nbytes": manifest.nbytes,
        "written": manifest.written,
        "parts": [_part_ref_to_json(ref) for ref in manifest.parts],
    }


def manifest_from(fields: Fields) -> Manifest:
    """Reads what `manifest_to_json` gave; what it requires first, for that may change the meaning of the rest."""
    requires = fields.strings("requires")
    checks.check_features(requires)
    return Manifest(
        name=fields.string("name"),
        generation=fields.integer("generation"),
        step=fields.integer("step"),
        attempt=fields.string("attempt"),
        run_id=fields.string("run_id"),
        parent=_parent_from(fields),
        world_size=fields.integer("world_size"),
        full=fields.boolean("full"),
        uses=fields.strings("uses"),
        requires=requires,
        created=fields.string("created"),
        versions=_versions_from(fields),
        metadata=metadata_from_json(fields.json("metadata")),
        nbytes=fields.integer("nbytes"),
        written=fields.integer("written"),
        parts=tuple(_part_ref_from(Fields(value, "a part")) for value in fields.array("parts")),
    )


def commit_to_json(commit: Commit) -> dict[str, Json]:
    """The fields of a commit."""
    return {
        "name": commit.name,
        "generation": commit.generation,
        "step": commit.step,
        "attempt": commit.attempt,
        "manifest_sha256": commit.manifest_sha256,
        "void": commit.void,
    }


def commit_from(fields: Fields) -> Commit:
    """Reads what `commit_to_json` gave."""
    return Commit(
        name=fields.string("name"),
        generation=fields.integer("generation"),
        step=fields.integer("step"),
        attempt=fields.string("attempt"),
        manifest_sha256=fields.string("manifest_sha256"),
        void=fields.boolean("void"),
    )


def generation_to_json(record: Generation) -> dict[str, Json]:
    """The fields of a generation record."""
    return {
        "generation": record.generation,
        "run_id": record.run_id,
        "host": record.host,
        "pid": record.pid,
        "created": record.created,
    }


def generation_from(fields: Fields) -> Generation:
    """Reads what `generation_to_json` gave."""
    return Generation(
        generation=fields.integer("generation"),
        run_id=fields.string("run_id"),
        host=fields.string("host"),
        pid=fields.integer("pid"),
        created=fields.string("created"),
    )


def _part_ref_to_json(ref: PartRef) -> Json:
    return {
        "rank": ref.rank,
        "path": ref.path,
        "length": ref.length,
        "sha256": ref.sha256,
        "data_length": ref.data_length,
    }


def _part_ref_from(fields: Fields) -> PartRef:
    return PartRef(
        rank=fields.integer("rank"),
        path=fields.string("path"),
        length=fields.integer("length"),
        sha256=fields.string("sha256"),
        data_length=fields.integer("data_length"),
    )


def _parent_from(fields: Fields) -> CommitKey | None:
    if fields.json("parent") is None:
        return None
    generation, step = strict_json.items(fields.json("parent"), "the parent", 2)
    return CommitKey(strict_json.whole(generation, "the parent"), strict_json.whole(step, "the parent"))


def _versions_from(fields: Fields) -> dict[str, str]:
    names = fields.object("versions")
    versions = Fields(names, "the versions")
    return {software: versions.string(software) for software in names}
