"""What `summarize.py` shares with the benchmarks; each benchmark is a script."""
