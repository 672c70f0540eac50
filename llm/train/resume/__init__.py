"""Going on from a checkpoint: which one (`choose`), what of the config must be as it was (`differences`), what else
differs and is said (`changes`), what becomes of `train.skip_steps` (`skipped_steps`), and the reading (`restore`).
"""
