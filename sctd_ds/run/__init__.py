"""A pretraining run, in the pieces that `pretrain.py` puts together.

    environment  device, versions and commit
    metrics      METRICS, and what is written of them while the run trains
    validation   how good the model is, with all tokens and with dropping
    lock         one run in a folder at a time
    settings     one JSON file: read, overridden, checked
    models       the model: a new one, or a trained one
    probe        what a step of each mode takes
    samples      masked text, and the words that the model puts there
    report       what the run leaves behind
    control      dense training with the same operations, to compare the run with
    job          data, batches, and the forecast of a dry run

Each imports only those above it.
"""
