"""The layers, one idea a file. They read as single-device code and know nothing of processes, data or files."""
