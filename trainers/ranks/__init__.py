"""What runs in a rank of a training group: its DeepSpeed engine, models and adapters, references, checkpoints.

Nothing outside imports DeepSpeed or peft; `trainers/training_group.py` is the handle that the driver holds.
"""
