"""What the benchmarks share: models, timing, processes, memory, versions, tables and the CSV file."""
