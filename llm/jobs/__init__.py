"""What the launch scripts start: a job each, and the one runner of them all."""
