"""report.html: what a run folder has to show, as one page that needs no other file and no network.

Read from the folder alone (metrics.jsonl, config.yaml, log.txt, starts.jsonl, samples.jsonl, experts.jsonl), so that it
can be made of a run that is still at work, or of one of years ago. Curves are drawn by plotly.js, which the package
plotly carries; its Python is never imported, only that file is read.
"""
