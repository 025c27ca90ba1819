"""The method inside DeepSpeed, of which nothing is edited.

`deepspeed.initialize` builds its engine. That object then becomes one of ours, a subclass that extends three of its methods:
the forward pass (the step's mode), `_take_model_step` (check the loss on all ranks, apply, update the importance table), and
saving and loading (the table, and every rank's random state). With ZeRO 1 and 2 its optimizer becomes one of ours, too, which
computes the same update with fewer operations and without stopping the host.
"""
