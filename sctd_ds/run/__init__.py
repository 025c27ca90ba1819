"""A pretraining run: its settings, model, data, measurements and report. `pretrain.py` puts these together."""
