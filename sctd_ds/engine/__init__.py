"""The method inside DeepSpeed, of which nothing is edited.

`deepspeed.initialize` builds its engine. That object then becomes one of ours, a subclass that extends three of its methods:
the forward pass (the step's mode), `_take_model_step` (check the loss on all ranks, apply, update the importance table), and
saving and loading (the table, and every rank's random state).
"""
