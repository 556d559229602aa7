"""What train.py is made of: batches, losses, checkpoints."""
