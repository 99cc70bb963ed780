"""What is removed of a dump, in an order in which nobody takes the rest for a whole one."""

from collections.abc import Iterable

from actdump.format import Folder
from actdump.plan import Part, Plan
from actdump.store.files import storage
from actdump.store.standing import done


def clear(folder: Folder, plan: Plan) -> None:
    """Remove what a dump consists of, the manifest first and the plan last; leave everything else, and parts that the plan has done."""
    done_parts = [part.number for part in plan.parts if done(folder, part, plan.digest)]
    kept = {path for number in done_parts for path in (folder.shard(number), folder.record(number))}
    with storage(folder.root, "cleared"):
        folder.manifest.unlink(missing_ok=True)
        for path in sorted(folder.shards.iterdir()) if folder.shards.is_dir() else ():
            if folder.written_by_us(path) and path not in kept:
                path.unlink()
        if folder.shards.is_dir() and not folder.shards.is_symlink() and not any(folder.shards.iterdir()):
            folder.shards.rmdir()
        for path in (folder.prompts, folder.tokens, folder.plan):
            path.unlink(missing_ok=True)


def reopen(folder: Folder, parts: Iterable[Part]) -> None:
    """Give up parts of a dump, so that they are not done, and the dump is not complete.

    Records go first: without a manifest, what records say is done would be taken into a new one.
    """
    with storage(folder.root, "repaired"):
        for part in parts:
            folder.record(part.number).unlink(missing_ok=True)
        folder.manifest.unlink(missing_ok=True)
