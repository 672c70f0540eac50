"""The documents of shards that lie on one side of a split: what is written to shards of their own."""

from collections.abc import Iterator

import numpy as np

from llm.data.build import Placed
from llm.data.shards import EncodedDocument, Shard, text_digests, text_sizes
from llm.data.source import TokenSource
from llm.data.split import Split


def placed_documents(source: TokenSource, split: Split) -> Iterator[Placed]:
    """The documents of a source that are on one side of a split, as they are written to another one."""
    folders = iter([(entry.path, entry.documents) for entry in source.manifest.folders])
    folder, left = "", 0
    for entry in source.manifest.shards:
        path = source.shard_path(entry)
        shard, digests, sizes = Shard(path, entry), text_digests(path, entry), text_sizes(path, entry)
        for i in range(entry.documents):
            if source.manifest.folders:
                while left == 0:
                    folder, left = next(folders)
                left -= 1
            digest = digests[i].tobytes()
            if split.keeps(digest):
                tokens = np.array(shard.tokens[shard.starts[i] : shard.starts[i + 1]])
                yield Placed(EncodedDocument(tokens, shard.name(i), digest, int(sizes[i])), folder)
