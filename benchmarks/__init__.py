"""Measurements: the kernels, the training step, and the tables made of them. Recorded results lie under `results/`."""
