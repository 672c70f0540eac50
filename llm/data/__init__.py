"""Training data: text -> token shards -> rows by global index -> micro-batches, the same on any number of ranks.

Everything random is a pure function of (seed, source name, epoch, row); everything that depends on the text is done
ahead and written to files. The way of a row: `documents` reads text, `build` writes a source, `source` and `shards`
read it, `order` and `mixture` say which row comes when, `batch` and `loader` hand it to the trainer. `sources` turns
the run config's `data:` into opened sources.
"""
