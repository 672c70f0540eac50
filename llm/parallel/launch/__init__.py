"""How the processes of a job begin, end, and know of each other."""
