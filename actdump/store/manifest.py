"""The manifest that seals a dump."""

from dataclasses import replace

from actdump.format import Folder, Manifest, manifest_to_json
from actdump.plan import Plan
from actdump.statistics import merged
from actdump.store.files import to_json, write_atomically
from actdump.store.standing import finished


def gathered(folder: Folder, plan: Plan) -> Manifest | None:
    """The manifest of a dump whose parts are all done, from their records, before it says how it was made; `None` if one is not."""
    records = [finished(folder, span, plan.digest) for span in plan.shards]
    found = [record for record in records if record is not None]
    if len(found) < len(records):
        return None
    size = sum(shard.bytes for shard in found)
    firsts = [found[part.shards[0].number] for part in plan.parts]
    measured = [column.name for column in plan.columns if column.name in firsts[0].statistics]
    statistics = {name: merged([shard.statistics[name] for shard in firsts]) for name in measured}
    bare = tuple(replace(shard, statistics={}, written={}) for shard in found)
    return Manifest(plan.digest, plan.columns, bare, plan.prompts, plan.tokens, size, statistics, plan.facts, {})


def seal(folder: Folder, manifest: Manifest) -> None:
    """Write the manifest: the dump is complete; its spooled tokens go."""
    write_atomically(folder.manifest, to_json(manifest_to_json(manifest)))
    folder.tokens.unlink(missing_ok=True)
