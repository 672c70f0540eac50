"""Offline batch evaluation: tasks make requests of documents, a runner answers them on any layout, scorers measure."""
