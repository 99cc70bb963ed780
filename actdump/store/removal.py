"""What is removed of a dump, in an order in which nobody takes the rest for a whole one."""

from collections.abc import Iterable

from actdump.format import Folder
from actdump.plan import Plan, Span
from actdump.store.files import storage
from actdump.store.standing import finished


def clear(folder: Folder, plan: Plan) -> None:
    """Remove what a dump consists of, the manifest first and the plan last; leave everything else, and finished shards of the plan."""
    stay = [shard.number for shard in plan.shards if finished(folder, shard, plan.digest)]
    kept = {path for number in stay for path in (folder.shard(number), folder.record(number))}
    with storage(folder.root, "cleared"):
        folder.manifest.unlink(missing_ok=True)
        for path in sorted(folder.shards.iterdir()) if folder.shards.is_dir() else ():
            if folder.written_by_us(path) and path not in kept:
                path.unlink()
        if folder.shards.is_dir() and not folder.shards.is_symlink() and not any(folder.shards.iterdir()):
            folder.shards.rmdir()
        for path in (folder.prompts, folder.tokens, folder.plan):
            path.unlink(missing_ok=True)


def reopen(folder: Folder, shards: Iterable[Span]) -> None:
    """Give up shards of a dump, so that their parts are not done, and the dump is not complete.

    Records go first: without a manifest, what records say is done would be taken into a new one.
    """
    with storage(folder.root, "repaired"):
        for shard in shards:
            folder.record(shard.number).unlink(missing_ok=True)
        folder.manifest.unlink(missing_ok=True)
