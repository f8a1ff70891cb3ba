"""The measurements behind docs/performance.md. Nothing here is installed; run it from the top of the repository: `python -m bench.run`."""
