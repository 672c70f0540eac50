"""What a run will take, from its config alone: work of each rank, memory and traffic. No process group, no weights."""
