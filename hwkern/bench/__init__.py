"""``hwkern bench``: one model, one machine, every way to run it; throughput, latency, memory, energy and accuracy.

===========  ==========================================================================================================
settings     what is to be run: models, workloads and paths by name, and how long
models       the models, at random weights but for MiniLM and folders of the user's
paths        the ways to run a model in torch: float types, other quantizers, hwkern; eager, compiled, captured
subjects     one path of one model, ready to be timed
engines      the same for TensorRT, in a process of its own
traffic      a stream of requests, dynamic batching, the highest rate under a bound of latency (no torch)
compare      the order of things under a time budget: prepare, check, time in turn, keep
statistics   percentiles, noise, what counts as slower (no torch)
record       the JSON document: where it ran, rows, schema (no torch)
tables, page text, CSV, SVG and HTML from the JSON
verdicts     where hwkern is ahead of the stock paths in it, in words
===========  ==========================================================================================================
"""
