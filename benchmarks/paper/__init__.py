"""The paper's tables and figures on small teachers: `python -m benchmarks.paper.study`."""
